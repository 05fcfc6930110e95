"""Window attention and its geometry. Only torch is required; Triton is optional."""

from .window_attention import window_attention

__all__ = ['window_attention']

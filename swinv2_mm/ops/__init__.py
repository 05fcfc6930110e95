"""Operations that need torch alone."""

from .window_attention import window_attention

__all__ = ['window_attention']

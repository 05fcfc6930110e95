"""Backbones and necks, registered in `swinv2_mm.registry.MODELS`; needs no toolbox and no compiled op."""

from .global_attention import GlobalAttention
from .swin_v2 import SwinTransformerV2

__all__ = ['GlobalAttention', 'SwinTransformerV2']

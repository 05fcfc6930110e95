"""Backbones, registered in `swinv2_mm.registry.MODELS`; needs no toolbox and no compiled op."""

from .swin_v2 import SwinTransformerV2

__all__ = ['SwinTransformerV2']

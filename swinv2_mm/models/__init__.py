"""Backbones and necks, registered in `swinv2_mm.registry.MODELS`; needs no toolbox and no compiled op of mmcv."""

from .global_attention import GlobalAttention
from .precision import BFloat16SwinTransformerV2
from .simmim import SimMIMSwinTransformerV2
from .swin_v2 import SwinTransformer3DV2, SwinTransformerV2

__all__ = [
    'BFloat16SwinTransformerV2',
    'GlobalAttention',
    'SimMIMSwinTransformerV2',
    'SwinTransformer3DV2',
    'SwinTransformerV2',
]

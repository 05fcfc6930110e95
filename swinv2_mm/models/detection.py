"""Float32 heads for mmdet's two-stage detectors in bfloat16, which is too coarse for pixel coordinates.

This module imports mmdet, so a config gives its full path: `swinv2_mm.models.detection.Float32RPNHead`.
"""

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class Float32RPNHead(RPNHead):
    """mmdet's RPNHead with predictions in float32.

    mmdet creates anchors in the dtype of the predictions. In bfloat16, coordinates around 1333 pixels are multiples of
    8, for anchors and proposals alike, and mmcv's NMS raises an error on a CPU.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RPNHead`: (B, C, H, W) -> scores (B, A, H, W) and deltas (B, 4A, H, W) in float32."""
        scores, deltas = super().forward_single(x)
        return scores.float(), deltas.float()


@MODELS.register_module()
@check_arguments()
class Float32RoIExtractor(SingleRoIExtractor):
    """mmdet's RoI extractor with features and boxes in float32, whatever the dtype of the neck.

    mmcv's RoIAlign does not support bfloat16, and mmdet casts boxes to the dtype of the features.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """See `SingleRoIExtractor`: feature maps (B, C, H_i, W_i) and boxes (n, 5) -> (n, C, size, size) in float32."""
        return super().forward(tuple(f.float() for f in feats), rois, roi_scale_factor)

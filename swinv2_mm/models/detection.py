"""What mmdet's two-stage detectors need to run in bfloat16, which they would otherwise use for pixel coordinates too.

The only part of `models` that imports mmdet, so a config names it in full: `swinv2_mm.models.detection.Float32RPNHead`.
"""

from mmdet.models.dense_heads import RPNHead
from mmdet.models.roi_heads.roi_extractors import SingleRoIExtractor
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class Float32RPNHead(RPNHead):
    """mmdet's RPN with its predictions in float32.

    mmdet makes anchors of the predictions' dtype: in bfloat16 they would lie on a grid of 8 pixels at the far side of
    an image of 1333, and so would the proposals; mmcv's NMS refuses them on a CPU.
    """

    def forward_single(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """See `RPNHead`: (B, C, H, W) -> scores (B, A, H, W) and deltas (B, 4A, H, W) in float32."""
        scores, deltas = super().forward_single(x)
        return scores.float(), deltas.float()


@MODELS.register_module()
@check_arguments()
class Float32RoIExtractor(SingleRoIExtractor):
    """mmdet's RoI extractor with features and boxes in float32, whatever the precision of the neck.

    mmcv's RoIAlign has no bfloat16, and mmdet casts boxes to the features' dtype.
    """

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """See `SingleRoIExtractor`: maps (B, C, H_i, W_i) and boxes (n, 5) -> (n, C, size, size) in float32."""
        return super().forward(tuple(f.float() for f in feats), rois, roi_scale_factor)

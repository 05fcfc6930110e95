"""A float32 head for training mmaction2's recognizers in bfloat16.

This module imports mmaction, so a config gives its full path: `swinv2_mm.models.recognition.Float32I3DHead`.
"""

from mmaction.models import I3DHead
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class Float32I3DHead(I3DHead):
    """mmaction's I3DHead with scores in float32.

    mmaction computes the accuracy of a training step with NumPy, which has no bfloat16.
    """

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """See `I3DHead`: (N, C, T, H, W) -> (N, classes) in float32."""
        return super().forward(x, **kwargs).float()

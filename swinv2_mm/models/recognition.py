"""What mmaction2's recognizers need to train in bfloat16.

The only part of `models` that imports mmaction, so a config names it in full:
`swinv2_mm.models.recognition.Float32I3DHead`.
"""

from mmaction.models import I3DHead
from torch import Tensor

from ..arguments import check_arguments
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class Float32I3DHead(I3DHead):
    """mmaction's I3DHead with its scores in float32.

    For the accuracy of a training step mmaction turns them into NumPy arrays, and NumPy has no bfloat16.
    """

    def forward(self, x: Tensor, **kwargs) -> Tensor:
        """See `I3DHead`: (N, C, T, H, W) -> (N, classes) in float32."""
        return super().forward(x, **kwargs).float()

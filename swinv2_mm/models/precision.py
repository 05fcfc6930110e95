"""A backbone in bfloat16 for models whose other parts need float32."""

import torch
from torch import Tensor

from ..arguments import check_arguments
from ..openmmlab import MODELS
from .foreign import FOREIGN_ARGUMENTS
from .swin_v2 import SwinTransformerV2


@MODELS.register_module()
@check_arguments(foreign=FOREIGN_ARGUMENTS)
class BFloat16SwinTransformerV2(SwinTransformerV2):
    """`SwinTransformerV2` that computes in bfloat16 and returns float32, whatever the precision of the other parts.

    mmcv's deformable attention, focal loss and RoIAlign do not support bfloat16 on a GPU, so DINO, Mask2Former,
    RetinaNet and Faster R-CNN cannot train in it as a whole. With this backbone they can, with mmengine's
    `OptimWrapper`. Weights stay in float32. Arguments and checkpoints are those of `SwinTransformerV2`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """See `SwinTransformerV2`."""
        with torch.autocast(x.device.type, dtype=torch.bfloat16):
            return tuple(feature_map.float() for feature_map in super().forward(x))

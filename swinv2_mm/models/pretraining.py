"""Target of SimMIM in the official pre-training of Swin V2, for mmpretrain's SimMIM.

This module imports mmpretrain, so a config gives the full path: `swinv2_mm.models.pretraining.NormalizedSimMIMHead`.
"""

import torch
import torch.nn.functional as F
from mmpretrain.models import SimMIMHead
from torch import Tensor

from ..arguments import Positive, check_arguments
from ..registry import MODELS


@MODELS.register_module()
@check_arguments()
class NormalizedSimMIMHead(SimMIMHead):
    """mmpretrain's SimMIMHead with a target that is normalized around each pixel, as in the official code.

    Args:
        patch_size: Patch size of the backbone: the mask has one entry per patch.
        loss: Config of the loss.
        norm_window: Side of the square around each pixel, in pixels; 47 in the official settings.

    Raises:
        ValueError: `norm_window` is even, or 1.
    """

    def __init__(self, patch_size: Positive, loss: dict, norm_window: Positive = 47) -> None:
        super().__init__(patch_size, loss)
        if norm_window % 2 == 0 or norm_window == 1:
            raise ValueError(f'norm_window must be an odd number above 1, such as 47, got {norm_window}')
        self.norm_window = norm_window

    def loss(self, pred: Tensor, target: Tensor, mask: Tensor) -> Tensor:
        """Loss of the masked pixels.

        Args:
            pred: Reconstruction, (B, C, H, W).
            target: Images, (B, C, H, W).
            mask: (B, H / patch_size, W / patch_size), 1 for masked patches.
        """
        return super().loss(pred, normalize_locally(target, self.norm_window), mask)


def normalize_locally(x: Tensor, window: int) -> Tensor:
    """Subtract from each pixel of (B, C, H, W) the mean, and divide by the deviation, of a square around it.

    Each channel has its own. At the border, the square has only the pixels inside the image.
    """
    mean = _mean_around(x, window)
    count = _mean_around(torch.ones_like(x[:1, :1]), window, count_include_pad=True) * window**2
    variance = (_mean_around(x.square(), window) - mean.square()).clamp(min=0) * count / (count - 1)
    return (x - mean) / (variance + 1e-6).sqrt()


def _mean_around(x: Tensor, window: int, count_include_pad: bool = False) -> Tensor:
    """Mean of the square around each pixel, first along columns and then along rows."""
    for kernel in ((window, 1), (1, window)):
        padding = [side // 2 for side in kernel]
        x = F.avg_pool2d(x, kernel, stride=1, padding=padding, count_include_pad=count_include_pad)
    return x

"""Log-spaced continuous position bias: the one owner of relative coordinates."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def log_spaced_coords(
    window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], device: torch.device | None = None
) -> Tensor:
    """Relative coordinates of a window in log space (Eq. 4), scaled as in the official code.

    The largest offset of the window that the MLP was pre-trained with is 8 before the logarithm and log2(9) / 3 after
    it; larger windows extrapolate.

    Returns:
        (prod(2 * window - 1), axes) in float32, the last axis varying fastest.
    """
    offsets = [torch.arange(1 - w, w, dtype=torch.float32, device=device) for w in window_size]
    coords = torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1).flatten(0, -2)
    # a window of one token has the offset 0 alone, whatever divides it
    coords = coords / torch.tensor([max(p - 1, 1) for p in pretrained_window_size], device=device) * 8
    return coords.sign() * torch.log2(coords.abs() + 1.0) / math.log2(8)


class LogCPB(nn.Sequential):
    """The MLP that turns log-spaced relative coordinates into a position bias for each head (Sec. 3.3).

    It is continuous in the coordinates, so its weights serve any window size. `pretrained_window_size` must stay what
    it was when they were learnt, since it scales the coordinates.

    Args:
        window_size: Tokens of a window along each axis.
        pretrained_window_size: Window that the weights were learnt with, along each axis.
        num_heads: Number of attention heads.
    """

    def __init__(self, window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(nn.Linear(len(window_size), 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.window_size = window_size
        self.pretrained_window_size = pretrained_window_size

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        weight = self[0].weight
        # computed, not stored: a buffer would have to follow every window change and every deferred initialisation
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size, weight.device)
        # PyTorch's CPU kernels compute the last few elements of a tensor by another routine, one bit off; rows of
        # padding keep them out, so that the bias is the official one to the last bit although the sigmoid comes before
        # the gather
        rows = F.pad(coords.to(weight.dtype), (0, 0, 0, -len(coords) % 64))
        with torch.autocast(weight.device.type, enabled=False):
            bias = 16 * super().forward(rows).sigmoid()
        return bias[: len(coords)].T

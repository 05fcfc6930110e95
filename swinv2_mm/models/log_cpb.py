"""Log-spaced continuous position bias."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops.coordinates import log_spaced_coords


class LogCPB(nn.Sequential):
    """The MLP that turns log-spaced relative coordinates into a position bias for each head (Sec. 3.3).

    It is continuous in the coordinates, so its weights serve any window size, as long as the coordinates are scaled by
    the window that they were learnt with. That window is a buffer: it belongs to the weights, and so it travels with
    them through checkpoints, EMA copies and process groups.

    Args:
        window_size: Tokens of a window along each axis.
        pretrained_window_size: Window that the weights were learnt with, along each axis.
        num_heads: Number of attention heads.
    """

    def __init__(self, window_size: tuple[int, ...], pretrained_window_size: tuple[int, ...], num_heads: int) -> None:
        super().__init__(nn.Linear(len(window_size), 512), nn.ReLU(inplace=True), nn.Linear(512, num_heads, bias=False))
        self.window_size = window_size
        self._initial_window_size = pretrained_window_size
        self.register_buffer('pretrained_window_size', torch.tensor(pretrained_window_size))

    def reset_pretrained_window_size(self) -> None:
        """Return to the window of the constructor, as new weights need it."""
        with torch.no_grad():
            self.pretrained_window_size.copy_(torch.tensor(self._initial_window_size))

    def forward(self) -> Tensor:
        """Bias of every relative position: (heads, prod(2 * window - 1)), between 0 and 16."""
        weight = self[0].weight
        # computed, not stored: a buffer would have to follow every window change and every deferred initialisation
        coords = log_spaced_coords(self.window_size, self.pretrained_window_size)
        # PyTorch's CPU kernels compute the last few elements of a tensor by another routine, one bit off; rows of
        # padding keep them out, so that the bias is the official one to the last bit although the sigmoid comes before
        # the gather
        rows = F.pad(coords.to(weight.dtype), (0, 0, 0, -len(coords) % 64))
        with torch.autocast(weight.device.type, enabled=False):
            bias = 16 * super().forward(rows).sigmoid()
        return bias[: len(coords)].T

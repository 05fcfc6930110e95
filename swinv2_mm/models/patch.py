"""Patch embedding and patch merging."""

import torch.fx
from torch import Tensor, nn

from ..ops.windows import pad_to_windows

torch.fx.wrap('pad_to_windows')  # depends on the size of the input, which a symbolic trace does not know


class PatchEmbed(nn.Module):
    """Cut the input into patches and embed each: a strided convolution and a norm.

    Args:
        in_channels: Channels of the input.
        dim: Channels of the embedding.
        patch_size: Pixels (and frames) of a patch along each axis.
    """

    def __init__(self, in_channels: int, dim: int, patch_size: tuple[int, ...]) -> None:
        super().__init__()
        conv = {2: nn.Conv2d, 3: nn.Conv3d}[len(patch_size)]
        self.patch_size = patch_size
        self.proj = conv(in_channels, dim, kernel_size=patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, *input size) -> (B, *S, dim); inputs that patches do not divide are padded with zeros at the end."""
        x = pad_to_windows(x, self.patch_size, first=2)
        return self.norm(self.proj(x).movedim(1, -1))


class PatchMerging(nn.Module):
    """Halve height and width, the last two axes, and double the channels; the norm comes last, unlike in Swin V1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, [T,] H, W, C) -> (B, [T,] ceil(H / 2), ceil(W / 2), 2C)."""
        x = pad_to_windows(x, (2, 2), first=-3)
        x = x.unflatten(-2, (-1, 2)).unflatten(-4, (-1, 2))  # (..., H / 2, 2, W / 2, 2, C)
        x = x.transpose(-4, -3).transpose(-3, -2)  # the official order of corners: height varies fastest
        return self.norm(self.reduction(x.flatten(-3)))

"""Patch embedding and patch merging."""

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.recording import is_compiling
from ..ops.windows import Size, pad_end, pad_to_windows

# depend on the size of the input, which a symbolic trace does not know
torch.fx.wrap('corners')
torch.fx.wrap('pad_to_patches')
torch.fx.wrap('pad_to_windows')


def pad_to_patches(x: Tensor, patch_size: Size, first: int) -> Tensor:
    """Append zeros to the axes of x from the axis `first` on, at least until the patches divide them.

    A compiled graph appends as many as can be needed, which makes it the same for all sizes; no patch begins in what is
    too much.
    """
    if is_compiling():
        return pad_end(x, [p - 1 for p in patch_size], first)
    return pad_to_windows(x, patch_size, first)


def corners(x: Tensor) -> Tensor:
    """Join each 2x2 tokens of (..., H, W, C) in the official order: (..., ceil(H / 2), ceil(W / 2), 4C)."""
    height, width = x.shape[-3:-1]
    x = pad_to_patches(x, (2, 2), first=-3)
    return torch.cat([x[..., i : height + i : 2, j : width + j : 2, :] for j in (0, 1) for i in (0, 1)], -1)


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
        pad = pad_to_patches if self._cuts_patches() else pad_to_windows
        x = pad(x, self.patch_size, first=2)
        return self.norm(self.proj(x).movedim(1, -1))

    def _cuts_patches(self) -> bool:
        """Whether the convolution takes one patch after the other, as it was built; users put stems in its place."""
        conv = self.proj
        if type(conv) not in (nn.Conv2d, nn.Conv3d):
            return False
        zeros, ones = (0,) * len(self.patch_size), (1,) * len(self.patch_size)
        return conv.kernel_size == conv.stride == self.patch_size and (conv.padding, conv.dilation) == (zeros, ones)


class PatchMerging(nn.Module):
    """Halve height and width, the last two axes, and double the channels; the norm comes last, unlike in Swin V1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, [T,] H, W, C) -> (B, [T,] ceil(H / 2), ceil(W / 2), 2C)."""
        return self.norm(self.reduction(corners(x)))

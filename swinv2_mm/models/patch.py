"""Patch embedding and patch merging."""

import torch
import torch.fx
from torch import Tensor, nn

from ..ops.tracing import is_compiling
from ..ops.windows import Size, pad_end, pad_to_windows

# leaf functions of torch.fx: they depend on the input size, which a symbolic trace does not know
torch.fx.wrap('concat_2x2')
torch.fx.wrap('pad_to_patches')
torch.fx.wrap('pad_to_windows')


def pad_to_patches(x: Tensor, patch_size: Size, start_dim: int) -> Tensor:
    """Zero-pad the axes of x from `start_dim` on, at their ends, at least to multiples of the patch size.

    A compiled graph always pads by patch_size - 1, so that one graph serves all sizes. The strided operator that
    follows ignores the excess, which no whole patch fits into.
    """
    if is_compiling():
        return pad_end(x, [p - 1 for p in patch_size], start_dim)
    return pad_to_windows(x, patch_size, start_dim)


def concat_2x2(x: Tensor) -> Tensor:
    """Concatenate each 2x2 tokens of (..., H, W, C) in the official order: (..., ceil(H / 2), ceil(W / 2), 4C)."""
    height, width = x.shape[-3:-1]
    x = pad_to_patches(x, (2, 2), start_dim=-3)
    return torch.cat([x[..., i : height + i : 2, j : width + j : 2, :] for j in (0, 1) for i in (0, 1)], -1)


class PatchEmbed(nn.Module):
    """Patch embedding: a strided convolution and a norm.

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
        """(B, C, *input size) -> (B, *S, dim); the input is zero-padded at the end to multiples of the patch size."""
        pad = pad_to_patches if self._is_patchify() else pad_to_windows
        x = pad(x, self.patch_size, start_dim=2)
        return self.norm(self.proj(x).movedim(1, -1))

    def _is_patchify(self) -> bool:
        """Whether `proj` is still the convolution over disjoint patches; users may replace it by a stem."""
        conv = self.proj
        if type(conv) not in (nn.Conv2d, nn.Conv3d):
            return False
        zeros, ones = (0,) * len(self.patch_size), (1,) * len(self.patch_size)
        return conv.kernel_size == conv.stride == self.patch_size and (conv.padding, conv.dilation) == (zeros, ones)


class PatchMerging(nn.Module):
    """Halve height and width, the last two axes, and double the channels. The norm is last, unlike in Swin V1."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.reduction = nn.Linear(4 * dim, 2 * dim, bias=False)
        self.norm = nn.LayerNorm(2 * dim)

    def forward(self, x: Tensor) -> Tensor:
        """(B, [T,] H, W, C) -> (B, [T,] ceil(H / 2), ceil(W / 2), 2C)."""
        return self.norm(self.reduction(concat_2x2(x)))

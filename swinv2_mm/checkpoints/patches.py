"""From a patch embedding to one of other input channels or another patch size, by the rules of timm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ..openmmlab import print_log
from .errors import CheckpointError

RGB = 3


def adapt_patches(kernel: Tensor, channels: int, patch: tuple[int, ...]) -> Tensor:
    """Adapt the kernel of a patch embedding to the channels and the patch size of a model.

    Args:
        kernel: (C, channels, [frames,] height, width).
        channels: Channels of the model's input.
        patch: Patch size of the model on the same axes as the kernel's.

    Returns:
        (C, channels, *patch) in the dtype of `kernel`.

    Raises:
        CheckpointError: The kernel takes neither as many channels nor RGB, or its patches have other frames.
    """
    *frames, height, width = kernel.shape[2:]
    if kernel.shape[1] not in (channels, RGB):
        raise CheckpointError(
            f'its patch embedding takes {kernel.shape[1]} channels and that of the model {channels}, but only one for '
            f'{RGB} (RGB) can be adapted: set in_channels={kernel.shape[1]}, or put a patch_embed.proj.weight of shape '
            f'{(len(kernel), channels, *patch)} into the checkpoint'
        )
    if frames != list(patch[:-2]):
        raise CheckpointError(
            f'its patches have {frames[0]} frames and those of the model {patch[0]}: set '
            f'patch_size={(*frames, *patch[-2:])}; only height and width can be resampled'
        )
    changes = []
    adapted = kernel.double()
    if kernel.shape[1] != channels:
        adapted = _adapt_channels(adapted, channels)
        changes.append(f'from {RGB} channels to {channels}')
    if (height, width) != patch[-2:]:
        adapted = _resample(adapted, patch[-2:])
        changes.append(f'from patches of {height}x{width} to {patch[-2]}x{patch[-1]}')
    if not changes:
        return kernel
    print_log(f'SwinV2: the patch embedding is adapted {" and ".join(changes)}', logger='current')
    return adapted.to(kernel.dtype)


def _adapt_channels(kernel: Tensor, channels: int) -> Tensor:
    """Sum the kernels of RGB for one channel; for others, repeat them in turn, and scale what they sum up to."""
    if channels == 1:
        return kernel.sum(1, keepdim=True)
    return kernel[:, torch.arange(channels) % RGB] * (RGB / channels)


def _resample(kernel: Tensor, patch: tuple[int, int]) -> Tensor:
    """Find the kernel that gives resized patches the embedding of the patches themselves (FlexiViT, arXiv 2212.08013).

    Exact where patches become larger; the closest in the sense of least squares where they become smaller.
    """
    old = kernel.shape[-2:]
    pixels = torch.eye(math.prod(old), dtype=kernel.dtype).view(-1, 1, *old)
    resized = F.interpolate(pixels, size=patch, mode='bicubic', antialias=True).flatten(1)  # one row for each old pixel
    return (kernel.flatten(-2) @ torch.linalg.pinv(resized).T.to(kernel.device)).unflatten(-1, patch)

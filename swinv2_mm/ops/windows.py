"""Geometry of shifted windows that all backends share: pure functions, for any number of axes.

Shapes: `B` batch, `*S` spatial shape of the feature map, `*W` window size (as many axes as `*S`), `nW` windows of a
feature map, `N` tokens of a window, `...` any further axes.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .tracing import is_compiling

Size = tuple[int, ...]
PADDING = -1  # region id of tokens that pad the feature map
SHIFT_MASK = -100.0  # added to logits of tokens that only the cyclic shift made neighbours, as in the official code


def fit_window(spatial_shape: Size, window_size: Size, shift_size: Size) -> tuple[Size, Size]:
    """Clip the window to the feature map; an axis that fits into one window is not shifted.

    Returns:
        Window size and shift size in effect.
    """
    window = tuple(min(s, w) for s, w in zip(spatial_shape, window_size, strict=True))
    shift = tuple(0 if s <= w else d for s, w, d in zip(spatial_shape, window_size, shift_size, strict=True))
    return window, shift


def pad_to_windows(x: Tensor, window_size: Size, start_dim: int = 1) -> Tensor:
    """Zero-pad the axes of x from `start_dim` on, at their ends, to multiples of the window size."""
    axes = range(start_dim, start_dim + len(window_size))
    amounts = [-x.shape[axis] % w for axis, w in zip(axes, window_size, strict=True)]
    # torch.compile would turn the condition into a guard and compile two graphs: there, pad even if by 0
    return pad_end(x, amounts, start_dim) if is_compiling() or any(amounts) else x


def pad_end(x: Tensor, amounts: Sequence[int], start_dim: int) -> Tensor:
    """Append `amounts[i]` zeros to axis `start_dim + i` of x."""
    trailing = x.dim() - start_dim % x.dim() - len(amounts)
    return F.pad(x, [0, 0] * trailing + [p for amount in reversed(amounts) for p in (0, amount)])


def partition(x: Tensor, window_size: Size) -> Tensor:
    """Partition (B, *S, ...) into windows: (B * nW, N, ...). The window size must divide `*S`."""
    axes = len(window_size)
    counts = [s // w for s, w in zip(x.shape[1 : 1 + axes], window_size, strict=True)]
    interleaved = [n for pair in zip(counts, window_size, strict=True) for n in pair]
    rest = x.shape[1 + axes :]
    x = x.reshape(-1, *interleaved, *rest)  # (B, n1, W1, n2, W2, ..., rest)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, math.prod(window_size), *rest)


def reverse(windows: Tensor, window_size: Size, spatial_shape: Size) -> Tensor:
    """Merge windows (B * nW, N, ...) into (B, *S, ...); the inverse of `partition`."""
    axes = len(window_size)
    counts = [s // w for s, w in zip(spatial_shape, window_size, strict=True)]
    rest = windows.shape[2:]
    x = windows.reshape(-1, *counts, *window_size, *rest)  # (B, n1, n2, ..., W1, W2, ..., rest)
    interleaved = [a for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for a in pair]
    order = [0, *interleaved, *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, *spatial_shape, *rest)


def relative_position_index(window_size: Size, device: torch.device | None = None) -> Tensor:
    """Index into the bias table for each query and key of a window, by query - key: (N, N) int64.

    The table has 2 * W - 1 offsets per axis, flattened with the last axis varying fastest.
    """
    coords = torch.stack(
        torch.meshgrid(*(torch.arange(w, device=device) for w in window_size), indexing='ij'), -1
    ).flatten(0, -2)
    offsets = coords[:, None] - coords[None]  # (N, N, axes)
    index = torch.zeros_like(offsets[..., 0])
    for axis, w in enumerate(window_size):
        index = index * (2 * w - 1) + offsets[..., axis] + (w - 1)
    return index


def crop_bias_table(bias_table: Tensor, window_size: Size, cropped_size: Size) -> Tensor:
    """Crop a bias table to the offsets of a smaller window: (heads, prod(2W-1)) -> (heads, prod(2C-1))."""
    if window_size == cropped_size:
        return bias_table
    grid = bias_table.unflatten(1, [2 * w - 1 for w in window_size])
    for axis, (w, c) in enumerate(zip(window_size, cropped_size, strict=True), start=1):
        grid = grid.narrow(axis, w - c, 2 * c - 1)
    return grid.flatten(1)


def crop_bias_table_backward(grad: Tensor, window_size: Size, cropped_size: Size) -> Tensor:
    """Gradient of `crop_bias_table`: (heads, prod(2C-1)) -> (heads, prod(2W-1)), 0 for the offsets cropped away."""
    grid = grad.unflatten(1, [2 * c - 1 for c in cropped_size])
    cut = [w - c for w, c in zip(window_size, cropped_size, strict=True)]
    return F.pad(grid, [end for c in reversed(cut) for end in (c, c)]).flatten(1)


def token_regions(
    spatial_shape: Size, padded_shape: Size, window_size: Size, shift_size: Size, device: torch.device | None = None
) -> Tensor | None:
    """Region id of each token of the padded and cyclically shifted feature map, for `attention_mask`.

    Tokens of a window have the same id if they were neighbours before the shift. `PADDING` marks padding.

    Returns:
        (nW, N) int64, or None if the feature map is neither padded nor shifted, so that no mask is needed.
    """
    if spatial_shape == padded_shape and not any(shift_size):
        return None
    region, padding = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(False, device=device)
    for axis, (size, padded, w, d) in enumerate(zip(spatial_shape, padded_shape, window_size, shift_size, strict=True)):
        coords = torch.arange(padded, device=device)  # after the shift
        part = (coords >= padded - w).long() + (coords >= padded - d).long() if d else torch.zeros_like(coords)
        shape = [-1 if other == axis else 1 for other in range(len(spatial_shape))]
        region = 3 * region + part.view(shape)
        padding = padding | ((coords + d) % padded >= size).view(shape)
    return partition(torch.where(padding, PADDING, region)[None], window_size)


def attention_mask(regions: Tensor) -> Tensor:
    """Additive mask of windows with the region ids (nW, N): (nW, N, N) of 0, -100 and -inf.

    It is -100 between tokens of different regions, as in the official code, and -inf for keys that are padding. Every
    window has at least one token that is not padding, so no row is -inf throughout.
    """
    mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, SHIFT_MASK)
    return mask.masked_fill(regions[:, None] == PADDING, -math.inf)

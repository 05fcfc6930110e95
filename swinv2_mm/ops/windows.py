"""Geometry of shifted windows for any number of axes, as pure functions.

Shapes: `B` batch, `*S` map size, `*W` window size (as many axes as `*S`), `nW` windows of a map, `N` tokens of a
window, `...` anything that travels with a token.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, ...]


def fit_window(map_size: Size, window_size: Size, shift_size: Size) -> tuple[Size, Size]:
    """Window and shift in effect: an axis that fits into one window takes the map's size as window, and no shift."""
    window = tuple(min(s, w) for s, w in zip(map_size, window_size, strict=True))
    shift = tuple(0 if s <= w else d for s, w, d in zip(map_size, window_size, shift_size, strict=True))
    return window, shift


def pad_to_windows(x: Tensor, window_size: Size) -> Tensor:
    """Append zeros to each axis of (B, *S, ...) until the window divides it."""
    axes = len(window_size)
    end = [-s % w for s, w in zip(x.shape[1 : 1 + axes], window_size, strict=True)]
    if not any(end):
        return x
    trailing = x.dim() - 1 - axes
    return F.pad(x, [0, 0] * trailing + [p for e in reversed(end) for p in (0, e)])


def partition(x: Tensor, window_size: Size) -> Tensor:
    """Cut (B, *S, ...) into windows: (B * nW, N, ...), where the window divides the map."""
    axes = len(window_size)
    counts = [s // w for s, w in zip(x.shape[1 : 1 + axes], window_size, strict=True)]
    interleaved = [n for pair in zip(counts, window_size, strict=True) for n in pair]
    rest = x.shape[1 + axes :]
    x = x.reshape(-1, *interleaved, *rest)  # (B, n1, W1, n2, W2, ..., rest)
    order = [0, *range(1, 2 * axes, 2), *range(2, 2 * axes + 1, 2), *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, math.prod(window_size), *rest)


def reverse(windows: Tensor, window_size: Size, map_size: Size) -> Tensor:
    """Put (B * nW, N, ...) back together as (B, *S, ...); the inverse of `partition`."""
    axes = len(window_size)
    counts = [s // w for s, w in zip(map_size, window_size, strict=True)]
    rest = windows.shape[2:]
    x = windows.reshape(-1, *counts, *window_size, *rest)  # (B, n1, n2, ..., W1, W2, ..., rest)
    interleaved = [a for pair in zip(range(1, axes + 1), range(axes + 1, 2 * axes + 1), strict=True) for a in pair]
    order = [0, *interleaved, *range(2 * axes + 1, x.dim())]
    return x.permute(order).reshape(-1, *map_size, *rest)


def relative_position_index(window_size: Size, device: torch.device | None = None) -> Tensor:
    """Row of the (2W-1)-per-axis bias table for each query and key of a window: (N, N) int64, d = query - key."""
    coords = torch.stack(
        torch.meshgrid(*(torch.arange(w, device=device) for w in window_size), indexing='ij'), -1
    ).flatten(0, -2)
    offsets = coords[:, None] - coords[None]  # (N, N, axes)
    index = torch.zeros_like(offsets[..., 0])
    for axis, w in enumerate(window_size):
        index = index * (2 * w - 1) + offsets[..., axis] + (w - 1)
    return index


def crop_bias_table(bias_table: Tensor, window_size: Size, cropped_size: Size) -> Tensor:
    """Keep of a (heads, prod(2W-1)) table the offsets that occur in a smaller window: (heads, prod(2C-1))."""
    if window_size == cropped_size:
        return bias_table
    grid = bias_table.unflatten(1, [2 * w - 1 for w in window_size])
    for axis, (w, c) in enumerate(zip(window_size, cropped_size, strict=True), start=1):
        grid = grid.narrow(axis, w - c, 2 * c - 1)
    return grid.flatten(1)


PADDING = -1  # region of tokens that are no part of the map


def token_regions(
    map_size: Size, padded_size: Size, window_size: Size, shift_size: Size, device: torch.device | None = None
) -> Tensor | None:
    """Number the parts of the padded and rolled map that lay together before: (nW, N) int64, or None if all did."""
    if map_size == padded_size and not any(shift_size):
        return None
    region = torch.full((1, *padded_size), PADDING, dtype=torch.int64, device=device)
    region[(0, *(slice(s) for s in map_size))] = 0
    region = region.roll([-d for d in shift_size], tuple(range(1, len(map_size) + 1)))
    cuts = [
        (slice(0, -w), slice(-w, -d), slice(-d, None)) if d else (slice(None),)
        for w, d in zip(window_size, shift_size, strict=True)
    ]
    for number, box in enumerate(itertools.product(*cuts)):
        part = region[(0, *box)]
        part[part != PADDING] = number
    return partition(region, window_size)


def attention_mask(regions: Tensor) -> Tensor:
    """What to add to the logits of windows whose tokens lie in `regions` (nW, N): (nW, N, N) of 0, -100 and -inf.

    Tokens that the roll brought together from opposite ends of the map get -100, as in the official code, and keys
    that are padding get -inf. Every window holds at least one token of the map, so no row is -inf throughout.
    """
    mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)
    return mask.masked_fill(regions[:, None] == PADDING, -math.inf)

"""Geometry of shifted windows for any number of axes, as pure functions.

Shapes: `B` batch, `*S` map size, `*W` window size (as many axes as `*S`), `nW` windows of a map, `N` tokens of a
window, `...` anything that travels with a token.
"""

import functools
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .recording import is_compiling

Size = tuple[int, ...]


def fit_window(map_size: Size, window_size: Size, shift_size: Size) -> tuple[Size, Size]:
    """Window and shift in effect: an axis that fits into one window takes the map's size as window, and no shift."""
    window = tuple(min(s, w) for s, w in zip(map_size, window_size, strict=True))
    shift = tuple(0 if s <= w else d for s, w, d in zip(map_size, window_size, shift_size, strict=True))
    return window, shift


def pad_to_windows(x: Tensor, window_size: Size, first: int = 1) -> Tensor:
    """Append zeros to the axes of x, as many as the window has from the axis `first` on, until it divides them."""
    axes = range(first, first + len(window_size))
    end = [-x.shape[axis] % w for axis, w in zip(axes, window_size, strict=True)]
    # a compiled graph pads by nothing instead: to ask would make one graph for sizes that divide and one for others
    return pad_end(x, end, first) if is_compiling() or any(end) else x


def pad_end(x: Tensor, numbers: Sequence[int], first: int) -> Tensor:
    """Append so many zeros to each axis of x from the axis `first` on."""
    trailing = x.dim() - first % x.dim() - len(numbers)
    return F.pad(x, [0, 0] * trailing + [p for number in reversed(numbers) for p in (0, number)])


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


def crop_bias_table_backward(grad: Tensor, window_size: Size, cropped_size: Size) -> Tensor:
    """Gradient of `crop_bias_table`: (heads, prod(2C-1)) -> (heads, prod(2W-1)), 0 where the table was cut off."""
    grid = grad.unflatten(1, [2 * c - 1 for c in cropped_size])
    cut = [w - c for w, c in zip(window_size, cropped_size, strict=True)]
    return F.pad(grid, [end for c in reversed(cut) for end in (c, c)]).flatten(1)


PADDING = -1  # region of tokens that are no part of the map
CROSSING = -100.0  # what the official code adds to logits between tokens that only the roll brought together


def token_regions(
    map_size: Size, padded_size: Size, window_size: Size, shift_size: Size, device: torch.device | None = None
) -> Tensor | None:
    """Number the parts of the padded and rolled map that lay together before: (nW, N) int64, or None if all did."""
    if map_size == padded_size and not any(shift_size):
        return None
    region, padding = torch.zeros((), dtype=torch.int64, device=device), torch.tensor(False, device=device)
    for axis, (size, padded, w, d) in enumerate(zip(map_size, padded_size, window_size, shift_size, strict=True)):
        place = torch.arange(padded, device=device)
        part = (place >= padded - w).long() + (place >= padded - d).long() if d else torch.zeros_like(place)
        shape = _at(axis, len(map_size), place.shape)
        region = 3 * region + part.view(shape)
        padding = padding | ((place + d) % padded >= size).view(shape)
    return partition(torch.where(padding, PADDING, region)[None], window_size)


def attention_mask(regions: Tensor) -> Tensor:
    """What to add to the logits of windows whose tokens lie in `regions` (nW, N): (nW, N, N) of 0, -100 and -inf.

    Tokens that the roll brought together from opposite ends of the map get -100, as in the official code, and keys
    that are padding get -inf. Every window holds at least one token of the map, so no row is -inf throughout.
    """
    mask = torch.where(regions[:, None] == regions[:, :, None], 0.0, CROSSING)
    return mask.masked_fill(regions[:, None] == PADDING, -math.inf)


class WindowGroup(NamedTuple):
    """Windows of a map that hold tokens at the same places, and so have bias and mask in common.

    Keys are in the order of the map, queries in the reverse one, as in `dense_bias`.
    """

    queries: Tensor  # (n, N): where the queries of its n windows of N tokens lie in the flattened map
    qkv: Tensor  # (n, 3 * N): where their queries, keys and values do, if those of each token follow each other
    rows: Tensor | None  # (N,): where the queries lie in the bias of a whole window; None if the windows are whole
    columns: Tensor | None  # (N,): where the keys do
    mask: Tensor | None  # (N, N): what to add to the logits, 0 or -100; None if it is 0 throughout


class WindowGroups(NamedTuple):
    """All windows of a map; each of its tokens is in one window of one group."""

    groups: tuple[WindowGroup, ...]
    queries: Tensor  # (prod(S),): where each token of the map is in `queries` of all groups, one after another
    qkv: Tensor  # (3 * prod(S),): the same for `qkv`


class AxisGroup(NamedTuple):
    """The same along one axis."""

    tokens: list[list[int]]  # of each window
    positions: list[int]
    wrapped: list[bool]  # whether the roll carried the token from one end of the axis to the other


# A training at many sizes meets them again and again. One entry takes 64 bytes a token and 4 N^2 for the masks; a
# backbone has two in each stage.
@functools.lru_cache(maxsize=64)
def window_groups(
    map_size: Size, window_size: Size, shift_size: Size, device: torch.device | None = None
) -> WindowGroups:
    """Sort the shifted windows of a map by the tokens that they hold; the map need not be padded for it.

    Tokens that padding would add are in no group: nothing attends to them. So the windows at the end of an axis are
    smaller where the window does not divide the map, and all windows of a group share one mask: in two dimensions there
    are those within the map, which need none, those at each of two edges, and the one in the corner.

    Args:
        map_size: Tokens of the map along each axis.
        window_size: Tokens of a window, at most those of the map.
        shift_size: Shift of the windows.
        device: Where the tensors are to be.
    """
    axes = [_axis_groups(*sizes) for sizes in zip(map_size, window_size, shift_size, strict=True)]
    with torch.inference_mode(False):  # what is made here may be used in training too
        groups = tuple(_combine(parts, map_size, window_size, device) for parts in itertools.product(*axes))
        # the inverse of a permutation sorts it
        places = [torch.cat([getattr(g, role).flatten() for g in groups]).argsort() for role in ('queries', 'qkv')]
        return WindowGroups(groups, *places)


def count_pairs(map_size: Size, window_size: Size, shift_size: Size) -> int:
    """Pairs of a query and a key in all windows of a map, without padding."""
    axes = [_axis_groups(*sizes) for sizes in zip(map_size, window_size, shift_size, strict=True)]
    return math.prod(sum(len(group.tokens) * len(group.positions) ** 2 for group in groups) for groups in axes)


def _axis_groups(size: int, window: int, shift: int) -> list[AxisGroup]:
    padded = size + -size % window
    groups: dict[tuple, list[list[int]]] = {}
    for start in range(0, padded, window):
        coords = [(start + position + shift) % padded for position in range(window)]
        positions = tuple(p for p, c in enumerate(coords) if c < size)
        tokens = [coords[p] for p in positions]
        groups.setdefault((positions, tuple(t < start for t in tokens)), []).append(tokens)
    return [AxisGroup(tokens, *map(list, key)) for key, tokens in groups.items()]


def _combine(parts: tuple[AxisGroup, ...], map_size: Size, window_size: Size, device: torch.device) -> WindowGroup:
    axes = len(parts)
    tokens = torch.zeros((1,) * (2 * axes), dtype=torch.int64)
    positions, crossing = torch.zeros((1,) * axes, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    wrapped = torch.meshgrid(*(torch.tensor(part.wrapped) for part in parts), indexing='ij')
    for axis, part in enumerate(parts):
        along = torch.tensor(part.tokens)  # (windows, tokens of a window)
        tokens = tokens * map_size[axis] + along.view(_at(axis, axes, along.shape))
        place = torch.tensor(part.positions)
        positions = positions * window_size[axis] + place.view(_at(axis, axes, place.shape))
        ends = wrapped[axis].flatten()
        crossing = crossing | (ends[:, None] != ends)
    mask = torch.where(crossing, CROSSING, 0.0)
    tokens, positions = tokens.reshape(-1, positions.numel()).to(device), positions.flatten().to(device)
    last = math.prod(window_size) - 1
    whole = len(positions) == last + 1
    return WindowGroup(
        tokens.flip(1),
        torch.cat([3 * tokens.flip(1), 3 * tokens + 1, 3 * tokens + 2], 1),
        None if whole else last - positions.flip(0),
        None if whole else positions,
        mask.flip(0).to(device) if any(len(set(part.wrapped)) > 1 for part in parts) else None,
    )


def _at(axis: int, axes: int, sizes: torch.Size) -> list[int]:
    """Shape of a tensor whose k-th axis takes the place `axis` of the k-th `axes` axes of another one."""
    return [size if place == axis else 1 for size in sizes for place in range(axes)]


def dense_bias(bias_table: Tensor, window_size: Size) -> Tensor:
    """Bias of each query and key of a whole window, from the table (heads, prod(2W-1)): (heads, N, N).

    The queries are in reverse order. Along each axis, the entry is then at the sum of both places instead of at their
    difference, and every row of the result is a run of the table. This needs no index, and writes the result once.
    """
    first, *others = window_size
    table = bias_table.unflatten(1, [2 * w - 1 for w in window_size])
    table = table.flip(*range(1, table.dim()))  # by key - query
    for axis, w in enumerate(others, start=2):
        table = table.unfold(axis, w, 1)  # in the end (heads, 2 * first - 1, *query, *key) without the first axis
    table = table.movedim(1, len(others) + 1).contiguous()  # small; a row is one run of memory now
    table = table.unfold(len(others) + 1, first, 1).movedim((len(others) + 1, -1), (1, len(others) + 2))
    n = math.prod(window_size)
    return table.reshape(-1, n, n)


def dense_bias_backward(grad: Tensor, window_size: Size) -> Tensor:
    """Sum a gradient (heads, N, N), queries in reverse order, over the entries that share one of the table.

    Axis by axis, without a scatter to colliding addresses: fast and in the same order on every run.
    """
    grad = grad.unflatten(2, window_size).unflatten(1, window_size)
    for axis in range(len(window_size), 0, -1):
        *sizes, length = grad.shape
        sizes[axis] += length - 1
        grad = torch.ops.aten.unfold_backward(grad, sizes, axis, length, 1)
    return grad.flip(*range(1, grad.dim())).flatten(1)

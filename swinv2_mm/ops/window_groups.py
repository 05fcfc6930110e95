"""Shifted windows sorted into groups of equal shape and mask, for backends that gather windows by index.

Shapes: `*S` spatial shape of the feature map, `*W` window size, `N` tokens of a window, `n` windows of a group.
"""

import functools
import itertools
import math
from typing import NamedTuple

import torch
from torch import Tensor

from .windows import SHIFT_MASK, Size


class WindowGroup(NamedTuple):
    """Windows whose tokens have the same positions in the window, and which therefore share bias and mask.

    Keys are in the order of the feature map, queries in reverse order, as in `dense_bias`.
    """

    q_index: Tensor  # (n, N): index of each query in the flattened feature map, prod(S) tokens
    qkv_index: Tensor  # (n, 3 * N): index of queries, keys and values in flattened (*S, 3)
    bias_rows: Tensor | None  # (N,): rows of these queries in the bias of a full window; None for full windows
    bias_cols: Tensor | None  # (N,): columns of these keys
    mask: Tensor | None  # (N, N): additive mask of 0 and -100; None if it is 0 throughout


class WindowGroups(NamedTuple):
    """All windows of a feature map; each token is in one window of one group."""

    groups: tuple[WindowGroup, ...]
    q_restore: Tensor  # (prod(S),): position of each token in the concatenated `q_index` of all groups
    qkv_restore: Tensor  # (3 * prod(S),): the same for `qkv_index`


class AxisGroup(NamedTuple):
    """Windows along one axis whose tokens have the same positions in the window."""

    coords: list[list[int]]  # of the tokens of each window, in the feature map
    positions: list[int]  # of the tokens in the window
    wrapped: list[bool]  # whether the cyclic shift moved the token from one end of the axis to the other


# Multi-scale training meets the same sizes again and again. One entry takes 64 bytes per token and 4 * N^2 for the
# masks; a backbone has two per stage.
@functools.lru_cache(maxsize=64)
def window_groups(
    spatial_shape: Size, window_size: Size, shift_size: Size, device: torch.device | None = None
) -> WindowGroups:
    """Sort the shifted windows of a feature map into groups. The feature map is not padded.

    Where the window size does not divide an axis, the windows at its end are smaller, instead of filled with padding
    that would be masked. All windows of a group share one mask. In two dimensions there are up to four groups: inside
    the feature map (no mask), at either of two edges, and in the corner.

    Args:
        spatial_shape: Tokens of the feature map along each axis.
        window_size: Tokens of a window along each axis, at most those of the feature map.
        shift_size: Shift of the windows along each axis.
        device: Device of the tensors.
    """
    axes = [_axis_groups(*sizes) for sizes in zip(spatial_shape, window_size, shift_size, strict=True)]
    # the cached tensors may be made in inference mode first and used in training later
    with torch.inference_mode(False):
        groups = tuple(_combine_axes(parts, spatial_shape, window_size, device) for parts in itertools.product(*axes))
        # argsort inverts a permutation
        q_restore = torch.cat([group.q_index.flatten() for group in groups]).argsort()
        qkv_restore = torch.cat([group.qkv_index.flatten() for group in groups]).argsort()
        return WindowGroups(groups, q_restore, qkv_restore)


def count_pairs(spatial_shape: Size, window_size: Size, shift_size: Size) -> int:
    """Number of query-key pairs in all windows of a feature map, without padding."""
    axes = [_axis_groups(*sizes) for sizes in zip(spatial_shape, window_size, shift_size, strict=True)]
    return math.prod(sum(len(group.coords) * len(group.positions) ** 2 for group in groups) for groups in axes)


def _axis_groups(size: int, window: int, shift: int) -> list[AxisGroup]:
    """Groups of the windows along one axis of `size` tokens."""
    padded = size + -size % window
    groups: dict[tuple, list[list[int]]] = {}  # (positions, wrapped) -> coords
    for start in range(0, padded, window):
        coords = [(start + position + shift) % padded for position in range(window)]
        positions = tuple(p for p, c in enumerate(coords) if c < size)
        coords = [coords[p] for p in positions]
        groups.setdefault((positions, tuple(c < start for c in coords)), []).append(coords)
    return [AxisGroup(coords, *map(list, key)) for key, coords in groups.items()]


def _combine_axes(
    parts: tuple[AxisGroup, ...], spatial_shape: Size, window_size: Size, device: torch.device
) -> WindowGroup:
    """Group of the windows that belong to `parts[i]` along axis i."""
    axes = len(parts)
    index = torch.zeros((1,) * (2 * axes), dtype=torch.int64)  # (windows along each axis, tokens along each axis)
    positions, is_masked = torch.zeros((1,) * axes, dtype=torch.int64), torch.zeros(1, 1, dtype=torch.bool)
    wrapped = torch.meshgrid(*(torch.tensor(part.wrapped) for part in parts), indexing='ij')
    for axis, part in enumerate(parts):
        index = index * spatial_shape[axis] + _broadcastable(torch.tensor(part.coords), axis, axes)
        positions = positions * window_size[axis] + _broadcastable(torch.tensor(part.positions), axis, axes)
        is_wrapped = wrapped[axis].flatten()
        is_masked = is_masked | (is_wrapped[:, None] != is_wrapped)
    mask = torch.where(is_masked, SHIFT_MASK, 0.0)
    index, positions = index.reshape(-1, positions.numel()).to(device), positions.flatten().to(device)
    last = math.prod(window_size) - 1
    is_full = len(positions) == last + 1
    has_mask = any(len(set(part.wrapped)) > 1 for part in parts)  # not is_masked.any(): fake tensors have no values
    return WindowGroup(
        q_index=index.flip(1),
        qkv_index=torch.cat([3 * index.flip(1), 3 * index + 1, 3 * index + 2], 1),
        bias_rows=None if is_full else last - positions.flip(0),
        bias_cols=None if is_full else positions,
        mask=mask.flip(0).to(device) if has_mask else None,
    )


def _broadcastable(x: Tensor, axis: int, axes: int) -> Tensor:
    """View each axis of x as `axes` axes of size 1, except for its own size at `axis`."""
    return x.view([size if other == axis else 1 for size in x.shape for other in range(axes)])


def dense_bias(bias_table: Tensor, window_size: Size) -> Tensor:
    """Bias of each query and key of a full window, queries in reverse order: (heads, prod(2W-1)) -> (heads, N, N).

    With the queries reversed, the index into the table along each axis is the sum of both positions instead of their
    difference, so that each row of the result is a contiguous slice of the table. `unfold` then replaces an index of
    N * N entries, and the result is written once.
    """
    first, *others = window_size
    table = bias_table.unflatten(1, [2 * w - 1 for w in window_size])
    table = table.flip(*range(1, table.dim()))  # by key - query
    for axis, w in enumerate(others, start=2):
        table = table.unfold(axis, w, 1)  # in the end (heads, 2 * first - 1, *query, *key) without the first axis
    table = table.movedim(1, len(others) + 1).contiguous()  # small; makes the rows of the result contiguous
    table = table.unfold(len(others) + 1, first, 1).movedim((len(others) + 1, -1), (1, len(others) + 2))
    n = math.prod(window_size)
    return table.reshape(-1, n, n)


def dense_bias_backward(grad: Tensor, window_size: Size) -> Tensor:
    """Gradient of `dense_bias`: (heads, N, N) -> (heads, prod(2W-1)).

    Summed axis by axis, without atomic adds, which are slow and make the result differ from run to run.
    """
    grad = grad.unflatten(2, window_size).unflatten(1, window_size)
    for axis in range(len(window_size), 0, -1):
        *sizes, length = grad.shape
        sizes[axis] += length - 1
        grad = torch.ops.aten.unfold_backward(grad, sizes, axis, length, 1)
    return grad.flip(*range(1, grad.dim())).flatten(1)

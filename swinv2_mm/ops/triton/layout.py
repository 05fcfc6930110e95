"""Where the tokens of windows lie, in the order in which the Triton kernels take them, and where their bias lies.

A window is cut into boxes of equally many places, for example 8x8, so that a tile of the kernels is one or two boxes.
The places of all boxes, one after another, are its slots; those outside of the window hold no token.

The bias is kept once per head such that a query's logits with a run of keys along the last axis are a run of memory:

    bias[c, x, *offsets, r]: query at x and key at c * RUN + r along the last axis, offsets of key - query along others

So the place of a query and a key is the sum of a number of the query and one of the key, and tiles are read by vectors.
"""

import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..windows import PADDING, Size, pad_to_windows, partition, token_regions
from .tiles import next_power_of_2


def _on_cpu(function: Callable) -> Callable:
    """Make tables on the CPU whatever the default device is; they are moved at the end."""

    @functools.wraps(function)
    def run(*args):
        with torch.device('cpu'):
            return function(*args)

    return run


class Box(NamedTuple):
    """How a window is cut into boxes."""

    size: Size
    counts: Size  # boxes along each axis
    run: int  # keys along the last axis whose biases are a run of memory


class TokenTables(NamedTuple):
    """Tables of the windows of one feature map."""

    rows: Tensor  # (windows, slots) int32: the token in a sample's flattened map, -1 for none
    regions: Tensor  # (windows, slots) int32: of tokens that lay together before the roll, -1 for none
    inner: Tensor  # (n,) int32: windows without a mask
    edge: Tensor  # (m,) int32: all others


class BiasTables(NamedTuple):
    """Tables of the bias of a window."""

    entries: Tensor  # (places,) int32: for each place of the bias its entry of the bias table, -1 for none
    q_places: Tensor  # (slots,) int32
    k_places: Tensor  # (slots,) int32: with that of the query, the place of a query and a key


@functools.cache
def tile_window(window_size: Size, tokens: int) -> Box:
    """Cut a window into boxes of so many places, a power of 2 from 4 on, with the fewest outside of the window."""
    sides = [1 << i for i in range(tokens.bit_length())]
    boxes = [(a, b, tokens // a // b) for a in sides for b in sides if a * b * 4 <= tokens]

    def counts(box: Size) -> Size:
        return tuple(-(-w // side) for w, side in zip(window_size, box, strict=True))

    # of equal ones those with the longer runs, then the most compact, whose last axis is the longest
    box = min(boxes, key=lambda box: (math.prod(counts(box)), -min(box[-1], 8), sum(box), -box[-1]))
    return Box(box, counts(box), min(box[-1], 8))


def slot_positions(window_size: Size, box: Box, slots: int) -> Tensor:
    """Position of each slot along the three axes of a window, (slots, 3); beyond the window where there is no token."""
    covered = [n * side for n, side in zip(box.counts, box.size, strict=True)]
    grid = torch.stack(torch.meshgrid(*(torch.arange(n) for n in covered), indexing='ij'), -1)
    positions = partition(grid[None], box.size).flatten(0, 1)
    return F.pad(positions, (0, 0, 0, slots - len(positions)), value=max(*covered, *window_size))


@functools.lru_cache(maxsize=256)
@_on_cpu
def token_tables(
    map_size: Size, window_size: Size, shift_size: Size, box: Box | None, slots: int, device: torch.device
) -> TokenTables:
    """Tables of a feature map of three axes, 8 bytes per slot of a window; without a box, tokens are in their order."""
    axes = (1, 2, 3)
    tokens = 1 + torch.arange(math.prod(map_size)).view(1, *map_size)  # 0 is padding
    tokens = pad_to_windows(tokens, window_size)
    padded_size = tuple(tokens.shape[1:])
    rows = partition(tokens.roll([-d for d in shift_size], axes), window_size) - 1
    regions = token_regions(map_size, padded_size, window_size, shift_size)
    if regions is None:
        regions = torch.zeros_like(rows)
    in_slots = torch.arange(slots).clamp(max=rows.shape[1]) if box is None else _in_slots(window_size, box, slots)
    rows, regions = (F.pad(t, (0, 1), value=PADDING)[:, in_slots].int() for t in (rows, regions))
    has_mask = (regions != regions.amax(1, keepdim=True)).logical_and(in_slots < math.prod(window_size)).any(1)
    inner, edge = has_mask.logical_not().nonzero()[:, 0].int(), has_mask.nonzero()[:, 0].int()
    with torch.inference_mode(False):  # what is made here may be used in training too
        return TokenTables(*(t.to(device, copy=True) for t in (rows, regions, inner, edge)))


def _in_slots(window_size: Size, box: Box, slots: int) -> Tensor:
    """Token of each slot in the order of the window, or the number of tokens for none: (slots,)."""
    positions, sizes = slot_positions(window_size, box, slots), torch.tensor(window_size)
    strides = torch.tensor([math.prod(window_size[axis + 1 :]) for axis in range(3)])
    return torch.where((positions < sizes).all(1), (positions * strides).sum(1), math.prod(window_size))


@functools.lru_cache(maxsize=64)
@_on_cpu
def bias_tables(window_size: Size, table_size: Size, box: Box, slots: int, device: torch.device) -> BiasTables:
    """Tables of the bias of windows of three axes, for a bias table that may be of a larger window."""
    w0, w1, w2 = window_size
    s0, s1 = 2 * w0 - 1, 2 * w1 - 1
    columns, run = -(-w2 // box.run), box.run
    positions = slot_positions(window_size, box, slots)
    is_token = (positions < torch.tensor(window_size)).all(1)
    p0, p1, p2 = positions.unbind(1)
    q_places = ((p2 * s0 + w0 - 1 - p0) * s1 + w1 - 1 - p1) * run
    k_places = ((p2 // run * w2 * s0 + p0) * s1 + p1) * run + p2 % run
    # slots without a key get a column of their own if their position on the last axis does not exclude them
    is_key = (p0 < w0) & (p1 < w1) & (p2 < columns * run)
    has_empty = not is_key[: math.prod(box.counts) * math.prod(box.size)].all()
    empty = has_empty * columns * w2 * s0 * s1 * run + torch.arange(slots) % run
    k_places = torch.where(is_key, k_places, empty)
    entries = _bias_entries(window_size, table_size, columns, run)
    if has_empty:
        entries = F.pad(entries, (0, w2 * s0 * s1 * run), value=-1)
    tables = entries.int(), torch.where(is_token, q_places, 0).int(), k_places.int()
    with torch.inference_mode(False):
        return BiasTables(*(t.to(device, copy=True) for t in tables))


def _bias_entries(window_size: Size, table_size: Size, columns: int, run: int) -> Tensor:
    w0, w1, w2 = window_size
    t0, t1, t2 = table_size
    c, x, d0, d1, r = torch.meshgrid(
        torch.arange(columns), torch.arange(w2), torch.arange(1 - w0, w0), torch.arange(1 - w1, w1), torch.arange(run),
        indexing='ij',
    )  # fmt: skip
    key = c * run + r
    entries = ((t0 - 1 - d0) * (2 * t1 - 1) + t1 - 1 - d1) * (2 * t2 - 1) + t2 - 1 + x - key
    return torch.where(key < w2, entries, -1).flatten()


@functools.lru_cache(maxsize=64)
@_on_cpu
def dense_entries(window_size: Size, table_size: Size, block: int, device: torch.device) -> Tensor:
    """Entry of the bias table for each query and key of a window of one tile, -1 for none: (block * block,) int32."""
    positions = torch.cartesian_prod(*(torch.arange(w) for w in window_size)).view(-1, 3)
    strides = torch.tensor([(2 * table_size[1] - 1) * (2 * table_size[2] - 1), 2 * table_size[2] - 1, 1])
    offsets = positions[:, None] - positions[None] + torch.tensor(table_size) - 1
    entries = (offsets * strides).sum(-1)
    empty = block - len(positions)
    # queries that are no tokens see the keys that are: no row is without a key
    entries = torch.cat([entries, entries[:1].expand(empty, -1)])
    with torch.inference_mode(False):
        return F.pad(entries, (0, empty), value=-1).flatten().int().to(device, copy=True)


class BoxPairs(NamedTuple):
    """Pairs of a box of queries and one of keys, those that lie equally far apart one after another."""

    slots: Tensor  # (pairs, 2) int32: first slot of each box
    first: Tensor  # (displacements + 1,) int32: where the pairs of a displacement begin, those of the most pairs first


@functools.lru_cache(maxsize=64)
@_on_cpu
def box_pairs(box: Box, device: torch.device) -> BoxPairs:
    """All pairs of boxes of a window."""
    offsets = _displacements(box)
    places = torch.cartesian_prod(*(torch.arange(n) for n in box.counts)).view(-1, 3)
    pairs = (places[:, None] - places[None]).flatten(0, 1)
    number = (pairs[:, None] == offsets).all(-1).int().argmax(1)
    boxes = torch.cartesian_prod(*(torch.arange(len(places)),) * 2)
    tables = boxes[number.argsort(stable=True)] * math.prod(box.size), F.pad(number.bincount().cumsum(0), (1, 0))
    with torch.inference_mode(False):
        return BoxPairs(*(t.int().to(device, copy=True) for t in tables))


def _displacements(box: Box) -> Tensor:
    """Displacements (n, 3) of boxes of queries from those of keys, those of the most pairs first."""
    offsets = torch.cartesian_prod(*(torch.arange(1 - n, n) for n in box.counts)).view(-1, 3)
    pairs = (torch.tensor(box.counts) - offsets.abs()).prod(1)
    return offsets[pairs.argsort(descending=True, stable=True)]


@functools.lru_cache(maxsize=64)
@_on_cpu
def bias_members(window_size: Size, table_size: Size, box: Box | None, slots: int, device: torch.device) -> Tensor:
    """Numbers of the tiles of logits that belong to each entry of the bias table, -1 for none: (entries, n) int32.

    Tiles are those of the displacements of boxes, or without a box that of a window.
    """
    if box is None:
        entries = dense_entries(window_size, table_size, slots, torch.device('cpu')).long().view(slots, slots)
        entries[math.prod(window_size) :] = -1  # of what is no query
    else:
        offsets = _displacements(box)
        tokens = torch.cartesian_prod(*(torch.arange(n) for n in box.size)).view(-1, 3)
        offsets = offsets[:, None, None] * torch.tensor(box.size) + tokens[:, None] - tokens[None]
        sizes = torch.tensor(table_size)
        strides = torch.tensor([(2 * table_size[1] - 1) * (2 * table_size[2] - 1), 2 * table_size[2] - 1, 1])
        entries = ((offsets + sizes - 1) * strides).sum(-1)
        entries = torch.where((offsets.abs() < torch.tensor(window_size)).all(-1), entries, -1)
    order = entries.flatten().argsort(stable=True)
    order = order[(entries < 0).sum() :]
    counts = entries.flatten()[order].bincount(minlength=math.prod(2 * t - 1 for t in table_size))
    members = torch.full((len(counts), next_power_of_2(int(counts.max()))), -1)
    members[torch.arange(members.shape[1]) < counts[:, None]] = order
    with torch.inference_mode(False):
        return members.int().to(device, copy=True)

"""The tables that the Triton kernels read, compared with the definitions of windows and of the position bias."""

import itertools
import math

import pytest
import torch

from swinv2_mm.ops.triton import layout, tiles
from swinv2_mm.ops.window_groups import dense_bias_backward
from swinv2_mm.ops.windows import crop_bias_table_backward, fit_window, relative_position_index

CPU = torch.device('cpu')
WINDOWS = [(1, 7, 7), (1, 12, 12), (1, 8, 8), (8, 7, 7), (4, 3, 5), (1, 1, 49), (1, 49, 1), (2, 5, 9)]


@pytest.mark.parametrize('window', [*WINDOWS, (1, 24, 24), (1, 64, 64), (8, 20, 20)])
@pytest.mark.parametrize('tokens', [16, 32, 64, 128])
def test_tile_window_has_each_token_once(window, tokens):
    box = layout.tile_window(window, tokens)
    slots = 2 * tokens * math.prod(box.counts)
    positions = layout.slot_positions(window, box, slots)
    assert math.prod(box.size) == tokens
    assert box.size[-1] % box.run == 0
    inside = [tuple(p) for p in positions.tolist() if all(i < w for i, w in zip(p, window, strict=True))]
    assert sorted(inside) == list(itertools.product(*map(range, window)))


def test_tile_window_of_released_models_has_no_padding():
    """Boxes of 8x8 tokens, or 4x4x4 for video, divide their windows."""
    for side in (8, 16, 24, 32, 64):
        assert layout.tile_window((1, side, side), 64) == ((1, 8, 8), (1, side // 8, side // 8), 8)
    assert math.prod(layout.tile_window((8, 20, 20), 64).counts) * 64 == 8 * 20 * 20


# feature map, window, shift: divisible, padded, both, shifted or not; a window larger than the map along an axis
CASES = [
    ((1, 6, 8), (1, 3, 4), (0, 0, 0)),
    ((1, 6, 8), (1, 3, 4), (0, 1, 2)),
    ((1, 7, 5), (1, 3, 4), (0, 1, 2)),
    ((3, 5, 4), (2, 3, 4), (1, 1, 0)),
    ((1, 10, 9), (1, 8, 5), (0, 4, 2)),
]


@pytest.mark.parametrize(('size', 'window', 'shift'), CASES)
@pytest.mark.parametrize('in_boxes', [True, False])
def test_token_tables(size, window, shift, in_boxes):
    window, shift = fit_window(size, window, shift)
    tokens = math.prod(window)
    box = layout.tile_window(window, 16) if in_boxes else None
    slots = math.prod(box.counts) * 16 + 16 if in_boxes else max(16, tiles.next_power_of_2(tokens))
    rows, regions, inner, edge = layout.token_tables(size, window, shift, box, slots, CPU)
    order = list(itertools.product(*map(range, window)))
    positions = layout.slot_positions(window, box, slots).tolist() if in_boxes else order
    counts = [-(-s // w) for s, w in zip(size, window, strict=True)]
    needs_mask = []
    for number, at in enumerate(itertools.product(*map(range, counts))):
        found = []
        for slot in range(slots):
            row, wraps = -1, None
            if slot < len(positions) and all(p < w for p, w in zip(positions[slot], window, strict=True)):
                places = [a * w + p + d for a, w, p, d in zip(at, window, positions[slot], shift, strict=True)]
                padded = [n * w for n, w in zip(counts, window, strict=True)]
                wraps = tuple(c >= n for c, n in zip(places, padded, strict=True))
                coords = [c % n for c, n in zip(places, padded, strict=True)]
                if all(c < s for c, s in zip(coords, size, strict=True)):
                    row = (coords[0] * size[1] + coords[1]) * size[2] + coords[2]
                found.append((row, wraps if row >= 0 else None, int(regions[number, slot])))
            assert rows[number, slot] == row
            assert (regions[number, slot] >= 0) == (row >= 0)
        for (_, wraps_a, a), (_, wraps_b, b) in itertools.combinations(found, 2):
            assert (a == b) == (wraps_a == wraps_b)
        needs_mask.append(len({wraps for _, wraps, _ in found}) > 1)
    assert inner.tolist() == [i for i, needs in enumerate(needs_mask) if not needs]
    assert edge.tolist() == [i for i, needs in enumerate(needs_mask) if needs]


@pytest.mark.parametrize('window', WINDOWS)
@pytest.mark.parametrize(('table', 'tokens'), [((0, 0, 0), 16), ((1, 0, 2), 32)])
def test_bias_tables(window, table, tokens):
    """Also for the bias table of a larger window; padding keys have no entry."""
    table = tuple(w + t for w, t in zip(window, table, strict=True))
    box = layout.tile_window(window, tokens)
    keys = math.prod(box.counts) * tokens
    entries, q_places, k_places = layout.bias_tables(window, table, box, keys, CPU)
    places = q_places[:, None] + k_places
    assert places.min() >= 0
    found = entries[places]
    positions = layout.slot_positions(window, box, keys)
    is_token = (positions < torch.tensor(window)).all(1)
    strides = torch.tensor([table[1] * table[2], table[2], 1])
    number = (positions[is_token] * strides).sum(1)
    expected = relative_position_index(table)[number][:, number]
    assert torch.equal(found[is_token][:, is_token].long(), expected)
    assert (found[is_token][:, ~is_token] == -1).all()
    # a run of keys is contiguous in memory, also in slots after the boxes
    _, q_places, k_places = layout.bias_tables(window, table, box, keys + 128, CPU)
    runs = k_places.view(-1, box.run)
    assert (runs[:, 0] % box.run == 0).all()
    assert torch.equal(runs, runs[:, :1] + torch.arange(box.run))
    assert (q_places % box.run == 0).all()


@pytest.mark.parametrize('window', [(1, 7, 7), (2, 3, 4), (1, 1, 5), (1, 8, 8)])
def test_dense_entries(window):
    table = (window[0], window[1] + 1, window[2])
    tokens, slots = math.prod(window), 64
    found = layout.dense_entries(window, table, slots, CPU).view(slots, slots)
    positions = torch.tensor(list(itertools.product(*map(range, window))))
    number = (positions * torch.tensor([table[1] * table[2], table[2], 1])).sum(1)
    assert torch.equal(found[:tokens, :tokens].long(), relative_position_index(table)[number][:, number])
    assert (found[:, tokens:] == -1).all()
    assert (found[:, :tokens] >= 0).all()


@pytest.mark.parametrize('counts', [(1, 3, 3), (1, 1, 1), (2, 1, 3)])
def test_box_pairs_by_displacement(counts):
    box = layout.Box((1, 4, 4), counts, 4)
    slots, first = layout.box_pairs(box, CPU)
    boxes = list(itertools.product(*map(range, counts)))
    assert sorted(map(tuple, (slots // 16).tolist())) == list(itertools.product(range(len(boxes)), repeat=2))
    lengths = first.diff().tolist()
    assert lengths == sorted(lengths, reverse=True)
    for number, displacement in enumerate(layout._displacements(box).tolist()):
        for q, k in slots[first[number] : first[number + 1]].tolist():
            assert [a - b for a, b in zip(boxes[q // 16], boxes[k // 16], strict=True)] == displacement


@pytest.mark.parametrize(
    ('window', 'box'), [((1, 7, 6), ((1, 4, 2), (1, 2, 3), 2)), ((3, 4, 5), ((2, 1, 4), (2, 4, 2), 4))]
)
@pytest.mark.parametrize('larger', [0, 2])
def test_bias_members_of_several_tiles(window, box, larger):
    """Compared with the gradient of the (N, N) bias; also for the table of a larger window."""
    box, table = layout.Box(*box), tuple(w + larger for w in window)
    generator = torch.Generator().manual_seed(0)
    tokens, size = math.prod(window), math.prod(box.size)
    grad_bias = torch.randn(1, tokens, tokens, generator=generator, dtype=torch.float64)
    numbers = {tuple(d): number for number, d in enumerate(layout._displacements(box).tolist())}
    tiles_of = torch.zeros(len(numbers), size, size, dtype=torch.float64)
    for i, query in enumerate(itertools.product(*map(range, window))):
        for j, key in enumerate(itertools.product(*map(range, window))):
            at = tuple(a // s - b // s for a, b, s in zip(query, key, box.size, strict=True))
            rows = [
                ((p[0] % box.size[0]) * box.size[1] + p[1] % box.size[1]) * box.size[2] + p[2] % box.size[2]
                for p in (query, key)
            ]
            tiles_of[numbers[at], rows[0], rows[1]] += grad_bias[0, i, j]
    members = layout.bias_members(window, table, box, 0, CPU)
    found = torch.where(members >= 0, tiles_of.flatten()[members], 0.0).sum(1)
    expected = crop_bias_table_backward(dense_bias_backward(grad_bias.flip(1), window), table, window)
    torch.testing.assert_close(found, expected[0])


def test_bias_members_of_one_tile():
    window, slots = (2, 3, 4), 32
    grad_bias = torch.randn(1, 24, 24, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    tile = torch.nn.functional.pad(grad_bias[0], (0, 8, 0, 8), value=math.nan)
    members = layout.bias_members(window, window, None, slots, CPU)
    found = torch.where(members >= 0, tile.flatten()[members], 0.0).sum(1)
    torch.testing.assert_close(found, dense_bias_backward(grad_bias.flip(1), window)[0])

"""Window geometry on maps small enough to write down."""

import itertools
import math

import pytest
import torch

from swinv2_mm.ops import windows


def test_partition_cuts_a_4x4_map_into_quarters():
    quarters = windows.partition(torch.arange(16).view(1, 4, 4), (2, 2))
    assert quarters.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(('size', 'window'), [((6,), (3,)), ((4, 6), (2, 3)), ((4, 6, 2), (2, 3, 1))])
def test_reverse_undoes_partition(size, window):
    x = torch.randn(2, *size, 3, 5)
    assert torch.equal(windows.reverse(windows.partition(x, window), window, size), x)


def test_padding_goes_to_the_end_of_each_axis():
    padded = windows.pad_to_windows(torch.ones(1, 3, 4, 2), (2, 3))
    assert padded.shape == (1, 4, 6, 2)
    assert padded[:, :3, :4].eq(1).all()
    assert padded.sum() == 24


def test_relative_position_index_counts_offsets():
    # offsets of a 1x2 window: key right of the query, same, left of it
    assert windows.relative_position_index((1, 2)).tolist() == [[1, 0], [2, 1]]
    index = windows.relative_position_index((3, 4))
    assert index[0, 0] == index[5, 5] == (2 * 7 + 3)  # the middle of 5 x 7 offsets
    assert index.unique().numel() == 5 * 7


def test_mask_separates_the_ends_of_a_rolled_row_and_hides_padding():
    # tokens 0 1 2 and one of padding, rolled by one: (1 2) (- 0)
    regions = windows.token_regions((3,), (4,), (2,), (1,))
    mask = windows.attention_mask(regions)
    inf = float('inf')
    assert mask[0].tolist() == [[0, 0], [0, 0]]
    assert mask[1, 1].tolist() == [-inf, 0]  # what padding itself attends to is nobody's business


def test_no_mask_where_none_is_needed():
    assert windows.token_regions((4, 4), (4, 4), (2, 2), (0, 0)) is None


def test_an_axis_within_one_window_is_not_shifted():
    assert windows.fit_window((8, 20), (8, 16), (4, 8)) == ((8, 16), (0, 8))


# map, window, shift: whole, shifted, padded, padding that reaches two windows, 1 to 3 axes
MAPS = [
    ((8, 12), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((9, 14), (4, 4), (2, 2)),
    ((9,), (4,), (3,)),
    ((9, 6), (4, 6), (2, 0)),
    ((5, 9, 7), (2, 4, 4), (1, 2, 2)),
]


@pytest.mark.parametrize(('size', 'window', 'shift'), MAPS)
def test_groups_hold_every_token_once_and_the_masks_of_the_official_code(size, window, shift):
    padded = tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))
    ids = torch.arange(1, 1 + math.prod(size)).view(1, *size)  # 0 is padding
    ids = windows.pad_to_windows(ids[..., None], window)[..., 0].roll(
        [-d for d in shift], tuple(range(1, 1 + len(size)))
    )
    expected = {}  # tokens of a window -> their positions and mask
    regions = windows.token_regions(size, padded, window, shift)
    for i, tokens in enumerate(windows.partition(ids, window)):
        there = tokens > 0
        mask = None if regions is None else windows.attention_mask(regions[i : i + 1])[0][there][:, there].tolist()
        expected[tuple(tokens[there] - 1)] = there.nonzero()[:, 0].tolist(), mask
    expected = {tuple(map(int, tokens)): value for tokens, value in expected.items()}
    groups, *places = windows.window_groups(size, window, shift)
    keys = [group.queries.flip(1) for group in groups]
    assert sorted(tuple(tokens) for group in keys for tokens in group.tolist()) == sorted(expected)
    for role, place in zip(('queries', 'qkv'), places, strict=True):
        order = torch.cat([getattr(group, role).flatten() for group in groups])
        assert torch.equal(order[place], torch.arange(len(order)))
    for group, tokens_of_windows in zip(groups, keys, strict=True):
        n = len(group.queries[0])
        of_q, of_k, of_v = group.qkv.unflatten(1, (3, n)).unbind(1)
        assert torch.equal(of_q, 3 * group.queries)
        assert torch.equal(of_k, 3 * tokens_of_windows + 1)
        assert torch.equal(of_v, 3 * tokens_of_windows + 2)
        whole = torch.arange(n)
        columns, rows = (whole if where is None else where for where in (group.columns, group.rows))
        assert torch.equal(math.prod(window) - 1 - rows.flip(0), columns)
        mask = torch.zeros(n, n) if group.mask is None else group.mask.flip(0)
        for tokens in tokens_of_windows.tolist():
            assert expected[tuple(tokens)][0] == columns.tolist()
            assert (expected[tuple(tokens)][1] or torch.zeros(n, n).tolist()) == mask.tolist()


def test_windows_within_the_map_share_a_group_without_a_mask():
    groups = windows.window_groups((64, 64), (8, 8), (4, 4)).groups
    assert [(len(g.queries), g.mask is None) for g in groups] == [(49, True), (7, False), (7, False), (1, False)]


def test_groups_of_many_sizes_do_not_fill_the_memory():
    for size in range(8, 208):
        windows.window_groups((size,), (4,), (2,))
    cache = windows.window_groups.cache_info()
    assert cache.currsize <= cache.maxsize == 64
    assert windows.window_groups((207,), (4,), (2,)) is windows.window_groups((207,), (4,), (2,))


@pytest.mark.parametrize('window', [(5,), (3, 4), (7, 7), (2, 3, 4), (1, 3)])
def test_bias_is_gathered_and_its_gradient_scattered_by_relative_position(window):
    table = torch.randn(3, math.prod(2 * w - 1 for w in window), dtype=torch.float64)
    n = math.prod(window)
    grad = torch.randn(3, n, n, dtype=torch.float64)
    dense, summed = torch.empty_like(grad), torch.zeros_like(table)
    for (i, query), (j, key) in itertools.product(enumerate(itertools.product(*map(range, window))), repeat=2):
        entry = 0
        for w, a, b in zip(window, query, key, strict=True):
            entry = entry * (2 * w - 1) + a - b + w - 1
        dense[:, i, j] = table[:, entry]
        summed[:, entry] += grad[:, i, j]
    assert torch.equal(windows.dense_bias(table, window).flip(1), dense)
    torch.testing.assert_close(windows.dense_bias_backward(grad.flip(1), window), summed, rtol=1e-12, atol=1e-12)

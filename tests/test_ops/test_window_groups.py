"""Groups of windows against padding, shifting and partitioning; the bias of a window against a loop over its tokens."""

import itertools
import math

import pytest
import torch

from swinv2_mm.ops.window_groups import dense_bias, dense_bias_backward, window_groups
from swinv2_mm.ops.windows import attention_mask, pad_to_windows, partition, token_regions

# spatial shape, window, shift: not shifted, shifted, padded, padding that reaches two windows, 1 to 3 axes
SHAPES = [
    ((8, 12), (4, 4), (0, 0)),
    ((8, 12), (4, 4), (2, 2)),
    ((9, 14), (4, 4), (2, 2)),
    ((9,), (4,), (3,)),
    ((9, 6), (4, 6), (2, 0)),
    ((5, 9, 7), (2, 4, 4), (1, 2, 2)),
]


@pytest.mark.parametrize(('size', 'window', 'shift'), SHAPES)
def test_window_groups_have_each_token_once_and_the_masks_of_the_official_code(size, window, shift):
    padded = tuple(-(-s // w) * w for s, w in zip(size, window, strict=True))
    ids = torch.arange(1, 1 + math.prod(size)).view(1, *size)  # 0 is padding
    ids = pad_to_windows(ids[..., None], window)[..., 0].roll([-d for d in shift], tuple(range(1, 1 + len(size))))
    expected = {}  # tokens of a window -> their positions and mask
    regions = token_regions(size, padded, window, shift)
    for i, tokens in enumerate(partition(ids, window)):
        valid = tokens > 0
        mask = None if regions is None else attention_mask(regions[i : i + 1])[0][valid][:, valid].tolist()
        expected[tuple(tokens[valid] - 1)] = valid.nonzero()[:, 0].tolist(), mask
    expected = {tuple(map(int, tokens)): value for tokens, value in expected.items()}
    groups, q_restore, qkv_restore = window_groups(size, window, shift)
    k_indices = [group.q_index.flip(1) for group in groups]
    assert sorted(tuple(tokens) for index in k_indices for tokens in index.tolist()) == sorted(expected)
    for name, restore in (('q_index', q_restore), ('qkv_index', qkv_restore)):
        order = torch.cat([getattr(group, name).flatten() for group in groups])
        assert torch.equal(order[restore], torch.arange(len(order)))
    for group, k_index in zip(groups, k_indices, strict=True):
        n = len(group.q_index[0])
        of_q, of_k, of_v = group.qkv_index.unflatten(1, (3, n)).unbind(1)
        assert torch.equal(of_q, 3 * group.q_index)
        assert torch.equal(of_k, 3 * k_index + 1)
        assert torch.equal(of_v, 3 * k_index + 2)
        rows, cols = (torch.arange(n) if i is None else i for i in (group.bias_rows, group.bias_cols))
        assert torch.equal(math.prod(window) - 1 - rows.flip(0), cols)
        mask = torch.zeros(n, n) if group.mask is None else group.mask.flip(0)
        for tokens in k_index.tolist():
            assert expected[tuple(tokens)][0] == cols.tolist()
            assert (expected[tuple(tokens)][1] or torch.zeros(n, n).tolist()) == mask.tolist()


def test_window_groups_mask_only_the_edges():
    groups = window_groups((64, 64), (8, 8), (4, 4)).groups
    assert [(len(g.q_index), g.mask is None) for g in groups] == [(49, True), (7, False), (7, False), (1, False)]


def test_window_groups_cache_is_bounded():
    for size in range(8, 208):
        window_groups((size,), (4,), (2,))
    cache = window_groups.cache_info()
    assert cache.currsize <= cache.maxsize == 64
    assert window_groups((207,), (4,), (2,)) is window_groups((207,), (4,), (2,))


@pytest.mark.parametrize('window', [(5,), (3, 4), (7, 7), (2, 3, 4), (1, 3)])
def test_dense_bias_and_its_backward_equal_a_loop_over_token_pairs(window):
    table = torch.randn(3, math.prod(2 * w - 1 for w in window), dtype=torch.float64)
    n = math.prod(window)
    grad = torch.randn(3, n, n, dtype=torch.float64)
    bias, grad_table = torch.empty_like(grad), torch.zeros_like(table)
    for (i, query), (j, key) in itertools.product(enumerate(itertools.product(*map(range, window))), repeat=2):
        index = 0
        for w, a, b in zip(window, query, key, strict=True):
            index = index * (2 * w - 1) + a - b + w - 1
        bias[:, i, j] = table[:, index]
        grad_table[:, index] += grad[:, i, j]
    assert torch.equal(dense_bias(table, window).flip(1), bias)
    torch.testing.assert_close(dense_bias_backward(grad.flip(1), window), grad_table, rtol=1e-12, atol=1e-12)

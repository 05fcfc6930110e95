"""Window geometry on feature maps small enough to write down the expected result."""

import pytest
import torch

from swinv2_mm.ops import windows


def test_partition_of_a_4x4_feature_map():
    quarters = windows.partition(torch.arange(16).view(1, 4, 4), (2, 2))
    assert quarters.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7], [8, 9, 12, 13], [10, 11, 14, 15]]


@pytest.mark.parametrize(('size', 'window'), [((6,), (3,)), ((4, 6), (2, 3)), ((4, 6, 2), (2, 3, 1))])
def test_reverse_inverts_partition(size, window):
    x = torch.randn(2, *size, 3, 5)
    assert torch.equal(windows.reverse(windows.partition(x, window), window, size), x)


def test_pad_to_windows_pads_the_end_of_each_axis():
    padded = windows.pad_to_windows(torch.ones(1, 3, 4, 2), (2, 3))
    assert padded.shape == (1, 4, 6, 2)
    assert padded[:, :3, :4].eq(1).all()
    assert padded.sum() == 24


def test_relative_position_index_enumerates_query_minus_key():
    # offsets of a 1x2 window: key right of the query, same, left of it
    assert windows.relative_position_index((1, 2)).tolist() == [[1, 0], [2, 1]]
    index = windows.relative_position_index((3, 4))
    assert index[0, 0] == index[5, 5] == (2 * 7 + 3)  # the middle of 5 x 7 offsets
    assert index.unique().numel() == 5 * 7


def test_attention_mask_of_a_shifted_and_padded_row():
    # tokens 0 1 2 and one of padding, shifted by one: (1 2) (- 0)
    regions = windows.token_regions((3,), (4,), (2,), (1,))
    mask = windows.attention_mask(regions)
    inf = float('inf')
    assert mask[0].tolist() == [[0, 0], [0, 0]]
    assert mask[1, 1].tolist() == [-inf, 0]  # the row of the padding query itself is irrelevant


def test_token_regions_is_none_without_padding_and_shift():
    assert windows.token_regions((4, 4), (4, 4), (2, 2), (0, 0)) is None


def test_fit_window_does_not_shift_an_axis_within_one_window():
    assert windows.fit_window((8, 20), (8, 16), (4, 8)) == ((8, 16), (0, 8))

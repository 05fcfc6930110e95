"""Coordinates of the position bias against the formula of the paper and values that can be worked out by hand."""

import math

import pytest
import torch

from swinv2_mm.models.log_cpb import LogCPB
from swinv2_mm.ops.coordinates import log_spaced_coords


def formula(offset: int, pretrained: int) -> float:
    scaled = 8 * offset / (pretrained - 1)
    return math.copysign(math.log2(1 + abs(scaled)) / 3, scaled)


@pytest.mark.parametrize(('window', 'pretrained'), [((8, 8), (8, 8)), ((24, 12), (12, 6)), ((3, 4, 5), (8, 4, 5))])
def test_coordinates_follow_the_formula_along_each_axis(window, pretrained):
    coords = log_spaced_coords(window, torch.tensor(pretrained)).view(*(2 * w - 1 for w in window), len(window))
    for axis, (w, p) in enumerate(zip(window, pretrained, strict=True)):
        along = coords.movedim(axis, 0).flatten(1, -2)[:, 0, axis]
        assert along.tolist() == pytest.approx([formula(d, p) for d in range(1 - w, w)], abs=1e-6)


@pytest.mark.parametrize(
    ('pretrained', 'window', 'largest'),
    [(8, 8, 1.057), (8, 16, 1.394), (8, 32, 1.729), (12, 24, 1.383), (12, 48, 1.712), (6, 32, 1.887)],
)
def test_a_larger_window_extrapolates_as_far_as_known(pretrained, window, largest):
    assert float(log_spaced_coords((window, window), torch.tensor([pretrained, pretrained])).max()) == pytest.approx(
        largest, abs=1e-3
    )


def test_a_window_of_one_token_has_the_coordinate_zero():
    assert log_spaced_coords((1, 2), torch.tensor([1, 2]))[:, 0].eq(0).all()


def test_bias_of_an_offset_does_not_depend_on_the_window():
    """What makes the transfer work: the same weights give the same bias for the same offset in a larger window."""
    small, large = LogCPB((4, 4), (4, 4), 2), LogCPB((8, 8), (4, 4), 2)
    large.load_state_dict(small.state_dict())
    middle = large().view(2, 15, 15)[:, 4:11, 4:11]
    torch.testing.assert_close(small().view(2, 7, 7), middle, rtol=1e-6, atol=1e-6)


def test_bias_stays_between_0_and_16_in_float32_under_autocast():
    mlp = LogCPB((4, 4), (4, 4), 2)
    with torch.no_grad():
        mlp[2].weight.mul_(1e4)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        bias = mlp()
    assert bias.dtype == torch.float32
    assert bias.min() >= 0
    assert bias.max() <= 16

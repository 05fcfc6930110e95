"""FLOP and logits of the shapes against torch's own counter and a published model."""

import dataclasses

import ours
import pytest
import torch
from shapes import SHAPES
from torch.utils.flop_counter import FlopCounterMode


@pytest.mark.parametrize(('name', 'size'), [('nano', (64, 64)), ('video_t_320x320x8', (8, 64, 64))])
def test_flops_agree_with_torch(name, size):
    shape = dataclasses.replace(SHAPES[name], size=size, window=(8, 8, 8)[-len(size) :])
    model = ours.build_backbone(shape, 'reference').eval()
    x = torch.zeros(1, 3, *size)
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(x)
    bias_flops = [counts for name, counts in counter.get_flop_counts().items() if name.endswith('.cpb_mlp')]
    assert len(bias_flops) == sum(shape.depths)
    # without the MLP of the position bias, whose result is cached
    assert shape.flops() == counter.get_total_flops() - sum(sum(counts.values()) for counts in bias_flops)


def test_flops_and_logits_of_a_published_model():
    """The table of timm lists 55.25 billion multiply-adds with the position bias, which are 0.5 billion here."""
    shape = SHAPES['b_w24_384']
    assert shape.flops() / 2e9 == pytest.approx(54.7, abs=0.1)
    assert sum(shape.logits(i) * depth for i, depth in enumerate(shape.depths)) == pytest.approx(160.6e6, rel=1e-3)


def test_padding_counts_in_logits_and_not_in_flops():
    shape = dataclasses.replace(SHAPES['nano'], size=(36, 64))  # 9 x 16 tokens, windows of 8 x 8
    assert shape.is_padded()
    assert not SHAPES['nano'].is_padded()
    assert shape.logits(0) == 2 * 2 * 64**2
    assert shape.attention_flops(0) * 16 == SHAPES['nano'].attention_flops(0) * 9

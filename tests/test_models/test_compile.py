"""Compiled backbones against eager ones: one graph for each call, for sizes that change, with the same gradients."""

import oracles
import pytest
import torch
from torch._dynamo.utils import counters

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

ARCH = dict(embed_dims=32, depths=(2, 2), num_heads=(1, 2))

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(kind=SwinTransformerV2, **kwargs):
    backbone = kind(ARCH, **dict(window_size=8, out_indices=(0, 1), drop_path_rate=0.0) | kwargs)
    return oracles.randomize(backbone)


def image(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


def assert_same_gradients(backbone, compiled, x):
    def grads(model):
        backbone.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters()}

    expected = grads(backbone)
    for name, grad in grads(compiled).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)


@torch.no_grad()
def test_images_of_many_sizes_need_few_graphs_and_no_break():
    backbone = build().eval()
    compiled = torch.compile(backbone, fullgraph=True, backend='aot_eager')
    graphs = []
    for size in ((64, 64), (96, 128), (100, 60), (72, 84), (104, 76), (88, 140)):
        for ours, expected in zip(compiled(image(*size)), backbone(image(*size)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
        graphs.append(counters['stats']['unique_graphs'])
    # the first size has one of its own, then sizes are symbols; whether merging has to pad may make one more
    assert graphs[0] == 1
    assert graphs[-1] <= 4
    assert not counters['graph_break']


@pytest.mark.parametrize('with_cp', [False, True])
def test_gradients_of_images(with_cp):
    backbone = build(with_cp=with_cp).train()
    assert_same_gradients(backbone, torch.compile(backbone, fullgraph=True), image(64, 72))


def test_gradients_of_clips():
    backbone = build(SwinTransformer3DV2, window_size=(4, 4, 4)).train()
    assert_same_gradients(backbone, torch.compile(backbone, fullgraph=True, backend='aot_eager'), image(8, 64, 72))


def test_a_compiled_backbone_follows_its_weights():
    """The cache of the position bias is eager code's alone."""
    backbone = build().eval()
    compiled = torch.compile(backbone, fullgraph=True, backend='aot_eager')
    with torch.no_grad():
        before = compiled(image(64, 64))[1]
        for block in backbone.layers[0].blocks:
            block.attn.cpb_mlp[2].weight.data.mul_(-1)
        after, expected = compiled(image(64, 64))[1], build_like(backbone)(image(64, 64))[1]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01


def build_like(backbone):
    twin = build().eval()
    twin.load_state_dict(backbone.state_dict())
    return twin

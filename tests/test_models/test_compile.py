"""Compiled backbones against eager ones: no graph breaks, dynamic sizes, the same gradients.

Every graph takes seconds, so the models are small: a stage with shifted and unshifted windows, patch merging, and a
stage with unshifted windows.
"""

import oracles
import pytest
import torch
from torch._dynamo.utils import counters

from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2))
ONE_STAGE = dict(embed_dims=16, depths=(2,), num_heads=(2,))

pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def fresh_compiler(monkeypatch):
    # with the value 'default', inductor generates C++ that does not compile (torch 2.13)
    monkeypatch.delenv('ATEN_CPU_CAPABILITY', raising=False)
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def build(kind=SwinTransformerV2, **kwargs):
    return oracles.randomize(kind(**dict(arch=ARCH, window_size=4, drop_path_rate=0.0) | kwargs))


def image(*size):
    return torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_compile_with_dynamic_sizes_needs_three_graphs_and_follows_the_weights():
    """Compiled code does not use the cache of the position bias."""
    backbone = build(out_indices=(0, 1)).eval()
    compiled = torch.compile(backbone, fullgraph=True, dynamic=True, backend='aot_eager')
    # A square, whose axes are one symbol; then a size without padding, and sizes padded for patches, windows and patch
    # merging; at last feature maps of one token, for which PyTorch always compiles another graph.
    for size in ((32, 32), (48, 64), (50, 30), (36, 42), (52, 38), (44, 70), (63, 41), (37, 80), (12, 8), (20, 8)):
        for ours, expected in zip(compiled(image(*size)), backbone(image(*size)), strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert counters['stats']['unique_graphs'] <= 3
    assert not counters['graph_break']

    before = compiled(image(32, 32))[1]
    for block in backbone.layers[0].blocks:
        block.attn.cpb_mlp[2].weight.data.mul_(-1)
    twin = build(out_indices=(0, 1)).eval()
    twin.load_state_dict(backbone.state_dict())
    after, expected = compiled(image(32, 32))[1], twin(image(32, 32))[1]
    torch.testing.assert_close(after, expected, rtol=1e-4, atol=1e-4)
    assert (after - before).abs().max() > 0.01


@torch.no_grad()
def test_compile_with_a_stem_keeps_the_size_of_the_feature_maps():
    """A stem must not be padded more than needed, unlike the patch embedding."""
    backbone = build(arch=ONE_STAGE, out_indices=(0,)).eval()
    backbone.patch_embed.proj = torch.nn.Conv2d(3, 16, 7, 4, 3)
    compiled = torch.compile(backbone, fullgraph=True, backend='eager')
    torch.testing.assert_close(compiled(image(32, 32))[0], backbone(image(32, 32))[0], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ('kind', 'backend', 'size', 'options'),
    [
        (SwinTransformerV2, 'inductor', (36, 42), dict(arch=ONE_STAGE, out_indices=(0,), with_cp=True)),
        pytest.param(
            SwinTransformer3DV2,
            'aot_eager',
            (6, 36, 42),
            dict(window_size=(4, 4, 4), out_indices=(0, 1)),
            marks=pytest.mark.smoke,
        ),
    ],
)
def test_compile_keeps_gradients(kind, backend, size, options):
    """For images, with activation checkpointing and the default compiler; and for video."""
    backbone, x = build(kind, **options).train(), image(*size)

    def grads(model):
        backbone.zero_grad()
        sum(out.square().mean() for out in model(x)).backward()
        return {name: p.grad.clone() for name, p in backbone.named_parameters()}

    expected = grads(backbone)
    for name, grad in grads(torch.compile(backbone, fullgraph=True, backend=backend)).items():
        scale = float(expected[name].abs().max())
        torch.testing.assert_close(grad, expected[name], rtol=1e-3, atol=1e-4 * scale + 1e-7, msg=name)

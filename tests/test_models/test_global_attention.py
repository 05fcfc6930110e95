"""GlobalAttention against torch's own modules, its initial state, and its use in a detector."""

import oracles
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_mm.models import GlobalAttention

CHANNELS, HEADS = 24, 3


def build(**kwargs) -> GlobalAttention:
    return oracles.randomize(GlobalAttention(CHANNELS, HEADS, **kwargs))


def features(*size: int, batch: int = 2, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    rng = torch.Generator().manual_seed(1)
    return tuple(
        torch.randn(batch, c, *(s * k for s in size), generator=rng, dtype=dtype)
        for c, k in ((CHANNELS // 2, 2), (CHANNELS, 1))
    )


def torch_reference(layer: GlobalAttention, x: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, C, H, W) by `torch.nn.MultiheadAttention` with the weights of the layer."""
    attention = nn.MultiheadAttention(CHANNELS, HEADS, batch_first=True).to(x.dtype)
    attention.load_state_dict(
        dict(
            in_proj_weight=layer.qkv.weight,
            in_proj_bias=layer.qkv.bias,
            **{f'out_proj.{name}': value for name, value in layer.proj.named_parameters()},
        )
    )
    tokens = torch.einsum('nchw->nhwc', x).reshape(len(x), -1, CHANNELS)
    normed = layer.norm1(tokens)
    tokens = tokens + attention(normed, normed, normed, need_weights=True)[0]
    hidden = nn.functional.gelu(layer.mlp.fc1(layer.norm2(tokens)))
    tokens = layer.norm(tokens + layer.mlp.fc2(hidden))
    return torch.einsum('nhwc->nchw', tokens.reshape(len(x), *x.shape[2:], CHANNELS))


def test_global_attention_equals_multihead_attention_of_torch():
    layer = build().double()
    feats = features(5, 7, dtype=torch.float64)
    x = feats[-1].requires_grad_()
    out, expected = layer(feats)[-1], torch_reference(layer, x)
    torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
    found, wanted = (torch.autograd.grad(o.square().sum(), x)[0] for o in (out, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_global_attention_changes_only_the_last_feature_map():
    feats = features(4, 4)
    outs = build()(feats)
    assert isinstance(outs, tuple)
    assert len(outs) == 2
    assert outs[0] is feats[0]
    assert outs[1].shape == feats[1].shape


@torch.no_grad()
def test_global_attention_is_permutation_equivariant():
    layer = build().double()
    *_, x = features(6, 4, dtype=torch.float64)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(2))
    shuffled = x.flatten(2)[..., order].reshape(x.shape)
    out = layer((x,))[0].flatten(2)[..., order].reshape(x.shape)
    torch.testing.assert_close(layer((shuffled,))[0], out, rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_global_attention_is_global():
    layer = build().double()
    *_, x = features(4, 6, batch=1, dtype=torch.float64)
    changed = x.clone()
    changed[..., 0, 0] *= -1
    assert ((layer((x,))[0] - layer((changed,))[0]).abs().amax(1) > 0).all()


@torch.no_grad()
def test_global_attention_starts_as_the_identity_for_normalised_features():
    x = nn.functional.layer_norm(torch.randn(2, 5, 6, CHANNELS), (CHANNELS,)).movedim(-1, 1)
    layer = GlobalAttention(CHANNELS, HEADS)
    oracles.randomize(layer)
    layer.init_weights()
    for new in (GlobalAttention(CHANNELS, HEADS), layer):
        torch.testing.assert_close(new((x,))[0], x, rtol=1e-4, atol=1e-4)


def test_global_attention_has_a_gradient_for_every_parameter():
    layer = build(drop_path_rate=0.1)
    torch.manual_seed(0)
    layer(features(4, 5, batch=4))[-1].mul(torch.randn(CHANNELS, 4, 5)).sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in layer.parameters())


@torch.no_grad()
def test_global_attention_drops_each_branch_of_a_sample_independently():
    layer = build(drop_path_rate=0.5)
    *_, x = features(3, 3, batch=32)
    torch.manual_seed(0)
    out = layer((x,))[0].flatten(2).transpose(1, 2)
    tokens = x.flatten(2).transpose(1, 2)
    found = []
    for attends in (0, 2):  # dropped, or kept at twice its size
        y = tokens + attends * layer._attention(layer.norm1(tokens))
        for mixes in (0, 2):
            expected = layer.norm(y + mixes * layer.mlp(layer.norm2(y)))
            found.append((out - expected).abs().amax((1, 2)) < 1e-4)
    assert all(samples.any() for samples in found)
    assert (sum(samples.int() for samples in found) == 1).all()
    torch.testing.assert_close(layer.eval()((x,))[0], torch_reference(layer, x), rtol=1e-4, atol=1e-4)


def test_global_attention_under_bfloat16_autocast_is_close_to_float32_and_trains():
    layer = build()
    feats = features(8, 8)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        out = layer(feats)[-1]
    torch.testing.assert_close(out.float(), layer(feats)[-1], rtol=0.05, atol=0.05)
    out.float().square().mean().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


class LargestTensor(TorchDispatchMode):
    """Records the size of the largest tensor that any operator returned."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, torch.Tensor):
                self.elements = max(self.elements, value.numel())
        return result


def test_global_attention_has_no_matrix_of_all_token_pairs():
    tokens = 48 * 48  # of an image of 1536x1536
    with LargestTensor() as largest:
        build()(features(48, 48, batch=1))[-1].sum().backward()
    assert largest.elements == tokens * 3 * CHANNELS  # queries, keys and values
    assert largest.elements < tokens**2 / 10


@pytest.mark.parametrize(
    ('kwargs', 'text'),
    [
        (dict(num_heads=5), 'num_heads must divide in_channels, got 5 for 24 channels'),
        (dict(num_heads=0), 'got 0 for 24'),
        (dict(num_heads=3, drop_path_rate=1.0), r'drop_path_rate must lie in \[0, 1\), got 1.0'),
    ],
)
def test_global_attention_rejects_arguments_out_of_range(kwargs, text):
    with pytest.raises(ValueError, match=text):
        GlobalAttention(CHANNELS, **kwargs)


@pytest.mark.parametrize('shape', [(1, 8, 4, 4), (1, 16, CHANNELS)])
def test_global_attention_rejects_a_feature_map_of_another_shape(shape):
    with pytest.raises(ValueError, match=r'takes a last feature map of shape \(N, 24, H, W\), got \(1, '):
        build()((torch.zeros(shape),))


def detector(**attention):
    """A region proposal network on a nano Swin V2."""
    from mmdet.registry import MODELS
    from mmengine.registry import init_default_scope

    pytest.importorskip('mmcv.ops')
    init_default_scope('mmdet')
    arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    return MODELS.build(
        dict(
            type='RPN',
            train_cfg=None,
            test_cfg=dict(rpn=dict()),
            backbone=dict(type='swinv2_mm.SwinTransformerV2', arch=arch, window_size=4),
            neck=[
                dict(type='swinv2_mm.GlobalAttention', in_channels=128, num_heads=4, **attention),
                dict(type='FPN', in_channels=[16, 32, 64, 128], out_channels=16, num_outs=5),
            ],
            rpn_head=dict(
                type='RPNHead',
                in_channels=16,
                feat_channels=16,
                anchor_generator=dict(type='AnchorGenerator', scales=[8], ratios=[1.0], strides=[4, 8, 16, 32, 64]),
            ),
        )
    )


def test_global_attention_before_the_neck_of_a_detector():
    pytest.importorskip('mmdet')
    model = detector(drop_path_rate=0.2)
    model.init_weights()
    assert not model.neck[0].proj.weight.any()  # initialised by this layer, not by mmdet's detector
    scores, _ = model(torch.randn(2, 3, 64, 96), mode='tensor')
    assert [tuple(s.shape[2:]) for s in scores] == [(16, 24), (8, 12), (4, 6), (2, 3), (1, 2)]
    sum(s.square().mean() for s in scores).backward()
    assert all(p.grad is not None for p in model.neck.parameters())


def test_global_attention_init_cfg_overrides_the_initialisation(tmp_path):
    pytest.importorskip('mmdet')
    model = detector(init_cfg=dict(type='Constant', layer='LayerNorm', val=3.0))
    model.init_weights()
    assert (model.neck[0].norm.weight == 3).all()
    weights = oracles.randomize(model.neck[0]).state_dict()
    torch.save(weights, tmp_path / 'layer.pth')
    model = detector(init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'layer.pth')))
    model.init_weights()
    assert all(torch.equal(value, weights[name]) for name, value in model.neck[0].state_dict().items())

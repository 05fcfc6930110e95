"""The video backbone against the image backbone and a loop over token pairs, and its documented behaviour."""

import itertools
import math

import oracles
import pytest
import torch
from attention_oracle import brute_force_attention
from mmengine.registry import MODELS
from torch import Tensor

import swinv2_mm  # noqa: F401
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.attention import WindowAttention

# no stage with one head: the rounding of PyTorch's product with a single row depends on the number of rows
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
ALL_STAGES = (0, 1, 2, 3)


def build(**kwargs) -> SwinTransformer3DV2:
    kwargs = dict(arch=ARCH, window_size=(2, 4, 4), drop_path_rate=0.0, out_indices=ALL_STAGES) | kwargs
    return oracles.randomize(SwinTransformer3DV2(**kwargs))


def image_model(**kwargs) -> SwinTransformerV2:
    return oracles.randomize(SwinTransformerV2(**dict(arch=ARCH, window_size=4, drop_path_rate=0.0) | kwargs)).eval()


def clip(*size: int, batch: int = 1) -> Tensor:
    return torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))


# --- against the image backbone ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('window', 'frames', 'patch_frames'),
    [
        ((1, 4, 4), 8, 2),
        ((2, 4, 4), 10, 2),  # padded by a frame
        ((3, 4, 4), 7, 1),  # by two frames
        ((4, 4, 4), 4, 1),  # one window in time
        ((4, 4, 4), 10, 2),  # shifted by two, and padded by three
        ((16, 4, 4), 8, 2),  # shrunk
        ((2, 7, 7), 7, 1),
        ((4, 3, 5), 8, 1),  # not padded in time
    ],
)
@torch.no_grad()
def test_swin_v2_3d_of_a_still_clip_equals_the_image(window, frames, patch_frames):
    """The purpose of inflation; windows are shifted on every axis, and padded on most."""
    images = image_model(window_size=window[1:], pretrained_window_sizes=(6, 6, 6, 3)).double()
    video = build(window_size=window, patch_size=(patch_frames, 4, 4)).double().eval()
    video.load_state_dict(images.state_dict())
    x = clip(72, 56).double()
    for still, moving in zip(images(x), video(x[:, :, None].repeat(1, 1, frames, 1, 1)), strict=True):
        assert moving.shape[2] == frames // patch_frames
        torch.testing.assert_close(moving, still[:, :, None].expand_as(moving), rtol=1e-10, atol=1e-10)


@torch.no_grad()
def test_swin_v2_3d_frames_attend_to_each_other():
    """Also across the window borders of even blocks, through the shifted windows of odd blocks."""
    images, video = image_model().double(), build(patch_size=(1, 4, 4)).double().eval()
    video.load_state_dict(images.state_dict())
    x = clip(6, 32, 32).double()
    changed = x.clone()
    changed[:, :, 0] += 1
    difference = (video(x)[0] - video(changed)[0]).abs().amax((0, 1, 3, 4))
    assert difference[2] > 1e-6  # reached through the shifted window 1-2, after the window 0-1
    assert (difference[3:] == 0).all()  # two blocks reach no further
    assert not torch.allclose(video(x)[0][:, :, 0], images(x[:, :, 0])[0], atol=1e-3)


@pytest.mark.parametrize('window', [4, 7])
@torch.no_grad()
def test_swin_v2_3d_of_one_frame_equals_the_image(window):
    images = image_model(window_size=window)
    video = build(window_size=(1, window, window), patch_size=(1, 4, 4)).eval()
    video.load_state_dict(images.state_dict())
    x = clip(72, 56, batch=2)
    for still, moving in zip(images(x), video(x[:, :, None]), strict=True):
        assert (moving[:, :, 0] - still).abs().max() == 0.0


@pytest.mark.parametrize('arch', ['tiny', 'giant'])  # without extra norms, and with them
def test_swin_v2_3d_has_the_parameters_of_the_image_model_and_a_time_column(arch):
    with torch.device('meta'):
        images, video = SwinTransformerV2(arch, out_indices=(3,)), SwinTransformer3DV2(arch)
    blocks = sum(len(stage.blocks) for stage in images.layers)
    patch = images.patch_embed.proj.weight.numel()  # a second frame
    counts = [sum(p.numel() for p in model.parameters()) for model in (images, video)]
    assert counts[1] == counts[0] + patch + 512 * blocks


# --- against the definition -------------------------------------------------------------------------------------------


def position_bias(layer: WindowAttention, pretrained: tuple[int, ...]) -> Tensor:
    """Bias table computed offset by offset: (heads, offsets)."""
    mlp = layer.cpb_mlp
    columns = []
    for offset in itertools.product(*(range(1 - w, w) for w in layer.window_size)):
        scaled = [8 * d / max(p - 1, 1) for d, p in zip(offset, pretrained, strict=True)]
        coords = torch.tensor([math.copysign(math.log2(1 + abs(s)) / 3, s) for s in scaled], dtype=torch.float64)
        hidden = (mlp[0].weight @ coords + mlp[0].bias).clamp(min=0)
        columns.append(16 / (1 + (-(mlp[2].weight @ hidden)).exp()))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    ('size', 'window', 'shift'),
    [
        ((4, 4, 4), (2, 2, 2), (1, 1, 1)),  # shifted
        ((3, 5, 3), (2, 2, 2), (1, 1, 1)),  # shifted and padded
        ((2, 3, 3), (4, 4, 4), (2, 2, 2)),  # shrunk
        ((2, 3, 5), (4, 2, 2), (2, 1, 1)),  # shrunk only in time
        ((3, 2, 3), (2, 3, 2), (1, 1, 1)),  # only in height
        ((3, 3, 2), (2, 2, 4), (1, 1, 2)),  # only in width
    ],
)
@torch.no_grad()
def test_window_attention_module_equals_its_definition(size, window, shift):
    pretrained = (3, 6, 2)
    layer = oracles.randomize(WindowAttention(6, 2, window, shift, pretrained)).double()
    x = torch.randn(*size, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    qkv = x @ layer.qkv.weight.T + torch.cat([layer.q_bias, torch.zeros(6).double(), layer.v_bias])
    # coordinates are in float32, whatever the dtype of the weights
    attended = brute_force_attention(
        qkv.view(*size, 3, 2, 3), layer.logit_scale, position_bias(layer, pretrained), window, shift
    )
    expected = attended @ layer.proj.weight.T + layer.proj.bias
    torch.testing.assert_close(layer(x[None])[0], expected, rtol=1e-5, atol=1e-5)


# --- clips ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('size', 'patch_frames'),
    [((8, 64, 64), 2), ((5, 65, 33), 2), ((1, 40, 100), 2), ((16, 7, 7), 1), ((1, 1, 1), 1), ((1, 1, 1), 2)],
)
@torch.no_grad()
def test_swin_v2_3d_takes_any_clip_size(size, patch_frames):
    outs = build(patch_size=(patch_frames, 4, 4)).eval()(clip(*size))
    assert [tuple(o.shape) for o in outs] == [
        (1, 16 * 2**i, math.ceil(size[0] / patch_frames), math.ceil(size[1] / s), math.ceil(size[2] / s))
        for i, s in enumerate((4, 8, 16, 32))
    ]
    assert all(o.isfinite().all() for o in outs)


@torch.no_grad()
def test_swin_v2_3d_shrinks_a_window_longer_than_the_clip():
    x, pretrained = clip(6, 64, 40), (5, 4, 4)
    large = build(window_size=(8, 4, 4), pretrained_window_sizes=pretrained).eval()
    exact = build(window_size=(3, 4, 4), pretrained_window_sizes=pretrained).eval()
    for a, b in zip(large(x), exact(x), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_swin_v2_3d_returns_a_tensor_for_one_output_and_a_tuple_for_several():
    """As expected by the heads of mmaction."""
    x = clip(4, 32, 32)
    backbone = build().eval()
    outs = backbone(x)
    assert isinstance(outs, tuple)
    for i in ALL_STAGES:
        single = build(out_indices=(i,)).eval()
        single.load_state_dict(backbone.state_dict())
        assert torch.equal(single(x), outs[i])


def test_swin_v2_3d_has_every_gradient_also_when_saving_memory():
    def grads(**kwargs) -> dict[str, Tensor]:
        backbone = build(**kwargs).train()
        sum(o.square().mean() for o in backbone(clip(6, 40, 56, batch=2))).backward()
        return {name: p.grad for name, p in backbone.named_parameters()}

    expected = grads()
    assert all(grad is not None and grad.abs().max() > 0 for name, grad in expected.items() if 'scale' not in name)
    for options in (dict(with_cp=True), dict(sequential_stages=ALL_STAGES)):
        for name, grad in grads(**options).items():
            torch.testing.assert_close(grad, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_swin_v2_3d_trains_the_time_column_after_inflation():
    video = build(patch_size=(1, 4, 4), out_indices=(3,))  # without drop path, which drops whole blocks
    video.load_state_dict(image_model().state_dict())
    video(clip(4, 32, 32)).square().mean().backward()
    columns = [p for name, p in video.named_parameters() if name.endswith('cpb_mlp.0.weight')]
    assert all((p[:, 0] == 0).all() and (p[:, 1:] != 0).any() for p in columns)
    assert all(p.grad[:, 0].abs().max() > 0 for p in columns)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_swin_v2_3d_gradients_are_finite_under_autocast_with_padding(dtype):
    backbone = build()
    with torch.autocast('cpu', dtype=dtype):
        loss = sum(o.float().square().mean() for o in backbone(clip(5, 72, 56)))
    (loss * 1024).backward()
    for name, p in backbone.named_parameters():
        assert p.grad.isfinite().all(), name


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('window_size', 'windows'),
    [
        (8, [(8, 8, 8)] * 4),
        ((8, 7, 7), [(8, 7, 7)] * 4),
        ((8, 8, 8, 4), [(8, 8, 8)] * 3 + [(4, 4, 4)]),
        (((8, 7, 7),) * 3 + ((8, 4, 4),), [(8, 7, 7)] * 3 + [(8, 4, 4)]),
    ],
)
def test_swin_v2_3d_window_size_per_axis_or_stage(window_size, windows):
    with torch.device('meta'):
        backbone = SwinTransformer3DV2(arch=ARCH, window_size=window_size)
    assert backbone.windows == windows
    for stage, window in zip(backbone.layers, windows, strict=True):
        assert [block.attn.shift_size for block in stage.blocks] == [(0, 0, 0), tuple(w // 2 for w in window)]


@pytest.mark.parametrize(
    ('pretrained', 'windows'),
    [
        (None, [(8, 7, 7)] * 4),
        (12, [(8, 12, 12)] * 4),
        ((12, 12, 12, 6), [(8, 12, 12)] * 3 + [(8, 6, 6)]),
        ((4, 12, 12), [(4, 12, 12)] * 4),
        (((0, 12, 12),) * 3 + ((4, 6, 6),), [(8, 12, 12)] * 3 + [(4, 6, 6)]),
    ],
)
def test_swin_v2_3d_pretrained_window_sizes_of_one_number_is_height_and_width(pretrained, windows):
    backbone = SwinTransformer3DV2(arch=ARCH, window_size=(8, 7, 7), pretrained_window_sizes=pretrained)
    stored = [stage.blocks[0].attn.cpb_mlp.pretrained_window_size for stage in backbone.layers]
    assert [tuple(window.tolist()) for window in stored] == windows


@pytest.mark.parametrize(
    ('kwargs', 'message'),
    [
        (dict(window_size=(8, 7)), r'one number, 3 for the axes, or one entry for each of the 4 stages, got \(8, 7\)'),
        (dict(window_size=((8, 7),) * 4), 'window_size of stage 0 must be a number of at least 1, or 3 of them'),
        (dict(patch_size=(4, 4)), 'patch_size must be a number of at least 1, or 3 of them'),
        (
            dict(arch=dict(embed_dims=8, depths=(1, 1, 1), num_heads=(1, 1, 1)), window_size=(8, 7, 7)),
            r'window_size=\(8, 7, 7\) may mean axes or stages: write 3 numbers for each stage',
        ),
    ],
)
def test_swin_v2_3d_names_invalid_arguments(kwargs, message):
    with pytest.raises(ValueError, match=message):
        build(**kwargs)


@pytest.mark.parametrize('shape', [(1, 3, 32, 32), (1, 1, 3, 8, 32, 32), (1, 8, 3, 32, 32)])
def test_swin_v2_3d_names_the_expected_input_shape(shape):
    with pytest.raises(ValueError, match=r'SwinTransformer3DV2 takes an input of shape \(N, 3, T, H, W\), got'):
        build()(torch.zeros(shape))


def test_swin_v2_3d_in_a_recognizer_of_mmaction():
    pytest.importorskip('mmaction')
    from mmaction.structures import ActionDataSample
    from mmengine.registry import DefaultScope

    config = dict(
        type='Recognizer3D',
        backbone=dict(type='swinv2_mm.SwinTransformer3DV2', arch=ARCH, window_size=(2, 4, 4)),
        cls_head=dict(type='I3DHead', num_classes=5, in_channels=128, average_clips='prob'),
    )
    with DefaultScope.overwrite_default_scope('mmaction'):
        model = MODELS.build(config)
    clips = torch.randn(2, 3, 3, 4, 32, 32, generator=torch.Generator().manual_seed(1))  # two videos of three views
    samples = [ActionDataSample().set_gt_label(i) for i in range(2)]
    assert type(model.backbone) is SwinTransformer3DV2
    assert model(clips[:, :1].contiguous(), samples, mode='loss')['loss_cls'].isfinite()
    model.eval()
    with torch.no_grad():
        together = model(clips.contiguous(), samples, mode='predict')
        for video, sample in zip(clips, together, strict=True):
            views = [
                model(view[None, None].contiguous(), [ActionDataSample()], mode='predict')[0].pred_score
                for view in video
            ]
            torch.testing.assert_close(sample.pred_score, torch.stack(views).mean(0))

"""Checkpoints for other input channels and patch sizes, compared with timm's conversion of the same weights."""

import itertools
import re

import layouts
import oracles
import pytest
import torch
import torch.nn.functional as F
from loading_paths import ALL_STAGES, official_weights, source_backbone
from mmengine.runner import load_checkpoint

from swinv2_mm.checkpoints import CheckpointError
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2

NAME = 'patch_embed.proj.weight'
VIDEO = ALL_STAGES | dict(window_size=(2, 8, 8))


def by_timm(kernel, channels, patch):
    oracles.find_peers()
    from timm.layers.patch_embed import resample_patch_embed
    from timm.models._manipulate import adapt_input_conv

    return resample_patch_embed(adapt_input_conv(channels, kernel), list(patch))


def kernel_of(model):
    return model.patch_embed.proj.weight.detach()


@pytest.mark.parametrize('channels', [1, 2, 4, 6, 13])
def test_adapt_patch_embed_channels_as_timm(channels):
    """Equal up to rounding; all other weights are those of the file."""
    source = source_backbone()
    model = SwinTransformerV2(**ALL_STAGES, in_channels=channels)
    with layouts.recorded_log() as log:
        model.load_state_dict(official_weights(source))
    torch.testing.assert_close(kernel_of(model), by_timm(kernel_of(source), channels, (4, 4)), rtol=0, atol=1e-6)
    weights, expected = model.state_dict(), source.state_dict()
    assert [name for name, v in expected.items() if name != NAME and not torch.equal(weights[name], v)] == []
    (line,) = [line for line in log if 'patch embedding' in line]
    assert line.endswith(f'from 3 channels to {channels}')


@pytest.mark.parametrize('patch', [(2, 2), (8, 8), (4, 6), (16, 2), (7, 7)])
def test_adapt_patch_embed_patch_size_as_timm(patch):
    source = source_backbone()
    model = SwinTransformerV2(**ALL_STAGES, patch_size=patch)
    with layouts.recorded_log() as log:
        model.load_state_dict(official_weights(source))
    torch.testing.assert_close(kernel_of(model), by_timm(kernel_of(source), 3, patch), rtol=0, atol=1e-6)
    assert [line for line in log if f'from patches of 4x4 to {patch[0]}x{patch[1]}' in line]


def test_adapt_patch_embed_keeps_the_embedding_of_larger_patches():
    """The purpose of the resampling; here torch resizes the patches."""
    source = source_backbone()
    model = SwinTransformerV2(**ALL_STAGES, patch_size=(8, 6))
    model.load_state_dict(official_weights(source))
    patches = torch.randn(5, 3, 4, 4)
    resized = F.interpolate(patches, size=(8, 6), mode='bicubic', antialias=True)
    torch.testing.assert_close(model.patch_embed.proj(resized), source.patch_embed.proj(patches), rtol=1e-4, atol=1e-5)


# in place of all layouts and loading paths: our own keys are not converted, a file of a detector passes the loaders
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_adapt_patch_embed_of_our_own_file(dtype, tmp_path):
    source = source_backbone()
    state = {f'backbone.{name}': v.to(dtype) if v.is_floating_point() else v for name, v in source.state_dict().items()}
    torch.save({'state_dict': state, 'meta': {}}, tmp_path / 'file.pth')
    model = SwinTransformerV2(**ALL_STAGES, in_channels=4, patch_size=8)
    load_checkpoint(model, str(tmp_path / 'file.pth'))
    expected = by_timm(kernel_of(source).to(dtype).float(), 4, (8, 8)).to(dtype).float()
    accuracy = dict(rtol=torch.finfo(dtype).eps * 2, atol=torch.finfo(dtype).eps) if dtype.itemsize == 2 else {}
    torch.testing.assert_close(kernel_of(model), expected, **dict(dict(rtol=0, atol=1e-6), **accuracy))


@pytest.mark.parametrize(('channels', 'patch'), itertools.product([1, 3, 4], [(4, 4), (8, 6)]))
def test_adapt_patch_embed_of_an_image_file_for_a_video_model(channels, patch):
    """A clip of equal frames still has the embedding of the frame."""
    source = source_backbone()
    image = SwinTransformerV2(**ALL_STAGES, in_channels=channels, patch_size=patch)
    video = SwinTransformer3DV2(**VIDEO, in_channels=channels, patch_size=(2, *patch))
    for model in (image, video):
        model.load_state_dict(official_weights(source))
    expected = by_timm(kernel_of(source), channels, patch)
    torch.testing.assert_close(kernel_of(video), expected[:, :, None].expand_as(kernel_of(video)) / 2)
    x = torch.randn(1, channels, 24, 24)
    torch.testing.assert_close(video.patch_embed(x[:, :, None].repeat(1, 1, 2, 1, 1))[:, 0], image.patch_embed(x))


def test_adapt_patch_embed_of_a_video_file():
    source = oracles.randomize(SwinTransformer3DV2(**VIDEO))
    model = SwinTransformer3DV2(**VIDEO, in_channels=4, patch_size=(2, 8, 6))
    model.load_state_dict(source.state_dict())
    for frame in range(2):
        expected = by_timm(kernel_of(source)[:, :, frame], 4, (8, 6))
        torch.testing.assert_close(kernel_of(model)[:, :, frame], expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('channels', [1, 4])
@pytest.mark.parametrize('make', [SwinTransformerV2, SwinTransformer3DV2])
def test_adapt_patch_embed_not_for_the_same_channels(make, channels):
    options = dict(ALL_STAGES if make is SwinTransformerV2 else VIDEO, in_channels=channels)
    source, model = oracles.randomize(make(**options)), make(**options)
    with layouts.recorded_log() as log:
        model.load_state_dict(source.state_dict())
    assert torch.equal(kernel_of(model), kernel_of(source))
    assert not [line for line in log if 'patch embedding' in line]


@pytest.mark.parametrize(('theirs', 'ours'), [(1, 3), (4, 7), (4, 3), (6, 1)])
def test_adapt_patch_embed_refuses_other_channels_than_rgb(theirs, ours):
    state = SwinTransformerV2(**ALL_STAGES, in_channels=theirs).state_dict()
    model = SwinTransformerV2(**ALL_STAGES, in_channels=ours)
    before = kernel_of(model).clone()
    message = f'takes {theirs} channels and that of the model {ours}, .*set in_channels={theirs}, or .*' + re.escape(
        f'{NAME} of shape (16, {ours}, 4, 4)'
    )
    with pytest.raises(CheckpointError, match=message):
        model.load_state_dict(state)
    assert torch.equal(kernel_of(model), before)
    # the other suggestion of the message
    model.load_state_dict(state | {NAME: torch.ones(16, ours, 4, 4)})
    assert kernel_of(model).eq(1).all()


def test_adapt_patch_embed_refuses_other_frames():
    state = SwinTransformer3DV2(**VIDEO, patch_size=(2, 4, 4)).state_dict()
    with pytest.raises(CheckpointError, match=r'2 frames and those of the model 4: set patch_size=\(2, 8, 8\)'):
        SwinTransformer3DV2(**VIDEO, patch_size=(4, 8, 8)).load_state_dict(state)

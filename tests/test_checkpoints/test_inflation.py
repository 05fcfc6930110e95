"""Checkpoints of image models in video models, in every layout; and video checkpoints in larger windows."""

import copy
import re
from pathlib import Path

import layouts
import oracles
import pytest
import torch
from layouts import ARCH, PRETRAINED, arch_of, pretrained_of, save, source, weights_in_file
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner, load_checkpoint
from mmengine.runner.checkpoint import save_checkpoint

from swinv2_mm.checkpoints import CheckpointError, load_swinv2_state_dict
from swinv2_mm.checkpoints.conversion import write_windows
from swinv2_mm.models import SwinTransformer3DV2, SwinTransformerV2
from swinv2_mm.models.log_cpb import LogCPB

CONFIGS = Path(__file__).parents[2] / 'configs' / 'video'
ALL = (0, 1, 2, 3)
WINDOW = (4, 8, 8)


def build(arch=ARCH, window=WINDOW, pretrained=None, out_indices=ALL, **kwargs):
    return SwinTransformer3DV2(arch, window, pretrained, drop_path_rate=0.0, out_indices=out_indices, **kwargs).eval()


def windows_of(backbone):
    """Pre-training windows of the stages; assert that all blocks of a stage have the same."""
    stages = []
    for stage in backbone.layers:
        (window,) = {tuple(block.attn.cpb_mlp.pretrained_window_size.tolist()) for block in stage.blocks}
        stages.append(window)
    return stages


def with_time(frames, windows=PRETRAINED):
    return [(frames, w, w) for w in windows]


def frame(size=64, dtype=torch.float32):
    return torch.randn(1, 3, size, size, dtype=dtype, generator=torch.Generator().manual_seed(1))


def still(image, frames=8):
    return image[:, :, None].repeat(1, 1, frames, 1, 1)


def inflated(name, value, frames):
    """The expected weight, by the rule of Video Swin."""
    if name == 'patch_embed.proj.weight':
        return torch.stack([value / frames] * frames, 2)
    if name.endswith('cpb_mlp.0.weight'):
        return torch.cat([torch.zeros(512, 1), value], 1)
    return value


# From images to video


# layouts that differ in extra norms, tables and output norms; all layouts are in `test_layouts.py`
@pytest.mark.parametrize(
    ('writer', 'frames'),
    [('official', 1), ('official', 2), ('hf_backbone', 4), ('msra_dense', 2), ('mmpretrain', 2), ('torchvision', 4)],
)
def test_inflate_a_file_of_any_layout(writer, frames, tmp_path):
    weights, model = source(writer)
    path = save(writer, model, tmp_path / 'file.pth')
    backbone = build(arch_of(writer), pretrained=pretrained_of(writer), patch_size=(frames, 4, 4))
    fresh = layouts.canonical(backbone)
    load_checkpoint(backbone, path)
    expected = weights_in_file(writer, weights)
    for name, value in layouts.canonical(backbone).items():
        assert torch.equal(value, inflated(name, expected[name], frames) if name in expected else fresh[name]), name
    assert set(expected) <= set(fresh)
    assert windows_of(backbone) == with_time(4)


@pytest.mark.parametrize('window', [8, 16])
@torch.no_grad()
def test_inflate_a_still_clip_has_the_features_of_timm(window, tmp_path):
    """An image model of timm, its file, and the inflated video model, also with another window."""
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Peer

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    weights = layouts.canonical(oracles.randomize(SwinTransformerV2(ARCH)))
    peer = Peer(128, window_size=window, pretrained_window_sizes=(6, 6, 6, 3), num_classes=5, **arch).double().eval()
    peer.load_state_dict(layouts.timm_new({k: v.double() for k, v in weights.items()}))
    torch.save(layouts.timm_new(weights), tmp_path / 'file.pth')
    backbone = build(window=(3, window, window), pretrained=(6, 6, 6, 3))
    load_checkpoint(backbone, str(tmp_path / 'file.pth'))
    image = frame(128, torch.float64)
    expected = oracles.timm_features(peer, backbone.double(), image)
    for ours, theirs in zip(backbone(still(image)), expected, strict=True):
        torch.testing.assert_close(ours, theirs[:, :, None].expand_as(ours), rtol=1e-6, atol=1e-6)


def test_inflate_patch_embed_as_mmaction(tmp_path):
    """Swin V1 has the same patch embedding: mmaction's code converts its file, ours the same weights."""
    pytest.importorskip('mmaction')
    from mmaction.models import SwinTransformer3D

    arch = dict(embed_dims=16, depths=[1], num_heads=[1])
    options = dict(patch_size=(2, 4, 4), window_size=(2, 7, 7), out_indices=(0,), pretrained2d=True)
    path = tmp_path / 'v1.pth'
    theirs = SwinTransformer3D(arch, pretrained=str(path), **options)
    _, model = source('official')
    table = {'layers.0.blocks.0.attn.relative_position_bias_table': torch.zeros(13 * 13, 1)}
    patch = {k: v for k, v in model.items() if k.startswith('patch_embed.')}
    torch.save({'model': table | patch}, path)
    theirs.init_weights()
    ours = build()
    ours.load_state_dict(model)
    for name, value in theirs.patch_embed.state_dict().items():
        assert torch.equal(ours.patch_embed.state_dict()[name], value), name


# Windows


@pytest.mark.parametrize(
    ('writer', 'pretrained', 'time'),
    [
        ('official', None, 4),
        ('official', PRETRAINED, 4),
        ('official', with_time(7), 7),
        ('timm_new', PRETRAINED, 4),
        ('timm_new', with_time(0), 4),
        ('timm_new', with_time(7), 7),
        ('timm_new', None, None),
    ],
)
def test_inflate_temporal_window_of_config_or_model(writer, pretrained, time):
    _, model = source(writer)
    backbone = build(pretrained=pretrained)
    if time is None:
        with pytest.raises(CheckpointError, match='pass pretrained_window_sizes to the backbone, one number per stage'):
            backbone.load_state_dict(model)
        return
    backbone.load_state_dict(model)
    assert windows_of(backbone) == with_time(time)


def test_inflate_refuses_a_contradicting_config():
    _, model = source('official')
    with pytest.raises(CheckpointError, match='window of stage 0 is 4x6x6, but the config has 0x8x8'):
        build(pretrained=8).load_state_dict(model)


def test_inflate_logs_the_new_temporal_axis():
    _, model = source('official')
    with layouts.recorded_log() as log:
        build().load_state_dict(model)
    (inflation,) = [line for line in log if 'inflated' in line]
    assert 'with 2 frames a patch' in inflation
    assert inflation.endswith('scaled by windows of 4, 4, 4, 4')
    assert any('stage 3' in line and 'pre-training window 4x3x3' in line and 'used with 4x8x8' in line for line in log)


@torch.no_grad()
def test_video_checkpoint_in_larger_windows(tmp_path):
    """In steps through saved files or at once; both keep the bias of the offsets of the smaller window."""
    _, model = source('official')
    first = build(window=(4, 8, 8))
    first.load_state_dict(model)
    for block in (block for stage in first.layers for block in stage.blocks):
        torch.nn.init.uniform_(block.attn.cpb_mlp[0].weight, -0.4, 0.4)  # also of time, as after a training
    torch.save(first.state_dict(), tmp_path / 'first.pth')
    second, third, direct = build(window=(6, 10, 12)), build(window=(8, 12, 16)), build(window=(8, 12, 16))
    load_checkpoint(second, str(tmp_path / 'first.pth'))
    torch.save(second.state_dict(), tmp_path / 'second.pth')
    with layouts.recorded_log() as log:
        load_checkpoint(third, str(tmp_path / 'second.pth'))
        load_checkpoint(direct, str(tmp_path / 'first.pth'))
    assert not any('inflated' in line for line in log)
    assert any('used with 8x12x16; extrapolates by' in line for line in log)
    assert windows_of(third) == windows_of(direct) == with_time(4)
    clip = torch.randn(1, 3, 16, 48, 64)
    for a, b, c in zip(third(clip), direct(clip), first(clip), strict=True):
        assert torch.equal(a, b)
        assert not torch.allclose(a, c, atol=1e-3)
    small, large = (
        [block.attn.cpb_mlp for stage in backbone.layers for block in stage.blocks] for backbone in (first, third)
    )
    for before, after in zip(small, large, strict=True):
        middle = after().unflatten(1, (15, 23, 31))[:, 4:11, 4:19, 8:23]
        torch.testing.assert_close(before().unflatten(1, (7, 15, 15)), middle, rtol=1e-6, atol=1e-6)


def test_write_windows_of_height_and_width_into_a_video_checkpoint(tmp_path):
    """One number per stage, as for the converter and the plot of the bias."""
    backbone = build(pretrained=with_time(3))
    assert windows_of(backbone) == with_time(3)
    torch.save(backbone.state_dict(), tmp_path / 'file.pth')
    weights = load_swinv2_state_dict(str(tmp_path / 'file.pth'))
    assert all(torch.equal(value, weights[name]) for name, value in write_windows(weights, PRETRAINED).items())
    with pytest.raises(CheckpointError, match='window of stage 0 is 3x6x6, but the config has 0x8x8'):
        write_windows(weights, (8, 8, 8, 8))


def test_video_checkpoint_in_an_image_model_is_an_error():
    with pytest.raises(CheckpointError, match='is 4x8x8, which has another number of axes than .*, 8x8'):
        SwinTransformerV2(ARCH, 8).load_state_dict(build().state_dict())


def test_video_checkpoint_with_other_frames_per_patch_is_an_error():
    other = build(patch_size=(1, 4, 4))
    with pytest.raises(CheckpointError, match=re.escape('2 frames and those of the model 1: set patch_size=(2, 4, 4)')):
        other.load_state_dict(build().state_dict())


# Loading paths


def recognizer_config(init_cfg=None):
    cfg = Config.fromfile(CONFIGS / 'swinv2_t_k400_224x224x32.py')
    cfg.model.backbone.update(arch=ARCH, window_size=WINDOW, drop_path_rate=0.0, init_cfg=init_cfg)
    cfg.model.cls_head.update(in_channels=128, num_classes=3)
    return cfg


def recognizer(init_cfg=None):
    with DefaultScope.overwrite_default_scope('mmaction'):
        return MODELS.build(recognizer_config(init_cfg).model).eval()


def by_init_cfg(path, _):
    model = recognizer(dict(type='Pretrained', checkpoint=path))
    model.init_weights()
    return model


def by_load_checkpoint(path, _):
    model = recognizer()
    load_checkpoint(model, path)
    return model


def by_copy(path, _):
    model = copy.deepcopy(recognizer())
    load_checkpoint(model, path)
    return copy.deepcopy(model)


def by_meta_device(path, _):
    with torch.device('meta'):
        model = recognizer()
    model.backbone.load_state_dict(load_swinv2_state_dict(path), assign=True)
    return model


def by_load_from(path, folder):
    cfg = recognizer_config()
    for key in [key for key in cfg if key.startswith(('train_', 'val_', 'test_', 'optim_', 'param_', 'auto_'))]:
        cfg[key] = None
    cfg.update(load_from=path, work_dir=str(folder), log_level='ERROR', custom_hooks=[])
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    return runner.model


def by_init_recognizer(path, _):
    from mmaction.apis import init_recognizer

    return init_recognizer(recognizer_config(), path, device='cpu')


LOADING_PATHS = {
    'init_cfg': by_init_cfg,
    'load_checkpoint': by_load_checkpoint,
    'copy': by_copy,
    'meta device': by_meta_device,
    'load_from': by_load_from,
    'init_recognizer': by_init_recognizer,
}


@pytest.mark.parametrize('loading_path', LOADING_PATHS)
def test_inflate_an_image_file_for_a_recognizer(loading_path, tmp_path):
    pytest.importorskip('mmaction')
    weights, model = source('official')
    backbone = LOADING_PATHS[loading_path](save('official', model, tmp_path / 'file.pth'), tmp_path).backbone
    for name, value in layouts.canonical(backbone).items():
        assert torch.equal(value, inflated(name, weights[name], 2)), name
    assert windows_of(backbone) == with_time(4)


def test_window_buffers_in_a_checkpoint_of_a_recognizer(tmp_path):
    """From an image file to a saved checkpoint, which needs no option in the config."""
    pytest.importorskip('mmaction')
    _, model = source('official')
    first = by_init_cfg(save('official', model, tmp_path / 'file.pth'), None)
    save_checkpoint({'state_dict': first.state_dict(), 'meta': {'epoch': 1}}, str(tmp_path / 'epoch_1.pth'))
    again = by_load_checkpoint(str(tmp_path / 'epoch_1.pth'), None)
    assert windows_of(again.backbone) == with_time(4)
    clip = torch.randn(1, 3, 4, 32, 32)
    with torch.no_grad():
        assert torch.equal(again.backbone(clip), first.eval().backbone(clip))


# Errors


@pytest.mark.parametrize(
    ('name', 'value', 'message'),
    [
        ('patch_embed.proj.weight', torch.zeros(8, 3, 4, 4), '(8, 3, 2, 4, 4) for (16, 3, 2, 4, 4)'),
        ('patch_embed.proj.weight', torch.zeros(16, 3, 4, 4, dtype=torch.int8), '(torch.int8, torch.strided, cpu)'),
        ('patch_embed.proj.weight', torch.zeros(16, 3, 4, 4).to_sparse(), '(16, 3, 4, 4) for (16, 3, 2, 4, 4)'),
        ('layers.1.blocks.0.attn.cpb_mlp.0.weight', torch.zeros(512), '(512,) for (512, 3)'),
        ('layers.1.blocks.0.attn.cpb_mlp.0.weight', torch.zeros(512, 3), '(512, 4) for (512, 3)'),
        ('layers.1.blocks.0.mlp.fc1.weight', torch.zeros(2, 2), '(2, 2) for (128, 32)'),
    ],
)
def test_inflate_errors_change_no_weight(name, value, message):
    _, model = source('official')
    model[name] = value
    backbone = build()
    before = copy.deepcopy(backbone.state_dict())
    with pytest.raises(CheckpointError, match=re.escape(f'{name} {message}')):
        backbone.load_state_dict(model)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


def test_log_cpb_of_two_axes_is_that_of_three_without_time():
    """Tests the MLP without loading code."""
    images, video = LogCPB((5, 6), (3, 4), 2), LogCPB((2, 5, 6), (2, 3, 4), 2)
    with torch.no_grad():
        for mine, theirs in zip(video.parameters(), images.parameters(), strict=True):
            mine.copy_(torch.nn.functional.pad(theirs, (1, 0)) if mine.shape != theirs.shape else theirs)
    bias = video().unflatten(1, (3, 9 * 11))
    torch.testing.assert_close(bias, images()[:, None].expand_as(bias))

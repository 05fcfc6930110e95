"""Windows that differ from those of pre-training, which are read from the file or the config; errors otherwise."""

import functools
import math
import re
from itertools import product

import layouts
import oracles
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import load_checkpoint
from mmengine.runner.checkpoint import save_checkpoint
from nano import NANO_CONFIGS
from safetensors.torch import save_file

from swinv2_mm.checkpoints import CheckpointError, conversion, load_swinv2_state_dict
from swinv2_mm.models import SwinTransformerV2

# no stage of one head: PyTorch multiplies by a single row in another order for each number of rows, one bit off
ARCH = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
NANO = dict(embed_dims=4, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
DETECTOR = NANO_CONFIGS / 'det.py'


def build(window, pretrained=None, arch=ARCH, path=None, attention_backend='auto'):
    init_cfg = path and dict(type='Pretrained', checkpoint=str(path))
    backbone = SwinTransformerV2(
        arch, window, pretrained, drop_path_rate=0.0, attention_backend=attention_backend, init_cfg=init_cfg
    )
    if path:
        backbone.init_weights()
    return backbone.eval()


@functools.cache
def weights_once(**arch):
    return layouts.canonical(oracles.randomize(build(8, arch=arch)))


def weights_of(arch=ARCH):
    """Random weights; the dict may be changed, not the tensors."""
    return dict(weights_once(**arch))


def official_file(path, windows, pretrained, arch=ARCH):
    torch.save(layouts.official(weights_of(arch), windows, pretrained), path)
    return path


def file_without_windows(path, arch=ARCH):
    """A file without pre-training windows."""
    torch.save(layouts.timm_new(weights_of(arch)), path)
    return path


def windows_of(backbone):
    """Pre-training windows of the stages; assert that all blocks of a stage have the same."""
    stages = []
    for stage in backbone.layers:
        of_blocks = {tuple(block.attn.cpb_mlp.pretrained_window_size.tolist()) for block in stage.blocks}
        assert len(of_blocks) == 1
        stages += of_blocks
    return stages


def windows_in(weights):
    """The same, of a state dict, with the stages for which it has them."""
    found = {}
    for name, value in weights.items():
        if name.endswith('pretrained_window_size'):
            found.setdefault(int(name.split('.')[1]), set()).add(tuple(value.tolist()))
    assert all(len(of_blocks) == 1 for of_blocks in found.values())
    return {stage: of_blocks.pop() for stage, of_blocks in found.items()}


def square(*windows):
    return [(w, w) for w in windows]


def image(size):
    return torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(1))


# Features


def timm_model(size, window, pretrained):
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2 as Peer

    arch = dict(embed_dim=ARCH['embed_dims'], depths=ARCH['depths'], num_heads=ARCH['num_heads'])
    model = Peer(size, window_size=window, pretrained_window_sizes=pretrained, num_classes=5, **arch)
    model.load_state_dict(layouts.timm_new(weights_of()))
    return model.eval()


@pytest.mark.parametrize(
    ('size', 'window', 'file', 'per_stage'),
    [(256, 16, 'timm', True), (192, 24, 'official', False)],
)
@torch.no_grad()
def test_window_12_becomes_16_and_24_as_in_timm(file, size, window, per_stage, tmp_path):
    """The last stage goes from 6 to 8, or keeps 6, by the config or because its feature map is no larger."""
    path, cfg_windows = tmp_path / 'model.pth', None
    if file == 'official':
        official_file(path, (12, 12, 12, 6), (12, 12, 12, 6))
    else:
        file_without_windows(path)
        cfg_windows = (12, 12, 12, 6)
    windows = (window, window, window, window // 2) if per_stage else window
    backbone = build(windows, cfg_windows, path=path, attention_backend='reference')
    assert windows_of(backbone) == square(12, 12, 12, 6)
    expected = oracles.timm_features(timm_model(size, window, (12, 12, 12, 6)), backbone, image(size))
    for ours, theirs in zip(backbone(image(size)), expected, strict=True):
        assert (ours - theirs).abs().max() == 0.0


@torch.no_grad()
def test_wrong_pretrained_window_changes_the_features(tmp_path):
    """The reason for the errors below: weights load with any window."""
    path = file_without_windows(tmp_path / 'model.pth')
    right, wrong = (build(8, p, path=path)(image(64)) for p in ((12, 12, 12, 6), 8))
    assert all((r - w).abs().max() > 1e-3 for r, w in zip(right, wrong, strict=True))


@torch.no_grad()
def test_window_transfer_in_steps(tmp_path):
    """8 -> 12 -> 16 through saved files is 8 -> 16: only the window of the first training matters."""
    first, second = official_file(tmp_path / 'w8.pth', (8,) * 4, (8,) * 4), tmp_path / 'w12.pth'
    torch.save(build(12, path=first).state_dict(), second)
    steps, direct = (build(16, path=path, attention_backend='reference') for path in (second, first))
    assert windows_of(steps) == windows_of(direct) == square(8, 8, 8, 8)
    expected = oracles.timm_features(timm_model(128, 16, (8,) * 4), direct, image(128))
    for a, b, c in zip(steps(image(128)), direct(image(128)), expected, strict=True):
        assert torch.equal(a, b)
        assert (b - c).abs().max() == 0.0


@torch.no_grad()
def test_window_buffers_in_a_checkpoint_of_a_detector(tmp_path):
    """Trained with window 16 from weights of window 8, saved, and loaded by a config without the 8."""
    pytest.importorskip('mmdet')
    arch = dict(ARCH, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
    path = official_file(tmp_path / 'w8.pth', (8,) * 4, (8,) * 4, arch)
    cfg = Config.fromfile(DETECTOR).model
    cfg.backbone.update(window_size=16, drop_path_rate=0.0)
    with DefaultScope.overwrite_default_scope('mmdet'):
        fresh = MODELS.build(cfg)
        cfg.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(path))
        detector = MODELS.build(cfg)
    detector.init_weights()
    assert windows_of(detector.backbone) == square(8, 8, 8, 8)
    assert windows_of(fresh.backbone) != square(8, 8, 8, 8)

    save_checkpoint({'state_dict': detector.state_dict(), 'meta': {'epoch': 1}}, str(tmp_path / 'epoch_1.pth'))
    load_checkpoint(fresh, str(tmp_path / 'epoch_1.pth'), strict=True)
    assert windows_of(fresh.backbone) == square(8, 8, 8, 8)
    for a, b in zip(detector.eval()(image(256)), fresh.eval()(image(256)), strict=True):
        assert all(torch.equal(*pair) for pair in zip(a, b, strict=True))


# Tables of coordinates


def read_windows(windows, pretrained, dtype):
    """Pre-training windows by the tables of four stages."""
    tables = {
        f'layers.{stage}.blocks.0.attn.relative_coords_table': layouts.coords_table(*pair).to(dtype)
        for stage, pair in enumerate(zip(windows, pretrained, strict=True))
    }
    return conversion.read_windows(tables, named_windows=None)


PAIRS = list(product((2, 3, 7, 8, 14, 24, 31, 64), (2, 3, 6, 8, 12, 13, 30, 64)))


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16])
def test_read_windows_is_exact(dtype):
    """Four stages with two axes of their own: eight pairs at once."""
    for start in range(0, len(PAIRS), 8):
        pairs = PAIRS[start : start + 8]
        windows = [(pairs[i][0], pairs[i + 1][0]) for i in range(0, 8, 2)]
        pretrained = [(pairs[i][1], pairs[i + 1][1]) for i in range(0, 8, 2)]
        assert read_windows(windows, pretrained, dtype) == pretrained, (windows, pretrained)


@pytest.mark.parametrize(
    ('windows', 'pretrained'),
    [
        ((8, 8, 8, 8), (8, 8, 8, 8)),
        ((16, 16, 16, 8), (16, 16, 16, 8)),
        ((12, 12, 12, 6), (12, 12, 12, 6)),
        ((16, 16, 16, 8), (12, 12, 12, 6)),
        ((24, 24, 24, 12), (12, 12, 12, 6)),
        ((14, 14, 14, 7), (12, 12, 12, 6)),
        ((30, 30, 30, 15), (12, 12, 12, 6)),
        ((40, 40, 40, 20), (12, 12, 12, 6)),
    ],
)
@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_read_windows_of_released_files(windows, pretrained, dtype):
    assert read_windows(windows, pretrained, dtype) == square(*pretrained)


def test_read_windows_in_half_precision(tmp_path):
    weights = layouts.official(weights_of(NANO), (14, 14, 14, 7), (12, 12, 12, 6))
    save_file({k: v.half() for k, v in weights.items() if v.is_floating_point()}, tmp_path / 'model.safetensors')
    found = windows_in(load_swinv2_state_dict(str(tmp_path / 'model.safetensors')))
    assert found == dict(enumerate(square(12, 12, 12, 6)))


def test_read_windows_that_are_not_square(tmp_path):
    path = official_file(
        tmp_path / 'model.pth', [(8, 4), (8, 4), (6, 9), (3, 2)], [(8, 4), (6, 4), (4, 9), (3, 2)], NANO
    )
    backbone = build([(16, 8)] * 4, arch=NANO, path=path)
    assert windows_of(backbone) == [(8, 4), (6, 4), (4, 9), (3, 2)]


def linear(windows, scale):
    """A table without the logarithm."""
    offsets = [torch.arange(1 - w, w, dtype=torch.float32) / (w - 1) * scale for w in windows]
    return torch.stack(torch.meshgrid(*offsets, indexing='ij'), -1)[None]


@pytest.mark.parametrize(
    'table',
    [
        linear((8, 8), 8),
        linear((8, 8), 1),
        layouts.coords_table(8, 8) * 3 * 0.6931,  # natural logarithm
        layouts.coords_table(8, 8) * 1.05,  # of no integer window
        layouts.coords_table(8, 8).flip(1),
        layouts.coords_table(8, 8).flip(-1),
        torch.full((1, 15, 15, 2), torch.nan),
        torch.zeros(1, 15, 15, 2),
    ],
    ids=['linear by 8', 'linear', 'natural', 'no integer window', 'reversed', 'axes swapped', 'NaN', 'zeros'],
)
def test_read_windows_refuses_a_table_that_is_not_log_spaced(table):
    weights = layouts.official(weights_of(NANO), (8,) * 4, (8,) * 4)
    weights['layers.1.blocks.0.attn.relative_coords_table'] = table
    with pytest.raises(CheckpointError, match=r'layers\.1\.blocks\.0\.attn\.relative_coords_table'):
        build(8, arch=NANO).load_state_dict(weights)


def test_read_windows_refuses_blocks_of_a_stage_that_disagree():
    weights = layouts.official(weights_of(), (8,) * 4, (8,) * 4)
    weights['layers.1.blocks.1.attn.relative_coords_table'] = layouts.coords_table(8, 6)
    with pytest.raises(CheckpointError, match=r'stage 1: 8 in layers\.1\.blocks\.0\..*, 6 in layers\.1\.blocks\.1\.'):
        build(8).load_state_dict(weights)


# Precedence of the sources


def test_resolve_pretrained_windows_from_the_file(tmp_path):
    path = official_file(tmp_path / 'model.pth', (8, 8, 8, 4), (8, 8, 8, 4), NANO)
    for cfg_windows in (None, 0, (0, 8, 0, 0), (8, 8, 8, 4), ((8, 0), 8, 0, (0, 4))):
        assert windows_of(build(16, cfg_windows, arch=NANO, path=path)) == square(8, 8, 8, 4), cfg_windows


@pytest.mark.parametrize(
    ('cfg_windows', 'stored'),
    [
        ((8, 8, 8, 8), 'table'),
        (16, 'table'),
        (((8, 8), (8, 8), (8, 8), (4, 5)), 'table'),
        ((0, 0, 0, 6), 'our own'),
        (((8, 8), (8, 8), (8, 8), (4, 5)), 'our own'),
    ],
)
def test_resolve_pretrained_windows_refuses_a_config_that_contradicts_the_file(cfg_windows, stored, tmp_path):
    path = official_file(tmp_path / 'model.pth', (8, 8, 8, 4), (8, 8, 8, 4), NANO)
    if stored == 'our own':
        torch.save(build(16, arch=NANO, path=path).state_dict(), path)
    stage, value = {16: (0, '16')}.get(cfg_windows) or (3, {8: '8', 6: '6'}.get(cfg_windows[3], '5'))
    with pytest.raises(CheckpointError) as error:
        build(16, cfg_windows, arch=NANO, path=path)
    message = str(error.value)
    assert re.search(rf'stage {stage}\b', message), message
    numbers = re.findall(r'\d+', message)
    assert {value, '8' if stage == 0 else '4'} <= set(numbers), message


def test_resolve_pretrained_windows_of_our_own_file(tmp_path):
    source = build(8, (8, 8, 8, 4), arch=NANO)
    torch.save(source.state_dict(), tmp_path / 'ours.pth')
    assert windows_in(load_swinv2_state_dict(str(tmp_path / 'ours.pth'))) == dict(enumerate(square(8, 8, 8, 4)))
    assert windows_of(build(16, arch=NANO, path=tmp_path / 'ours.pth')) == square(8, 8, 8, 4)


@pytest.mark.parametrize('cfg_windows', [None, 8, (16, 16, 16, 8)])
def test_read_windows_refuses_a_name_that_contradicts_the_table(cfg_windows, tmp_path):
    """The file was renamed: neither source is reliable."""
    path = official_file(tmp_path / 'swinv2_tiny_patch4_window16_256.pth', (8,) * 4, (8,) * 4, NANO)
    with pytest.raises(CheckpointError, match=r'stage 0: 8 .*relative_coords_table, 16 .*name of the file'):
        build(16, cfg_windows, arch=NANO, path=path)


@pytest.mark.parametrize('cfg_windows', [8, (16, 16, 16, 16), (0, 0, 0, 16)])
def test_resolve_pretrained_windows_refuses_a_config_that_contradicts_the_name(cfg_windows, tmp_path):
    path = file_without_windows(tmp_path / 'swinv2_tiny_patch4_window16_256.pth', NANO)
    with pytest.raises(CheckpointError, match=r'stage \d.*pretrained_window_sizes'):
        build(16, cfg_windows, arch=NANO, path=path)
    assert windows_of(build(16, (0, 16, 16, 8), arch=NANO, path=path)) == square(16, 16, 16, 8)


@pytest.mark.parametrize(
    'name', ['swinv2_tiny_window16_256.ms_in1k.safetensors', 'swinv2_tiny_patch4_window16_256.pth']
)
def test_read_windows_by_the_name_of_a_released_file(name, tmp_path):
    """Other names are in `test_loaders.py`."""
    weights = layouts.timm_new(weights_of(NANO))
    save = save_file if name.endswith('.safetensors') else torch.save
    save(weights, tmp_path / name)
    expected = square(16, 16, 16, 8)
    assert windows_in(load_swinv2_state_dict(str(tmp_path / name))) == dict(enumerate(expected))
    assert windows_of(build(32, arch=NANO, path=tmp_path / name)) == expected


@pytest.mark.parametrize('name', ['model.pth', 'swinv2_tiny_patch4_window7_224.pth'])
def test_resolve_pretrained_windows_unknown_error_names_the_argument(name, tmp_path):
    path = file_without_windows(tmp_path / name, NANO)
    assert windows_in(load_swinv2_state_dict(str(path))) == {}
    for load in (lambda: build(8, arch=NANO, path=path), lambda: build(8, arch=NANO).load_state_dict(torch.load(path))):
        with pytest.raises(CheckpointError, match='pretrained_window_sizes'):
            load()


def test_resolve_pretrained_windows_needs_all_stages(tmp_path):
    path = file_without_windows(tmp_path / 'model.pth', NANO)
    with pytest.raises(CheckpointError, match='pretrained_window_sizes') as error:
        build(8, (12, 12, 12, 0), arch=NANO, path=path)
    assert re.search(r'stage 3\b', str(error.value)), error.value


# The log


def test_log_window_transfer_of_each_stage(tmp_path):
    path = official_file(tmp_path / 'model.pth', (12, 12, 12, 6), (12, 12, 12, 6), NANO)
    with layouts.recorded_log() as messages:
        build((24, 24, 24, 12), arch=NANO, path=path)
    for stage, before, after in ((0, 12, 24), (1, 12, 24), (2, 12, 24), (3, 6, 12)):
        (line,) = [m for m in messages if re.search(rf'\bstage {stage}\b', m)]
        assert f'{before}x{before}' in line
        assert f'{after}x{after}' in line
        # coordinates of the pre-training window end at log8(1 + 8)
        beyond = math.log(1 + 8 * (after - 1) / (before - 1), 8) / math.log(9, 8) - 1
        assert f'extrapolates by {beyond:.2f} ' in line


@pytest.mark.parametrize(
    ('window', 'message'), [(8, 'no extrapolation'), (7, 'no extrapolation'), (9, 'extrapolates by ')]
)
def test_log_window_transfer_extrapolation(window, message, tmp_path):
    path = official_file(tmp_path / 'model.pth', (8,) * 4, (8,) * 4, NANO)
    with layouts.recorded_log() as messages:
        build(window, arch=NANO, path=path)
    assert len([m for m in messages if message in m]) == 4


def test_log_window_transfer_not_without_loading():
    with layouts.recorded_log() as messages:
        build(8).init_weights()
    assert not [m for m in messages if 'SwinV2:' in m or 'stage' in m]

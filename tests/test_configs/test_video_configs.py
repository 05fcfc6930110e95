"""Video configs build, have the numbers of the paper and of Video Swin, and train."""

import argparse
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from nano import ConfigFolder, check_bfloat16, closest, smaller_backbone, train_a_step
from nano.video import shrink, write_kinetics400

from swinv2_mm.checkpoints import loaders
from swinv2_mm.cli import launch

pytest.importorskip('mmaction')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'video'
README = CONFIGS / 'README.md'
LEAVES = sorted(p.stem for p in CONFIGS.glob('*.py'))
PAPER = sorted(set(LEAVES) - {'swinv2_demo'})
GIANT = [name for name in PAPER if name.startswith('swinv2_g_')]
TEST_SYSTEMS = [name for name in GIANT if 'w24' in name]
TRAINED = ['swinv2_t_k400_224x224x32', 'swinv2_g_k400_256x256x8']
TRAINED_BY_PACKAGE = 'swinv2_g_k400_320x320x8_w24_4x5'
FOLDER = ConfigFolder(CONFIGS, shrink)
read, load = FOLDER.read, FOLDER.load


@pytest.fixture(autouse=True)
def _mmaction_scope():
    with DefaultScope.overwrite_default_scope('mmaction'):
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_kinetics400(tmp_path_factory.mktemp('kinetics'))


def steps(cfg: Config, split: str) -> dict[str, dict]:
    """Transforms of a split by their names; of two Resizes the last."""
    return {t.type.split('.')[-1]: t for t in cfg[f'{split}_dataloader'].dataset.pipeline}


@pytest.mark.parametrize('name', sorted(set(LEAVES) - set(TEST_SYSTEMS)))
def test_builds(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    assert type(model.backbone).__name__ == 'SwinTransformer3DV2'
    assert model.cls_head.in_channels == model.backbone.num_features[-1]


@pytest.mark.parametrize('name', LEAVES)
def test_test_pipeline_is_that_of_the_test_dataloader(name):
    cfg = read(name)
    assert cfg.test_pipeline == cfg.test_dataloader.dataset.pipeline


@pytest.mark.parametrize('name', PAPER)
def test_the_smaller_backbone_of_the_readme_fits(name):
    cfg = launch.load_config(str(CONFIGS / f'{name}.py'), smaller_backbone(CONFIGS))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.backbone.num_features[-1] == model.cls_head.in_channels == 256
    assert cfg.model.backbone.init_cfg is None


@pytest.mark.parametrize('name', TRAINED)
def test_trains_a_step_and_tests_a_video(name, data, tmp_path):
    """The recipe's data, transforms, loss, optimizer, schedule and metric; only sizes are smaller."""
    cfg = load(name, data, tmp_path)
    cfg.val_dataloader.dataset.indices = cfg.test_dataloader.dataset.indices = 1  # which has up to 20 views
    runner = train_a_step(cfg)
    assert 'val/acc/top1' in runner.message_hub.log_scalars
    assert 0 <= runner.test()['acc/top1'] <= 1


def test_trains_and_tests_as_a_base_named_by_the_package(data, tmp_path):
    """There mmengine adds `_scope_='swinv2_mm'`, see `swinv2_mm.scope`."""
    (tmp_path / 'mine.py').write_text(f"_base_ = 'swinv2_mm::video/{TRAINED_BY_PACKAGE}.py'\n")
    cfg = load(tmp_path / 'mine', data, tmp_path)
    cfg.val_dataloader.dataset.indices = cfg.test_dataloader.dataset.indices = 1
    assert 0 <= train_a_step(cfg).test()['acc/top1'] <= 1


@pytest.mark.parametrize('name', sorted(set(PAPER) - {*TRAINED, TRAINED_BY_PACKAGE}))
def test_differs_only_in_numbers_from_a_config_trained_above(name):
    """The numbers and the initial weights are tested below."""
    assert closest(shrink(read(name)), [shrink(read(other)) for other in (*TRAINED, TRAINED_BY_PACKAGE)]) == []


@pytest.mark.parametrize('name', ['swinv2_t_k400_224x224x32', *GIANT])  # S, B and L have the clips of T, see below
def test_clips_have_the_frames_and_views_of_the_name(name, data, tmp_path):
    cfg = load(name, data, tmp_path)
    tokens = 8 if '_g_' in name else 16
    frames = tokens * cfg.model.backbone.patch_size[0]
    side = int(re.search(r'k400_(\d+)x\1x', name)[1])
    tested = 384 if 'w24' in name else side
    views = 12 if '_g_' not in name else 20 if name.endswith('_4x5') else 1
    for split, number, pixels in (('train', 1, side), ('val', 1, tested), ('test', views, tested)):
        inputs = Runner.build_dataloader(cfg[f'{split}_dataloader']).dataset[0]['inputs']
        assert inputs.shape == (number, 3, frames, pixels // 8, pixels // 8), split


# ---------------------------------------------------------------- T, S, B, L: the recipe of Video Swin


# Video Swin's paper and code: learning rate, weight decay, drop path
RECIPES = {
    'tiny': ('t', 1e-3, 0.02, 0.1),
    'small': ('s', 1e-3, 0.02, 0.1),
    'base': ('b', 1e-3, 0.05, 0.3),
    'large': ('l', 3e-4, 0.05, 0.4),
}


@pytest.mark.parametrize('size', RECIPES)
def test_the_recipe_is_that_of_mmactions_video_swin(size):
    """Data, schedule and head are those of mmaction's config; the rest is compared with `RECIPES`."""
    name, lr, weight_decay, drop_path = RECIPES[size]
    cfg = read(f'swinv2_{name}_k400_224x224x32')
    data = 'in22k' if size == 'large' else 'in1k'
    stem = f'swin-{size}-p244-w877_{data}-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb'
    stock = Config.fromfile(mmaction_configs() / f'{stem}.py')
    for split in ('train', 'val', 'test'):
        ours, theirs = cfg[f'{split}_dataloader'], stock[f'{split}_dataloader']
        assert without_scope(ours.dataset.pipeline) == [
            {k: v for k, v in t.items() if k != 'io_backend'} for t in theirs.dataset.pipeline
        ]
        assert (ours.batch_size, ours.sampler) == (theirs.batch_size, theirs.sampler)
    assert without_scope(cfg.param_scheduler) == stock.param_scheduler
    assert cfg.train_cfg.max_epochs == stock.train_cfg.max_epochs
    assert without_scope([cfg.test_evaluator]) == [stock.test_evaluator]
    assert cfg.auto_scale_lr == stock.auto_scale_lr
    assert cfg.model.cls_head.pop('type').endswith(stock.model.cls_head.pop('type'))
    assert (cfg.model.cls_head, cfg.model.data_preprocessor) == (stock.model.cls_head, stock.model.data_preprocessor)
    backbone, optimizer = cfg.model.backbone, cfg.optim_wrapper.optimizer
    assert (backbone.patch_size, backbone.window_size) == (stock.model.backbone.patch_size, (8, 7, 7))
    assert (backbone.arch, backbone.drop_path_rate) == (size, drop_path)
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, weight_decay)
    assert weight_decay == stock.optim_wrapper.optimizer.weight_decay
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.backbone.lr_mult == 0.1


def without_scope(dicts: list[dict]) -> list[dict]:
    return [{k: v for k, v in d.items() if k != '_scope_'} for d in dicts]


def mmaction_configs() -> Path:
    import mmaction

    return Path(mmaction.__file__).parent / '.mim/configs/recognition/swin'


@pytest.mark.parametrize('name', [name for name in PAPER if name not in GIANT])
def test_starts_from_weights_of_its_size_with_known_windows(name):
    backbone = read(name).model.backbone
    assert backbone.arch in backbone.init_cfg.checkpoint
    release = loaders.find_release(backbone.init_cfg.checkpoint)
    assert release.windows == ((12, 12, 12, 6) if '_l_' in name else (8,) * 4)


# ---------------------------------------------------------------- G: both stages of A2.2, and Table 5


# learning rate, clips a step, epochs, warm-up, side, window
STAGES = {'256x256x8': (3.6e-4, 80, 20, 2.5, 256, 16), '320x320x8': (5e-5, 64, 5, 1, 320, 20)}


@pytest.mark.parametrize('name', sorted(set(GIANT) - set(TEST_SYSTEMS)))
def test_giant_configs_have_the_numbers_of_the_paper(name):
    lr, clips, epochs, warmup, side, window = STAGES[name.split('_')[3]]
    cfg = read(name)
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, 0.1)
    assert 'paramwise_cfg' not in cfg.optim_wrapper
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == clips
    assert cfg.train_cfg.max_epochs == epochs
    assert [(s.type, s.begin, s.end) for s in cfg.param_scheduler] == [
        ('LinearLR', 0, warmup),
        ('CosineAnnealingLR', 0, epochs),
    ]
    assert (cfg.param_scheduler[1].T_max, cfg.param_scheduler[1].eta_min) == (epochs, 0)
    assert cfg.model.backbone.window_size == (8, window, window)
    assert steps(cfg, 'train')['Resize'].scale == (side, side)
    assert steps(cfg, 'test')['CenterCrop'].crop_size == side
    assert steps(cfg, 'test')['SampleFrames'].num_clips == 1


@pytest.mark.parametrize('name', GIANT)
def test_a_clip_of_giant_has_eight_tokens_along_time_and_spans_64_frames(name):
    cfg = read(name)
    patch = cfg.model.backbone.patch_size
    assert patch == ((2, 4, 4) if 'p244' in name else (1, 4, 4))
    for split in ('train', 'val', 'test'):
        sample = steps(cfg, split)['SampleFrames']
        assert (sample.clip_len // patch[0], sample.clip_len * sample.frame_interval) == (8, 64)


def second_reading() -> dict:
    """The options with which README.md changes a config of G to 16 frames in patches of 2x4x4."""
    arguments = re.search(r'`(--cfg-options "model.backbone.patch_size.*?)`', README.read_text(), re.DOTALL)[1]
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(shlex.split(arguments)).cfg_options


def test_the_second_reading_of_readme_is_the_p244_config():
    cfg, expected = read('swinv2_g_k400_256x256x8'), read('swinv2_g_k400_256x256x8_p244')
    cfg.merge_from_dict(second_reading())
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'test_pipeline'):
        assert cfg[key] == expected[key], key


@pytest.mark.parametrize('name', sorted(set(GIANT) - {'swinv2_g_k400_256x256x8_p244'}))
def test_the_second_reading_of_readme_changes_patches_and_sampling_only(name):
    cfg, expected = read(name), read(name)
    cfg.merge_from_dict(second_reading())
    assert cfg.model.backbone.pop('patch_size') == (2, 4, 4)
    assert expected.model.backbone.pop('patch_size') == (1, 4, 4)
    for split in ('train', 'val', 'test'):
        sample = steps(cfg, split)['SampleFrames']
        assert (sample.pop('clip_len'), sample.pop('frame_interval')) == (16, 4)
        sample = steps(expected, split)['SampleFrames']
        assert (sample.pop('clip_len'), sample.pop('frame_interval')) == (8, 8)
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader'):
        assert cfg[key] == expected[key], key


@pytest.mark.parametrize('name', TEST_SYSTEMS)
def test_a_config_tested_at_384_changes_only_window_size_and_views(name):
    cfg, trained = read(name), read(name.split('_w24')[0])
    assert cfg.model.backbone.window_size == (8, 24, 24)
    crop, several = ('FiveCrop', True) if '4x5' in name else ('CenterCrop', False)
    assert steps(cfg, 'test')[crop].crop_size == 384
    assert steps(cfg, 'test')['SampleFrames'].num_clips == (4 if several else 1)
    cfg.model.backbone.window_size = trained.model.backbone.window_size
    cfg.model.pop('test_cfg', None)
    for key in ('model', 'train_dataloader', 'optim_wrapper', 'param_scheduler', 'test_evaluator'):
        assert cfg[key] == trained[key], key


def test_a_checkpoint_of_window_20_fits_at_24(data, tmp_path):
    trained, tested = (
        MODELS.build(load(f'swinv2_g_k400_320x320x8{window}', data, tmp_path).model).eval() for window in ('', '_w24')
    )
    tested.load_state_dict(trained.state_dict(), strict=True)
    clip = torch.randn(1, 3, 8, 56, 72)
    with torch.no_grad():  # both windows are larger than all feature maps
        assert torch.equal(tested.backbone(clip), trained.backbone(clip))


@pytest.mark.parametrize('size', [20, 24])
def test_shorter_sides_are_to_crops_as_in_video_swin(size):
    cfg = read('swinv2_g_k400_320x320x8_w24' if size == 24 else 'swinv2_g_k400_320x320x8')
    assert steps(cfg, 'test')['Resize'].scale == (-1, round(size * 16 * 256 / 224))


# ---------------------------------------------------------------- all


def test_losses_and_gradients_are_finite_in_bfloat16(data, tmp_path):
    """The whole recognizer under autocast."""
    check_bfloat16(load('swinv2_t_k400_224x224x32', data, tmp_path))

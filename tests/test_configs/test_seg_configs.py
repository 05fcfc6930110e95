"""Segmentation configs build, have the paper's numbers, and train."""

from pathlib import Path

import pytest
import torch
from mmengine.registry import MODELS, DefaultScope
from mmengine.runner import Runner
from nano import ConfigFolder, check_bfloat16, closest, smaller_backbone, train_a_step
from nano.seg import shrink, write_ade20k

from swinv2_mm.checkpoints import loaders
from swinv2_mm.cli import launch

pytest.importorskip('mmseg')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'seg'
LEAVES = sorted(p.stem for p in CONFIGS.glob('upernet_*.py'))
PAPER = sorted(set(LEAVES) - {'upernet_swinv2_demo'})
TEST_SYSTEMS = [name for name in PAPER if 'w56' in name]
TRAINED = ['upernet_swinv2_t', 'upernet_swinv2_g_w56']
FOLDER = ConfigFolder(CONFIGS, shrink)
read, load = FOLDER.read, FOLDER.load


@pytest.fixture(autouse=True)
def _mmseg_scope():
    with DefaultScope.overwrite_default_scope('mmseg'):
        yield


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_ade20k(tmp_path_factory.mktemp('ade'))


@pytest.mark.parametrize('name', sorted(set(LEAVES) - set(TEST_SYSTEMS)))
def test_builds(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    assert type(model.backbone).__name__ == 'SwinTransformerV2'
    assert list(model.decode_head.in_channels) == model.backbone.num_features
    assert model.auxiliary_head.in_channels == model.backbone.num_features[2]


@pytest.mark.parametrize('name', PAPER)
def test_the_smaller_backbone_of_the_readme_fits(name):
    cfg = launch.load_config(str(CONFIGS / f'{name}.py'), smaller_backbone(CONFIGS))
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert model.backbone.num_features == list(model.decode_head.in_channels) == [32, 64, 128, 256]
    assert cfg.model.backbone.init_cfg is None


@pytest.mark.parametrize('name', TRAINED)
def test_trains_a_step_and_tests_an_image(name, data, tmp_path):
    """The recipe's data, transforms, losses, optimizer, schedule and metric; only sizes are smaller."""
    runner = train_a_step(load(name, data, tmp_path))
    assert 'val/mIoU' in runner.message_hub.log_scalars


@pytest.mark.parametrize('name', sorted(set(PAPER) - set(TRAINED)))
def test_differs_only_in_numbers_from_a_config_trained_above(name):
    """The numbers and the initial weights are tested below."""
    assert closest(shrink(read(name)), [shrink(read(other)) for other in TRAINED]) == []


@pytest.mark.parametrize('name', PAPER)
def test_views_of_one_image_have_six_scales(name, data, tmp_path):
    cfg = load(name, data, tmp_path)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    views = Runner.build_dataloader(cfg.test_dataloader).dataset[0]['inputs']
    short = min(views[4].shape[1:])  # at ratio 1
    assert [min(view.shape[1:]) for view in views] == [
        round(short * r) for r in (0.5, 0.75, 1, 1.25, 1.5, 1.75) for _ in '12'
    ]


def test_scales_and_flips_of_one_image_are_merged(data, tmp_path):
    cfg = load('upernet_swinv2_t', data, tmp_path)
    cfg.test_dataloader.dataset.pipeline = cfg.tta_pipeline
    cfg.model = dict(**cfg.tta_model, module=cfg.model)
    assert Runner.from_cfg(cfg).test()['mIoU'] >= 0


# the paper (A1, A2.1, A2.2): lr, images a step, steps, warm-up, crop, window, drop path, layer-wise decay
RECIPES = {
    't': (4e-5, 16, 160_000, 1500, 512, 16, 0.3, 0.95),
    's': (4e-5, 16, 160_000, 1500, 512, 16, 0.3, 0.95),
    'b': (4e-5, 16, 160_000, 1500, 512, 16, 0.3, 0.95),
    'l': (6e-5, 64, 40_000, 375, 640, 40, 0.3, None),
    'g': (4e-5, 32, 80_000, 750, 640, 40, 0.4, None),
}


@pytest.mark.parametrize('size', RECIPES)
def test_has_the_numbers_of_the_paper(size):
    lr, images, steps, warmup, crop, window, drop_path, decay = RECIPES[size]
    cfg = read(f'upernet_swinv2_{size}')
    optimizer = cfg.optim_wrapper.optimizer
    assert (optimizer.type, optimizer.lr, optimizer.weight_decay) == ('AdamW', lr, 0.05)
    assert cfg.optim_wrapper.get('paramwise_cfg', {}).get('layer_decay_rate') == decay
    assert 8 * cfg.train_dataloader.batch_size == cfg.auto_scale_lr.base_batch_size == images
    assert cfg.train_cfg.max_iters == steps
    assert [(s.type, s.begin, s.end) for s in cfg.param_scheduler] == [
        ('LinearLR', 0, warmup),
        ('PolyLR', warmup, steps),
    ]
    assert (cfg.param_scheduler[1].power, cfg.param_scheduler[1].eta_min) == (1.0, 0.0)
    backbone = cfg.model.backbone
    assert (backbone.window_size, backbone.drop_path_rate) == (window, drop_path)
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert cfg.model.data_preprocessor.size == pipeline['RandomCrop'].crop_size == (crop, crop)
    assert (pipeline['RandomResize'].scale, pipeline['RandomResize'].ratio_range) == ((4 * crop, crop), (0.5, 2.0))
    assert {'RandomFlip', 'PhotoMetricDistortion'} <= set(pipeline)
    assert cfg.test_dataloader.dataset.pipeline[1].scale == (4 * crop, crop)


@pytest.mark.parametrize('size', ['l', 'g'])
def test_a_config_tested_at_896_changes_only_window_and_size(size):
    """A checkpoint trained with window 40 then fits."""
    cfg, trained = read(f'upernet_swinv2_{size}_w56'), read(f'upernet_swinv2_{size}')
    assert (cfg.model.backbone.window_size, cfg.test_dataloader.dataset.pipeline[1].scale) == (56, (3584, 896))
    trained.model.backbone.window_size = 56
    for split in ('val', 'test'):
        trained[f'{split}_dataloader'].dataset.pipeline[1].scale = (3584, 896)
    for key in ('model', 'train_dataloader', 'val_dataloader', 'test_dataloader', 'test_evaluator', 'optim_wrapper'):
        assert cfg[key] == trained[key], key


@pytest.mark.parametrize('size', ['l', 'g'])
def test_a_checkpoint_of_window_40_fits_at_56(size, data, tmp_path):
    trained, tested = (
        MODELS.build(load(name, data, tmp_path).model).eval()
        for name in (f'upernet_swinv2_{size}', f'upernet_swinv2_{size}_w56')
    )
    tested.load_state_dict(trained.state_dict(), strict=True)
    images = torch.randn(1, 3, 80, 112)
    with torch.no_grad():  # both windows are larger than all feature maps
        for ours, theirs in zip(tested.backbone(images), trained.backbone(images), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize('name', PAPER)
def test_starts_from_weights_of_its_size_and_windows(name):
    backbone = read(name).model.backbone
    if backbone.arch == 'giant':  # never released
        assert backbone.init_cfg is None
        return
    windows = backbone.pretrained_window_sizes
    assert backbone.arch in backbone.init_cfg.checkpoint
    release = loaders.find_release(backbone.init_cfg.checkpoint)
    assert release.windows == (windows if isinstance(windows, tuple) else (windows,) * 4)


def test_a_crop_smaller_than_the_window_is_one_window(data, tmp_path):
    """Window 40 on a crop whose feature maps have sides of 20, 10, 5 and 3 tokens: the window is the feature map."""
    models = []
    for window in (40, (20, 10, 5, 3)):
        cfg = load('upernet_swinv2_l', data, tmp_path)
        cfg.model.backbone.window_size = window
        models.append(MODELS.build(cfg.model).eval())
    models[1].load_state_dict(models[0].state_dict())
    image = torch.randn(1, 3, 80, 80)
    logits = [model.encode_decode(image, [dict(img_shape=(80, 80))]) for model in models]
    torch.testing.assert_close(*logits, rtol=0, atol=1e-5)


def test_losses_and_gradients_are_finite_in_bfloat16(data, tmp_path):
    """The whole segmentor under autocast."""
    check_bfloat16(load('upernet_swinv2_t', data, tmp_path))

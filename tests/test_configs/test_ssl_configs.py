"""Configs of self-supervised pre-training build, have the numbers of the paper and of the official code, and train."""

from pathlib import Path

import pytest
import torch
from augmentation import assert_crops, assert_flips
from loading_paths import start_training
from mmengine.registry import MODELS, PARAM_SCHEDULERS
from nano import ConfigFolder, closest, train_a_step
from nano.ssl import shrink, write_images
from PIL import Image

pytest.importorskip('mmpretrain')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'ssl'
PAPER = sorted(p.stem for p in CONFIGS.glob('*.py') if p.stem != 'simmim_swinv2_demo')
BASE, GIANT = 'simmim_swinv2_b_in1k_192', 'simmim_swinv2_g_in22k_192'
pytestmark = pytest.mark.usefixtures('mmpretrain_scope')
FOLDER = ConfigFolder(CONFIGS, shrink)
read, load = FOLDER.read, FOLDER.load


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp('images'))


# those of the official classifiers without their heads, see test_cls_configs.py
BACKBONES = {'base': 86_893_816, 'large': 195_202_932, 'giant': 2_997_815_008 + 7 * 2 * 2048}


@pytest.mark.parametrize('name', PAPER)
def test_builds_with_the_parameters_of_the_official_model(name):
    cfg = read(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    first, last = model.backbone.num_features[0], model.backbone.num_features[-1]
    decoder = (last + 1) * 3 * 32**2
    assert sum(p.numel() for p in model.parameters()) == BACKBONES[cfg.model.backbone.arch] + first + decoder


@pytest.mark.parametrize('name', [BASE, GIANT])
def test_trains_a_step_and_resumes(name, data, tmp_path):
    """The recipe's data, masks, loss, optimizer and schedule; only sizes are smaller."""
    runner = train_a_step(load(name, data, tmp_path))
    (path,) = tmp_path.glob('*_1.pth')
    saved = torch.load(path, weights_only=False)['state_dict']
    assert saved.keys() == runner.model.state_dict().keys()
    assert {'backbone.mask_token', 'neck.decoder.0.weight'} <= saved.keys()

    cfg = load(name, data, tmp_path)
    cfg.update(load_from=str(path), resume=True, experiment_name='resumed')
    cfg.train_cfg.update({key: 2 for key in ('max_iters', 'max_epochs') if key in cfg.train_cfg})
    resumed = start_training(cfg)
    assert resumed.iter == 1
    assert len(resumed.optim_wrapper.optimizer.state) == len(list(resumed.model.parameters()))
    for name, value in resumed.model.state_dict().items():
        assert torch.equal(value, saved[name]), name


def test_trains_as_a_base_named_by_the_package(data, tmp_path):
    """There mmengine adds `_scope_='swinv2_mm'`, see `swinv2_mm.scope`."""
    (tmp_path / 'mine.py').write_text(f"_base_ = 'swinv2_mm::ssl/{BASE}.py'\n")
    train_a_step(load(tmp_path / 'mine', data, tmp_path))


def test_large_differs_only_in_numbers_from_base():
    assert closest(shrink(read('simmim_swinv2_l_in1k_192')), [shrink(read(BASE))]) == []


# lr, images a step, weight decay, clipping, steps or epochs, warm-up; the paper (A2.2) for G, the official code for B
RECIPES = {
    'b': (1e-4 * 2048 / 512, 2048, 0.05, 5.0, 800, 10),
    'l': (1e-4 * 2048 / 512, 2048, 0.05, 5.0, 800, 10),
    'g': (1.4e-3, 9216, 0.1, 100.0, 20 * 70_000_000 // 9216, 30_000),
}


@pytest.mark.parametrize('name', PAPER)
def test_has_the_numbers_of_the_paper_and_the_official_code(name):
    cfg = read(name)
    wrapper, (warmup, decay) = cfg.optim_wrapper, cfg.param_scheduler
    accumulate = wrapper.get('accumulative_counts', 1)
    images = 8 * cfg.train_dataloader.batch_size * accumulate
    assert cfg.auto_scale_lr.base_batch_size * accumulate == images
    length = cfg.train_cfg.get('max_epochs', cfg.train_cfg.get('max_iters'))
    assert (warmup.begin, decay.end) == (0, length)
    assert RECIPES[name.split('_')[2]] == (
        wrapper.optimizer.lr,
        images,
        wrapper.optimizer.weight_decay,
        wrapper.clip_grad.max_norm,
        length / accumulate,
        warmup.end / accumulate,
    )
    assert (wrapper.type, wrapper.dtype, wrapper.optimizer.type) == ('AmpOptimWrapper', 'bfloat16', 'AdamW')
    backbone, head = cfg.model.backbone, cfg.model.head
    assert (backbone.window_size, backbone.drop_path_rate) == ((12, 12, 12, 6), 0.1)
    assert (head.norm_window, head.loss.criterion, head.loss.channel) == (47, 'L1', 3)
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert list(pipeline) == [
        *('LoadImageFromFile', 'RandomResizedCrop', 'RandomFlip', 'SimMIMMaskGenerator', 'PackInputs')
    ]
    assert_crops(pipeline['RandomResizedCrop'], 192, (0.67, 1.0), Image.Resampling.BILINEAR)
    assert_flips(pipeline['RandomFlip'])
    masks = pipeline['SimMIMMaskGenerator']
    assert (masks.input_size, masks.mask_patch_size, masks.model_patch_size, masks.mask_ratio) == (192, 32, 4, 0.6)


def test_learning_rates_are_those_of_the_official_code():
    """A linear warm-up from 5e-7 to 1e-4 for 512 images, and a tenth from epoch 700 on. In epochs of ten steps."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=4e-4)
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizer, epoch_length=10))
        for s in read(BASE).param_scheduler
    ]
    rates = []
    for step in range(1, 8001):
        rates.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if scheduler.by_epoch is False or step % 10 == 0:
                scheduler.step()
    warmup = [4 * (5e-7 + (1e-4 - 5e-7) * step / 99) for step in range(100)]
    assert rates == pytest.approx([*warmup, *[4e-4] * 6900, *[4e-5] * 1000], rel=1e-9)

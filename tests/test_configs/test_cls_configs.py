"""Classification configs build, have the numbers of the paper and of the official code, and train."""

import re
from pathlib import Path

import cv2
import numpy as np
import oracles
import pytest
import torch
from augmentation import assert_crops, assert_flips
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS
from mmengine.runner import Runner, load_checkpoint
from nano import ConfigFolder, check_bfloat16, closest, train_a_step
from nano.cls import LABELS, shrink, write_imagenet
from PIL import Image

from swinv2_mm.checkpoints import loaders
from swinv2_mm.cli import launch
from swinv2_mm.scope import add_scope

pytest.importorskip('mmpretrain')

CONFIGS = Path(__file__).parents[2] / 'configs' / 'cls'
LEAVES = sorted(p.stem for p in CONFIGS.glob('*.py'))
DEMOS = [name for name in LEAVES if name.startswith('swinv2_demo')]
PAPER = sorted(set(LEAVES) - set(DEMOS))
IMAGENET_V2 = [name for name in PAPER if name.endswith('imagenet_v2')]
RECIPE_NAMES = sorted(set(PAPER) - set(IMAGENET_V2))
TRAINED = ['swinv2_t_in1k_256', 'swinv2_b_in22k_192', 'swinv2_g_in22k_192', 'swinv2_g_w40_in22kto1k_640']
TRAINED_BY_PACKAGE = 'swinv2_b_w24_in22kto1k_384'
pytestmark = pytest.mark.usefixtures('mmpretrain_scope')
FOLDER = ConfigFolder(CONFIGS, shrink)
read, load = FOLDER.read, FOLDER.load


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return write_imagenet(tmp_path_factory.mktemp('imagenet') / 'imagenet')


# with the classifier of 1000 classes; those of B, L and G on ImageNet-22K have 20,841 classes more
PARAMETERS = {
    'tiny': 28_347_154,
    'small': 49_728_418,
    'base': 87_918_816,
    'large': 196_739_932,
    'giant': 3_001_912_008 + 7 * 2 * 2048,  # extra norms
}


@pytest.mark.parametrize('name', RECIPE_NAMES)
def test_builds_with_the_parameters_of_the_official_model(name):
    cfg = read(name)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    head = model.head
    assert head.in_channels == model.backbone.num_features[-1]
    assert (
        cfg.model.data_preprocessor.num_classes == head.num_classes == (21841 if name.endswith('in22k_192') else 1000)
    )
    extra = (head.num_classes - 1000) * (head.in_channels + 1)
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[cfg.model.backbone.arch] + extra


@pytest.mark.parametrize('name', DEMOS)
def test_a_demo_builds(name):
    with torch.device('meta'):
        model = MODELS.build(read(name).model)
    assert model.head.in_channels == model.backbone.num_features[-1]


@pytest.mark.parametrize('name', TRAINED)
def test_trains_a_step_and_tests_an_image(name, data, tmp_path):
    """The recipe's data, augmentation, loss, optimizer, schedule and metric; only sizes are smaller."""
    runner = train_a_step(load(name, data, tmp_path))
    assert {'val/accuracy/top1', 'val/accuracy/top5'} <= set(runner.message_hub.log_scalars)


def test_trains_and_tests_as_a_base_named_by_the_package(data, tmp_path):
    """There mmengine adds `_scope_='swinv2_mm'`, see `swinv2_mm.scope`."""
    (tmp_path / 'mine.py').write_text(f"_base_ = 'swinv2_mm::cls/{TRAINED_BY_PACKAGE}.py'\n")
    assert 0 <= train_a_step(load(tmp_path / 'mine', data, tmp_path)).test()['accuracy/top1'] <= 100


@pytest.mark.parametrize('name', sorted(set(RECIPE_NAMES) - {*TRAINED, TRAINED_BY_PACKAGE}))
def test_differs_only_in_numbers_from_a_config_trained_above(name):
    """The numbers and the initial weights are tested below."""
    assert closest(shrink(read(name)), [shrink(read(other)) for other in (*TRAINED, TRAINED_BY_PACKAGE)]) == []


@pytest.mark.parametrize('name', IMAGENET_V2)
def test_an_imagenet_v2_config_changes_only_the_test_data(name, data, tmp_path):
    cfg = read(name)
    trained = read('swinv2_g_w40_in22kto1k_640' if '_g_' in name else f'{name[:8]}_w24_in22kto1k_384')
    dataset, former = cfg.test_dataloader.dataset, trained.test_dataloader.dataset
    assert dataset.pipeline == former.pipeline
    trained.test_dataloader.dataset = dataset
    for key in trained:
        if key != 'data_root':
            assert cfg[key] == trained[key], key
    runner = Runner.from_cfg(load(name, data / 'v2', tmp_path))
    assert 0 <= runner.test()['accuracy/top1'] <= 100
    assert sorted(runner.test_dataloader.dataset.get_gt_labels()) == list(LABELS)


# ---------------------------------------------------------------- numbers


def recipe(arch, side, windows, images, lr, weight_decay, epochs, warmup, drop_path, clip=5.0, decay=None):
    return locals()


def in1k(arch, windows, drop_path):
    """A1, and the official code for what is not stated there: BASE_LR is for 512 images."""
    return recipe(arch, 256, windows, 1024, 5e-4 * 1024 / 512, 0.05, 300, 20, drop_path)


def in22k(arch):
    return recipe(arch, 192, (12, 12, 12, 6), 4096, 1.25e-4 * 4096 / 512, 0.1, 90, 5, 0.2)


def fine_tuned(arch, side):
    windows = {256: (16, 16, 16, 8), 384: (24, 24, 24, 12)}[side]
    return recipe(arch, side, windows, 1024, 2e-5 * 1024 / 512, 1e-8, 30, 5, 0.2)


RECIPES = {
    'swinv2_t_in1k_256': in1k('tiny', 8, 0.2),
    'swinv2_s_in1k_256': in1k('small', 8, 0.3),
    'swinv2_b_in1k_256': in1k('base', 8, 0.5),
    'swinv2_t_w16_in1k_256': in1k('tiny', (16, 16, 16, 8), 0.2),
    'swinv2_s_w16_in1k_256': in1k('small', (16, 16, 16, 8), 0.3),
    'swinv2_b_w16_in1k_256': in1k('base', (16, 16, 16, 8), 0.5),
    'swinv2_b_in22k_192': in22k('base'),
    'swinv2_l_in22k_192': in22k('large'),
    'swinv2_b_w16_in22kto1k_256': fine_tuned('base', 256),
    'swinv2_l_w16_in22kto1k_256': fine_tuned('large', 256),
    'swinv2_b_w24_in22kto1k_384': fine_tuned('base', 384),
    'swinv2_l_w24_in22kto1k_384': fine_tuned('large', 384),
    # A2.2; epochs of the 70 M images of the paper
    'swinv2_g_in22k_192': recipe(
        'giant', 192, (12, 12, 12, 6), 9216, 1.4e-3, 0.1, 30, 20_000 * 9216 / 70e6, 0.3, 100.0, 0.87
    ),
    'swinv2_g_w40_in22kto1k_640': recipe('giant', 640, (40, 40, 40, 20), 576, 2.1e-5, 0.1, 10, 2, 0.5, 100.0),
}


@pytest.mark.parametrize('name', RECIPE_NAMES)
def test_has_the_numbers_of_the_paper_and_the_official_code(name):
    expected = RECIPES[name]
    cfg = read(name)
    backbone, wrapper = cfg.model.backbone, cfg.optim_wrapper
    accumulate = wrapper.get('accumulative_counts', 1)
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    warmup, decay = cfg.param_scheduler
    end, begin = (decay.end, decay.begin)
    if 'max_iters' in cfg.train_cfg:  # steps to epochs
        assert cfg.train_cfg.max_iters == end
        begin, end = (n / accumulate * expected['images'] / 70e6 for n in (begin, end))
    else:
        assert (cfg.train_cfg.max_epochs, warmup.convert_to_iter_based, decay.convert_to_iter_based) == (
            end,
            True,
            True,
        )
    assert (warmup.begin, warmup.end, warmup.start_factor, decay.eta_min_ratio) == (0, decay.begin, 1e-3, 1e-2)
    images = 8 * cfg.train_dataloader.batch_size * accumulate
    assert cfg.auto_scale_lr.base_batch_size * accumulate == images
    assert (wrapper.type, wrapper.dtype, wrapper.optimizer.type) == ('AmpOptimWrapper', 'bfloat16', 'AdamW')
    found = recipe(
        backbone.arch,
        pipeline['RandomResizedCrop'].scale,
        backbone.window_size,
        images,
        pytest.approx(wrapper.optimizer.lr),
        wrapper.optimizer.weight_decay,
        pytest.approx(end, rel=1e-4),
        pytest.approx(begin, rel=1e-4),
        backbone.drop_path_rate,
        wrapper.clip_grad.max_norm,
        wrapper.get('paramwise_cfg', {}).get('layer_decay_rate'),
    )
    assert found == expected


def augmentation(name: str = 'swinv2_t_in1k_256') -> list[dict]:
    """The transforms between loading and packing: crop, flip, RandAugment, random erasing."""
    load, *transforms, pack = read(name).train_dataloader.dataset.pipeline
    assert (load.type, pack.type) == ('LoadImageFromFile', 'PackInputs')
    return transforms


def test_every_config_is_augmented_alike():
    """Only the size of crops differs, and G in pre-training has no Mixup and no CutMix."""
    mixes = add_scope('mmpretrain', dict(type='Mixup', alpha=0.8), dict(type='CutMix', alpha=1.0))
    for name in PAPER:
        crop, *others = augmentation(name)
        assert [dict(crop, scale=256), *others] == augmentation(), name
        model = read(name).model
        assert model.train_cfg == (None if name == 'swinv2_g_in22k_192' else dict(augments=mixes)), name
        assert model.head.loss == read('swinv2_t_in1k_256').model.head.loss, name


def test_crops_and_flips_are_those_of_the_official_code():
    crop, flip, *_ = augmentation()
    assert_crops(crop, 256, (0.08, 1.0), Image.Resampling.BICUBIC)
    assert_flips(flip)


def timm_augmentation() -> dict:
    """What the official build.py builds, by class name."""
    oracles.find_peers()
    from timm.data import create_transform

    options = dict(auto_augment='rand-m9-mstd0.5-inc1', re_prob=0.25, re_mode='pixel', interpolation='bicubic')
    return {type(t).__name__: t for t in create_transform(256, is_training=True, **options).transforms}


def test_randaugment_is_timms(monkeypatch):
    """Same operations, with the same probability and magnitude, on a picture with details.

    OpenCV and Pillow differ in their bicubic interpolation; the bilinear one, and another fill colour, differ by more.
    """
    ours, timm = TRANSFORMS.build(augmentation()[2]), timm_augmentation()['RandAugment']
    assert (len(ours.transforms), ours.num_policies) == (len(timm.ops), timm.num_layers)
    monkeypatch.setattr('random.random', lambda: 0.0)  # timm draws no negative magnitude
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = cv2.resize(noise, (64, 48), interpolation=cv2.INTER_CUBIC)
    for mine, theirs in zip(ours.transforms, timm.ops, strict=True):
        assert mine.prob == theirs.prob, theirs
        if mine.magnitude_range is not None:
            assert (mine.magnitude_level, mine.magnitude_std) == (theirs.magnitude, theirs.magnitude_std), theirs
        mine.prob = theirs.prob = 1.0
        mine.magnitude_std = theirs.magnitude_std = 0.0
        expected = np.asarray(theirs(Image.fromarray(image[..., ::-1])))[..., ::-1].astype(float)
        differences = []
        for mine.random_negative_prob in (0.0, 1.0):  # positive is clockwise in one, counter-clockwise in the other
            found = mine(dict(img=image.copy(), img_shape=image.shape[:2]))['img']
            differences.append(np.abs(found - expected).mean())
        assert min(differences) < (6.0 if hasattr(mine, 'interpolation') else 1.0), theirs


def test_random_erasing_is_timms():
    """Same share of images, areas and aspect ratios; the erased pixels of the model's input have mean 0 and std 1."""
    erase, timm = TRANSFORMS.build(augmentation()[3]), timm_augmentation()['RandomErasing']
    areas = erase.min_area_ratio, erase.max_area_ratio
    assert (erase.erase_prob, *areas) == (timm.probability, timm.min_area, timm.max_area)
    assert np.log(erase.aspect_range) == pytest.approx(timm.log_aspect_ratio)
    erase.erase_prob = 1.0
    erased = []
    for value in (0, 255):
        np.random.seed(0)
        erased.append(erase(dict(img=np.full((256, 256, 3), value, np.uint8)))['img'])
    mask = (erased[0] == erased[1]).all(-1)  # same noise in both
    assert mask.any()
    preprocessor = MODELS.build(dict(read('swinv2_t_in1k_256').model.data_preprocessor, type='ClsDataPreprocessor'))
    inputs = preprocessor(dict(inputs=[torch.from_numpy(erased[0]).permute(2, 0, 1)]))['inputs'][0]
    noise = inputs[:, torch.from_numpy(mask)]
    torch.testing.assert_close(noise.mean(1), torch.zeros(3), rtol=0, atol=0.1)
    torch.testing.assert_close(noise.std(1), torch.ones(3), rtol=0, atol=0.1)


def test_no_config_tests_with_more_images_than_it_trains_with():
    """Tests run in fp32, where training is in bf16."""
    for name in PAPER:
        cfg = read(name)
        for split in ('val', 'test'):
            assert cfg[f'{split}_dataloader'].batch_size <= cfg.train_dataloader.batch_size, (name, split)


@pytest.mark.parametrize(
    'name', ['swinv2_t_in1k_256', 'swinv2_b_in22k_192', 'swinv2_b_w16_in22kto1k_256'], ids=['300e', '90e', '30e']
)
def test_learning_rates_are_those_of_timms_scheduler(name):
    """That of the official lr_scheduler.py, whose step 1 repeats the rate of step 0. In epochs of ten steps."""
    oracles.find_peers()
    from timm.scheduler import CosineLRScheduler

    cfg, length = read(name), 10
    lr, epochs, warmup = (RECIPES[name][key] for key in ('lr', 'epochs', 'warmup'))
    found, expected = [], []
    optimizers = [torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr) for _ in range(2)]
    schedulers = [
        PARAM_SCHEDULERS.build(s, default_args=dict(optimizer=optimizers[0], epoch_length=length))
        for s in cfg.param_scheduler
    ]
    timm = CosineLRScheduler(
        optimizers[1],
        t_initial=(epochs - warmup) * length,
        lr_min=1e-2 * lr,
        warmup_lr_init=1e-3 * lr,
        warmup_t=warmup * length,
        warmup_prefix=True,
        t_in_epochs=False,
    )
    for step in range(epochs * length):
        found.append(optimizers[0].param_groups[0]['lr'])
        expected.append(optimizers[1].param_groups[0]['lr'])
        for optimizer in optimizers:
            optimizer.step()
        for scheduler in schedulers:
            scheduler.step()
        timm.step_update(step)
    # ours is up to two steps of the warm-up ahead
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=2.1 * lr / (warmup * length))
    assert found[0] == pytest.approx(expected[0])
    assert max(found) == pytest.approx(max(expected))
    assert found[-1] == pytest.approx(expected[-1], rel=0.02)


@pytest.mark.parametrize('name', ['swinv2_b_w16_in1k_256', 'swinv2_b_w16_in22kto1k_256', 'swinv2_g_in22k_192'])
def test_weights_decay_as_in_the_official_code(name):
    """Its optimizer.py: no decay of 1-D parameters, biases, `cpb_mlp` and `logit_scale`."""
    cfg = shrink(read(name))
    launch.adapt_to_cpu(cfg)
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(p): name for name, p in model.named_parameters()}
    found = {names[id(p)]: (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']}
    lr, decay = cfg.optim_wrapper.optimizer.lr, cfg.optim_wrapper.optimizer.weight_decay
    assert found.keys() == set(names.values())
    for parameter, value in model.named_parameters():
        exempt = value.ndim == 1 or parameter.endswith('.bias') or 'cpb_mlp' in parameter or 'logit_scale' in parameter
        assert found[parameter][1] == (0.0 if exempt else decay), parameter
    rate = cfg.optim_wrapper.get('paramwise_cfg', {}).get('layer_decay_rate', 1.0)
    assert found['head.fc.weight'][0] == lr
    assert found['backbone.patch_embed.proj.weight'][0] == pytest.approx(lr * rate**5)  # the nano model has four blocks


def test_the_loss_of_mixed_images_is_timms(data, tmp_path):
    """The official loss: SoftTargetCrossEntropy of the mixed and smoothed labels of timm's Mixup."""
    oracles.find_peers()
    from timm.data.mixup import mixup_target
    from timm.loss import SoftTargetCrossEntropy

    head = MODELS.build(load('swinv2_t_in1k_256', data, tmp_path).model.head)
    labels, logits = torch.randint(0, 1000, (4,)), torch.randn(4, 1000)
    expected = SoftTargetCrossEntropy()(logits, mixup_target(labels, 1000, lam=0.3, smoothing=0.1))
    scores = torch.nn.functional.one_hot(labels, 1000).float()
    found = head.loss_module(logits, 0.3 * scores + 0.7 * scores.flip(0), avg_factor=4)
    torch.testing.assert_close(found, expected)


# ---------------------------------------------------------------- weights


@pytest.mark.parametrize('name', RECIPE_NAMES)
def test_starts_from_weights_of_its_size_and_windows(name):
    backbone = read(name).model.backbone
    if 'in22kto1k' not in name or backbone.arch == 'giant':  # from scratch, or never released
        assert 'init_cfg' not in backbone
    if 'in22kto1k' not in name:
        assert 'pretrained_window_sizes' not in backbone
        return
    assert backbone.pretrained_window_sizes == (12, 12, 12, 6)
    if backbone.arch != 'giant':
        assert backbone.init_cfg.checkpoint == f'swinv2://{backbone.arch}_window12_192_22k'
        assert loaders.find_release(backbone.init_cfg.checkpoint).windows == (12, 12, 12, 6)


def releases() -> list[tuple[str, str]]:
    """The config and the checkpoint of each row of the table of README.md."""
    rows = (line.split('|') for line in (CONFIGS / 'README.md').read_text().splitlines() if '`swinv2://' in line)
    return [(row[1].strip(' `')[:-3], row[2].strip(' `')) for row in rows if len(row) > 2]


def test_the_releases_of_the_readme_are_those_of_the_configs():
    assert len(releases()) == 12
    for name, checkpoint in releases():
        backbone = read(name).model.backbone
        windows = backbone.get('pretrained_window_sizes', backbone.window_size)
        assert loaders.find_release(checkpoint).windows == (windows if isinstance(windows, tuple) else (windows,) * 4)
        assert checkpoint.startswith(f'swinv2://{backbone.arch}_')
        side = read(name).train_dataloader.dataset.pipeline[1].scale
        assert f'_{side}' in checkpoint or f'to{side}' in checkpoint


RELEASES = dict(releases()) | {'swinv2_b_in22k_192': 'swinv2://base_window12_192_22k'}


@pytest.mark.parametrize(
    'name',
    [
        'swinv2_t_in1k_256',
        'swinv2_t_w16_in1k_256',
        'swinv2_b_in22k_192',
        'swinv2_b_w16_in22kto1k_256',
        pytest.param('swinv2_b_w24_in22kto1k_384', marks=pytest.mark.slow),
    ],
)
@torch.no_grad()
def test_a_config_has_the_logits_of_the_released_model(name, tmp_path):
    """Those of timm, at the image size, window and pre-training window that the name of the release has."""
    oracles.find_peers()
    from timm.models.swin_transformer_v2 import SwinTransformerV2

    checkpoint = RELEASES[name]
    arch = dict(embed_dims=16, depths=(2, 2, 2, 2), num_heads=(2, 4, 8, 16))
    window, image = map(int, re.search(r'window(?:\d+to)?(\d+)_(?:\d+to)?(\d+)', checkpoint).groups())
    cfg = read(name)
    timm = SwinTransformerV2(
        image,
        window_size=window,
        pretrained_window_sizes=(12, 12, 12, 6) if '12to' in checkpoint else (0, 0, 0, 0),
        num_classes=cfg.model.head.num_classes,
        embed_dim=arch['embed_dims'],
        depths=arch['depths'],
        num_heads=arch['num_heads'],
    )
    timm = oracles.randomize(timm).eval()
    path = tmp_path / loaders.find_release(checkpoint).file_name
    torch.save(timm.state_dict(), path)
    cfg.model.backbone.update(arch=arch, init_cfg=None, attention_backend='reference')
    cfg.model.head.in_channels = 128
    model = MODELS.build(cfg.model).eval()
    load_checkpoint(model, str(path))
    x = torch.randn(1, 3, image, image, generator=torch.Generator().manual_seed(0))
    assert torch.equal(model(x), timm(x))


def test_losses_and_gradients_are_finite_in_bfloat16(data, tmp_path):
    """The whole classifier under autocast."""
    check_bfloat16(load('swinv2_t_in1k_256', data, tmp_path))

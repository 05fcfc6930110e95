"""DINO, Mask2Former, Faster R-CNN and RetinaNet: the toolboxes' recipes, changed only where Swin V2 needs it."""

import argparse
import functools
import re
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, DefaultScope
from nano import ConfigFolder, closest, runner_entries, train_a_step
from nano.starting_points import shrink
from torch import nn

from swinv2_mm.checkpoints import loaders
from swinv2_mm.models import BFloat16SwinTransformerV2

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
from nano.det import write_shapes
from nano.seg import write_ade20k

REPOSITORY = Path(__file__).parents[2]
FOLDER = ConfigFolder(REPOSITORY / 'configs', shrink)
load = FOLDER.load
read = functools.cache(FOLDER.read)  # no test changes what it returns

MASK_RCNN = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
PANOPTIC = 'mmdet::mask2former/mask2former_swin-l-p4-w12-384-in21k_16xb1-lsj-100e_coco-panoptic.py'
# the toolbox's config that each inherits, and the one that the rest is taken from
STOCK = {
    'det/dino_5scale_swinv2_l': ['mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'],
    'det/dino_5scale_swinv2_t': ['mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py', MASK_RCNN],
    'det/mask2former_swinv2_t': ['mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'],
    'det/mask2former_swinv2_l': ['mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py', PANOPTIC],
    'det/mask2former_swinv2_l_panoptic': [PANOPTIC],
    'det/faster_rcnn_swinv2_t': ['mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py', MASK_RCNN],
    'det/retinanet_swinv2_t': ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', MASK_RCNN],
    'seg/mask2former_swinv2_t_ade20k': ['mmseg::mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512.py'],
    'seg/mask2former_swinv2_l_ade20k': [
        'mmseg::mask2former/mask2former_swin-l-in22k-384x384-pre_8xb2-160k_ade20k-640x640.py'
    ],
}
PANOPTIC_NAME = 'det/mask2former_swinv2_l_panoptic'
TRAINED = [name for name in STOCK if '_t' in name or name.startswith('seg')]


@pytest.fixture(autouse=True)
def _scope(request):
    scope = 'mmseg' if 'seg/' in request.node.name else 'mmdet'
    with DefaultScope.overwrite_default_scope(scope):
        yield


@functools.cache
def inherit(base: str) -> Config:
    return Config.fromstring(f'_base_ = {base!r}', '.py')


@functools.cache
def build(name: str) -> nn.Module:
    with torch.device('meta'):
        return MODELS.build(FOLDER.read(name).model)


def test_all_configs_are_tested():
    others = ('htc', 'cascade', 'upernet')
    found = {f'{f}/{p.stem}' for f in ('det', 'seg') for p in (FOLDER.path / f).glob('*.py')}
    assert {name for name in found if not name.split('/')[1].startswith(others)} == set(STOCK)


# ---------------------------------------------------------------- the recipe

CHANGED = re.compile(
    r'model\.backbone\.|optim_wrapper\.constructor$|custom_hooks|'
    r'default_hooks\.checkpoint\.(type|max_keep_ckpts)$|train_dataloader\.persistent_workers$|'
    r'\w+_dataloader\.dataset\.data_prefix\.seg$'  # no panoptic folders for instances
)


@pytest.mark.parametrize('name', STOCK)
def test_the_rest_is_that_of_the_toolboxes(name):
    """Precision, schedule, data, neck and heads; of two configs named above, each entry is that of one."""
    ours, stock = runner_entries(read(name)), [runner_entries(inherit(base)) for base in STOCK[name]]
    keys = [key for key in ours | stock[0] if not CHANGED.match(key)]
    assert [key for key in keys if ours.get(key) not in [entries.get(key) for entries in stock]] == []


def test_instances_need_no_panoptic_folders():
    for name in ('det/mask2former_swinv2_t', 'det/mask2former_swinv2_l'):
        prefixes = [read(name)[f'{split}_dataloader'].dataset.data_prefix for split in ('train', 'val', 'test')]
        assert prefixes == [dict(img='train2017/'), dict(img='val2017/'), dict(img='val2017/')]


@pytest.mark.parametrize('name', STOCK)
def test_the_backbone_has_what_swin_v1_has(name):
    backbone = read(name).model.backbone
    first, last = (inherit(STOCK[name][i]).model.backbone for i in (0, -1))
    assert backbone.get('out_indices', (0, 1, 2, 3)) == first.out_indices
    is_smaller = name == 'det/dino_5scale_swinv2_t'  # than the stock model, and fits without
    assert backbone.get('with_cp', False) == (first.get('with_cp', False) and not is_smaller)
    assert backbone.drop_path_rate == last.drop_path_rate


@pytest.mark.parametrize('name', STOCK)
def test_starts_from_weights_of_its_size_and_windows(name):
    backbone = read(name).model.backbone
    assert f'_{dict(tiny="t", large="l")[backbone.arch]}' in name
    assert backbone.arch in backbone.init_cfg.checkpoint
    windows = backbone.pretrained_window_sizes
    release = loaders.find_release(backbone.init_cfg.checkpoint)
    assert release.windows == (windows if isinstance(windows, tuple) else (windows,) * 4)


# ---------------------------------------------------------------- the model and its optimizer


@pytest.mark.parametrize('name', STOCK)
def test_parameters_are_those_of_the_table(name):
    page = (REPOSITORY / 'docs/configs.md').read_text()
    row = re.search(rf'`{name.split("/")[1]}.py` \| (\d+) \| \w+ \| ([\d.]+) \| [\d.]+ \|', page)
    assert int(row[1]) == read(name).model.backbone.window_size
    assert float(row[2]) == round(sum(p.numel() for p in build(name).parameters()) / 1e6, 1)


# learning rate of the backbone and of the rest, weight decay, and embeddings without it
OPTIMIZERS = {
    'dino': (1e-5, 1e-4, 1e-4, ()),
    'mask2former': (1e-5, 1e-4, 0.05, ('query_embed', 'query_feat', 'level_embed')),
    'faster': (1e-4, 1e-4, 0.05, ()),
    'retinanet': (1e-4, 1e-4, 0.05, ()),
}


@pytest.mark.parametrize('name', STOCK)
def test_every_parameter_has_its_learning_rate_and_weight_decay(name):
    slow, fast, decay, embeddings = OPTIMIZERS[re.split('[/_]', name)[1]]
    model = build(name)
    wrapper = build_optim_wrapper(model, read(name).optim_wrapper.copy())
    assert type(wrapper.optimizer).__name__ == 'AdamW'
    found = {id(p): (g['lr'], g['weight_decay']) for g in wrapper.optimizer.param_groups for p in g['params']}
    modules = dict(model.named_modules())
    for key, p in model.named_parameters():
        owner, _, last = key.rpartition('.')
        exempt = (
            isinstance(modules[owner], (nn.LayerNorm, nn.GroupNorm))
            or 'bias' in last
            or 'logit_scale' in key
            or '.cpb_mlp.' in key
            or owner.split('.')[-1] in embeddings
        )
        assert found[id(p)] == (slow if key.startswith('backbone.') else fast, 0.0 if exempt else decay), key
    assert len(found) == len(list(model.parameters()))


# ---------------------------------------------------------------- training


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp('data')
    return dict(det=write_shapes(folder) / 'coco', seg=write_ade20k(folder / 'ade'))


@pytest.mark.parametrize('name', TRAINED)
def test_trains_a_step_and_tests_an_image(name, data, tmp_path):
    runner = train_a_step(load(name, data[name[:3]], tmp_path))
    figures = {key for key in runner.message_hub.log_scalars if re.fullmatch(r'val/(mIoU|.*_mAP)', key)}
    masks = {'val/coco/segm_mAP'} if 'mask2former' in name else set()
    assert figures == ({'val/mIoU'} if name.startswith('seg') else {'val/coco/bbox_mAP', *masks})


def test_panoptic_losses_and_gradients_are_finite():
    """Without its data, whose transforms need panopticapi."""
    from mmdet.testing import demo_mm_inputs

    model = MODELS.build(shrink(FOLDER.read(PANOPTIC_NAME)).model).train()
    model.init_weights()
    batch = demo_mm_inputs(2, [[3, 96, 128]] * 2, num_classes=80, with_mask=True, with_semantic=True)
    batch = model.data_preprocessor(batch, True)
    total, losses = model.parse_losses(model(**batch, mode='loss'))
    total.backward()
    assert {'loss_cls', 'loss_mask', 'loss_dice'} <= set(losses)
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    (result,) = model.eval()(batch['inputs'][:1], batch['data_samples'][:1], mode='predict')
    assert result.pred_panoptic_seg.sem_seg.shape == (1, 96, 128)


@pytest.mark.parametrize('name', sorted(set(STOCK) - {*TRAINED, PANOPTIC_NAME}))
def test_differs_only_in_numbers_from_a_config_trained_above(name):
    assert closest(shrink(FOLDER.read(name)), [shrink(FOLDER.read(other)) for other in TRAINED]) == []


def bf16_options(folder: str) -> dict:
    """The options with which the README of a folder of configs changes the backbone to bf16."""
    readme = (FOLDER.path / folder / 'README.md').read_text()
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(shlex.split(re.search(r'`(--cfg-options\s[^`]*BFloat16[^`]*)`', readme)[1])).cfg_options


def test_the_backbone_trains_in_bfloat16(data, tmp_path):
    """In a model whose NMS raises an error under autocast."""
    cfg = load('det/faster_rcnn_swinv2_t', data['det'], tmp_path)
    options = bf16_options('det')
    assert options == bf16_options('seg')
    cfg.merge_from_dict(options)
    assert type(train_a_step(cfg).model.backbone) is BFloat16SwinTransformerV2


# ---------------------------------------------------------------- inherited


@pytest.mark.parametrize('name', STOCK)
def test_a_base_named_by_the_package_differs_only_in_the_scope_of_our_hooks(name):
    """There mmengine adds `_scope_='swinv2_mm'` to typed dicts without a scope, see `swinv2_mm.scope`."""
    ours, theirs = runner_entries(read(name)), runner_entries(inherit(f'swinv2_mm::{name}.py'))
    changed = {key: theirs.get(key) for key in ours | theirs if ours.get(key) != theirs.get(key)}
    assert changed == {'custom_hooks.0._scope_': 'swinv2_mm'}

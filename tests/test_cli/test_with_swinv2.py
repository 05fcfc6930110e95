"""Configs with a Swin V2 backbone compared with stock Swin V1 configs; their text; what is refused and why."""

import functools
import importlib.util
import re
import socket
from collections import defaultdict
from pathlib import Path
from unittest.mock import Mock

import pytest
from mmengine.config import Config
from nano import ARCH, NANO_CONFIGS
from tool_runs import REPOSITORY
from torch import nn

from swinv2_mm.cli.channels import new_channels
from swinv2_mm.cli.optimization import new_optimization
from swinv2_mm.cli.with_swinv2 import LINE_LENGTH, Backbone, changes, check, read, source

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmaction')

SWIN_T_SEG = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
SWIN_T_VIDEO = 'mmaction::recognition/swin/swin-tiny-p244-w877_in1k-pre_8xb8-amp-32x2x1-30e_kinetics400-rgb.py'
SLOWONLY = 'mmaction::recognition/slowonly/slowonly_r50_8xb16-4x16x1-256e_kinetics400-rgb.py'
CONSTRUCTOR = 'swinv2_mm.SwinV2OptimWrapperConstructor'
R50 = [256, 512, 1024, 2048]  # channels of the stages of a ResNet-50
TINY = [96, 192, 384, 768]
RGB = dict(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], bgr_to_rgb=True)


@functools.cache
def stock(name: str) -> Config:
    return read(source(name, {}))


@functools.cache
def converted(name: str, arch: str) -> Config:
    parts, notes = changes(stock(name), Backbone(arch))
    return read(source(name, parts, notes))


def select(cfg, key: str):
    """A value of a config by a dotted key."""
    return functools.reduce(lambda part, name: part[name], key.split('.'), cfg)


def resnet(**more) -> Config:
    """A segmentor with a ResNet-18 of two channels, whose feature maps have 2, 4, 8 and 16 channels."""
    backbone = more.pop('backbone', {})
    if 'type' not in backbone:
        backbone = dict(type='ResNet', depth=18, base_channels=2, stem_channels=2) | backbone
    head = dict(type='FCNHead', in_channels=16, channels=8, num_classes=2)
    model = dict(type='EncoderDecoder', data_preprocessor=RGB, backbone=backbone, decode_head=head)
    wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-4))
    return Config(dict(default_scope='mmseg', model=model, optim_wrapper=wrapper) | more)


# ---------------------------------------------------------------- compared with stock Swin V1 configs


@pytest.mark.parametrize(
    ('name', 'arch', 'swin_v1', 'keys'),
    [
        (
            'mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py',
            'tiny',
            'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
            ['neck', 'rpn_head', 'roi_head', 'data_preprocessor'],
        ),
        (
            'mmdet::mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
            'tiny',
            'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py',
            ['panoptic_head', 'panoptic_fusion_head', 'data_preprocessor'],
        ),
        ('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py', 'tiny', SWIN_T_SEG, ['decode_head.in_channels']),
        ('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py', 'tiny', SWIN_T_SEG, ['auxiliary_head.in_channels']),
        (SLOWONLY, 'tiny', SWIN_T_VIDEO, ['cls_head.in_channels']),
    ],
)
def test_parts_that_read_the_backbone_equal_those_of_stock_swin_v1_configs(name, arch, swin_v1, keys):
    for key in keys:
        assert select(converted(name, arch).model, key) == select(stock(swin_v1).model, key)


def test_channels_are_those_of_the_same_strides():
    # the necks of these two skip the feature map of stride 4, or do not get it
    retinanet = converted('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py', 'tiny').model.neck
    swin_t = stock('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py').model.neck
    assert retinanet.in_channels[retinanet.start_level :] == swin_t.in_channels
    dino = converted('mmdet::dino/dino-4scale_r50_8xb2-12e_coco.py', 'large').model.neck
    assert dino.in_channels == stock('mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py').model.neck.in_channels[1:]


@pytest.mark.parametrize(
    ('name', 'swin_v1'),
    [
        ('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py', 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),
        ('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py', SWIN_T_SEG),
        (SLOWONLY, SWIN_T_VIDEO),
    ],
)
def test_optimizer_is_that_of_stock_swin_v1_configs(name, swin_v1):
    new, old = converted(name, 'tiny'), stock(swin_v1)
    for key in ('type', 'lr', 'weight_decay'):
        assert new.optim_wrapper.optimizer[key] == old.optim_wrapper.optimizer[key]
    assert new.optim_wrapper.optimizer.keys() == {'type', 'lr', 'weight_decay'}
    backbone = old.optim_wrapper.paramwise_cfg.get('backbone', {})  # mmaction has its own constructor
    assert new.optim_wrapper.get('paramwise_cfg', {}).get('custom_keys', {}).get('backbone', {}) == backbone
    if 'auto_scale_lr' in old:
        assert new.auto_scale_lr.base_batch_size == old.auto_scale_lr.base_batch_size
    assert [s.type for s in new.param_scheduler][0] == 'LinearLR'


def test_options_of_a_stock_swin_v1_config_are_kept():
    old = stock(SWIN_T_VIDEO).optim_wrapper.paramwise_cfg
    kept = new_optimization(stock(SWIN_T_VIDEO))[0]['optim_wrapper']['paramwise_cfg']
    assert kept == dict(_delete_=True, custom_keys={key: old[key] for key in ('norm', 'backbone')})
    name = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'
    old = stock(name).optim_wrapper.paramwise_cfg
    changed, notes = new_optimization(stock(name))
    keys = {key: old.custom_keys[key] for key in ('backbone', 'query_embed', 'query_feat', 'level_embed')}
    options = dict(_delete_=True, custom_keys=keys, norm_decay_mult=old.norm_decay_mult)
    assert changed['optim_wrapper'] == dict(constructor=CONSTRUCTOR, paramwise_cfg=options)
    assert notes == []


# ---------------------------------------------------------------- channels


def test_new_channels_follow_the_feature_maps_that_each_head_reads():
    model = dict(
        backbone=dict(in_channels=2048),
        data_preprocessor=dict(in_channels=2048),
        decode_head=[
            dict(in_channels=2048, c1_in_channels=256, loss=dict(weight=2048)),
            dict(in_channels=[1024, 2048], in_index=[2, 3], update=dict(in_channels=256)),
        ],
        auxiliary_head=dict(in_channels=1024, in_index=2),
        reversed_head=dict(in_channels=(2048, 1024, 512, 256)),
        other_head=dict(in_channels=512),
    )
    assert new_channels(model, R50, TINY) == dict(
        decode_head=[
            dict(in_channels=768, c1_in_channels=96, loss=dict(weight=2048)),
            dict(in_channels=[384, 768], in_index=[2, 3], update=dict(in_channels=256)),
        ],
        auxiliary_head=dict(in_channels=384),
        reversed_head=dict(in_channels=(768, 384, 192, 96)),
    )


def test_new_channels_of_heads_that_read_a_neck():
    head = dict(in_channels=1024, in_index=1)
    fpn = dict(type='FPN', in_channels=R50, out_channels=256)
    assert new_channels(dict(neck=fpn, head=head), R50, TINY) == dict(neck=dict(in_channels=TINY))
    several = [fpn, dict(type='DyHead', in_channels=256, out_channels=256)]
    adapted = [dict(fpn, in_channels=TINY), several[1]]
    assert new_channels(dict(neck=several, head=head), R50, TINY) == dict(neck=adapted)
    # passes on all feature maps but the last
    jpu = dict(type='mmseg.JPU', in_channels=tuple(R50[1:]), mid_channels=16, norm_cfg=dict(type='BN'))
    expected = dict(neck=dict(in_channels=tuple(TINY[1:])), head=dict(in_channels=384))
    assert new_channels(dict(neck=jpu, head=head), R50[1:], TINY[1:]) == expected
    with pytest.raises(ValueError, match='model.neck of type mmseg.JPU cannot be run: .*AssertionError'):
        new_channels(dict(neck=dict(jpu, in_channels=(1, 2)), head=head), R50[1:], TINY[1:])


# ---------------------------------------------------------------- backbone


@pytest.mark.parametrize(
    ('backbone', 'stages', 'text'),
    [
        ({}, (0, 1, 2, 3), ''),
        (dict(out_indices=(1, 3)), (1, 3), ''),
        (dict(out_indices=(2,)), (2,), ''),
        (
            dict(strides=(1, 2, 2, 1), dilations=(1, 1, 1, 2), out_indices=(3,)),
            (2,),
            'strides (16,); of Swin V2, stage 3',
        ),
        (
            dict(strides=(1, 2, 1, 1), dilations=(1, 1, 2, 4), out_indices=(0, 1, 2, 3)),
            (0, 1, 2, 3),
            'strides (4, 8, 8, 8), by dilation; Swin V2 has (4, 8, 16, 32)',
        ),
        (
            dict(type='MobileNetV2', strides=(1, 2, 2, 1, 1, 1, 1), out_indices=(1, 2, 4, 6)),
            (0, 1, 2, 3),
            'strides (4, 8, 8, 8), by dilation; Swin V2 has (4, 8, 16, 32)',
        ),
    ],
)
def test_stages_have_the_strides_of_the_former_backbone(backbone, stages, text):
    parts, notes = changes(resnet(backbone=backbone), Backbone(ARCH))
    assert parts['model']['backbone']['out_indices'] == stages
    assert text in ' '.join(notes)
    assert bool(notes) == bool(text)


def test_weights_of_the_former_model_are_not_loaded():
    model = dict(resnet().model, pretrained='resnet.pth', init_cfg=dict(type='Pretrained', checkpoint='model.pth'))
    parts, notes = changes(resnet(model=model, load_from='coco.pth'), Backbone(ARCH, checkpoint='swinv2.pth'))
    assert parts['model']['backbone']['init_cfg'] == dict(type='Pretrained', checkpoint='swinv2.pth')
    assert parts['model']['pretrained'] is parts['model']['init_cfg'] is parts['load_from'] is None
    assert notes == ['load_from: coco.pth is for the former backbone']
    for init in (dict(type='Normal', layer='Conv2d'), [dict(type='Normal', layer='Conv2d')]):
        assert 'init_cfg' not in changes(resnet(model=dict(model, init_cfg=init)), Backbone(ARCH))[0]['model']


@pytest.mark.parametrize(
    ('former', 'new'),
    [
        (RGB, None),
        (dict(mean=[123.68, 116.779, 103.939], std=[58.393, 57.12, 57.375], bgr_to_rgb=True), None),
        (dict(mean=[103.53, 116.28, 123.675], std=[1.0, 1.0, 1.0], bgr_to_rgb=False), RGB),
        (dict(pad_size_divisor=32), RGB),
        (dict({key: RGB[key] for key in ('mean', 'std')}, to_rgb=True), None),
    ],
)
def test_images_are_normalised_as_in_pre_training(former, new):
    parts, notes = changes(resnet(model=dict(resnet().model, data_preprocessor=former)), Backbone(ARCH))
    assert parts['model'].get('data_preprocessor') == new
    assert bool(notes) == bool(new)


@pytest.mark.parametrize(
    ('change', 'text'),
    [
        (dict(default_scope='mmpretrain'), 'the config is one of mmpretrain, not of mmdet, mmseg, mmaction'),
        (dict(model=dict(type='SAN')), 'model of type SAN has no backbone'),
        (
            dict(model=dict(type='QDTrack', detector=dict(backbone={}))),
            'QDTrack has no backbone: model.detector has one; put it into the config of that model',
        ),
        (
            dict(backbone=dict(type='swinv2_mm.SwinTransformerV2')),
            'model.backbone is a Swin V2 already: change its arch',
        ),
        (dict(backbone=dict(in_channels=6)), 'model.backbone of type ResNet takes 6 channels, not RGB'),
        (dict(backbone=dict(type='ResNetTSM')), 'model.backbone of type ResNetTSM mixes the frames of a clip'),
        (dict(backbone=dict(depth=19)), "model.backbone of type ResNet cannot be run: KeyError: 'invalid depth 19"),
        (
            dict(backbone=dict(type='UNet', base_channels=2)),
            r'model.backbone of type UNet returns feature maps of strides \(16, 8, 4, 2, 1\); Swin V2 has \(4, ',
        ),
        (dict(backbone=dict(type='FastSCNN')), r'FastSCNN returns feature maps of strides \(8, 32, 8\)'),
        (
            dict(
                backbone=dict(
                    type='BiSeNetV1',
                    backbone_cfg=dict(type='ResNet', depth=18, base_channels=2, stem_channels=2),
                    context_channels=(4, 8, 16),
                    spatial_channels=(2, 2, 2, 4),
                    out_channels=8,
                    out_indices=(0, 1, 2),
                )
            ),
            r'BiSeNetV1 returns feature maps of strides \(8, 8, 16\)',
        ),
        (dict(optim_wrapper=dict(type='OptimWrapper')), 'optim_wrapper of type OptimWrapper has no optimizer'),
    ],
)
def test_changes_refuses_what_swin_v2_cannot_replace(change, text):
    with pytest.raises(ValueError, match=text) as error:
        changes(resnet(**change), Backbone(ARCH))
    assert '\n' not in str(error.value)


# ---------------------------------------------------------------- optimizer


def optimization(scheduler=None, **wrapper) -> tuple[dict, list[str]]:
    wrapper = dict(optimizer=dict(type='SGD', lr=0.01, momentum=0.9)) | wrapper
    return new_optimization(Config(dict(default_scope='mmseg', optim_wrapper=wrapper, param_scheduler=scheduler or [])))


def test_schedule_is_scaled_with_the_learning_rate_and_has_one_warm_up():
    poly = dict(type='PolyLR', eta_min=1e-4, power=0.9, end=100, by_epoch=False)
    warm_up, decay = optimization(poly)[0]['param_scheduler']
    assert warm_up['type'] == 'LinearLR'
    assert decay == dict(poly, eta_min=6e-7)  # from 0.01 to 6e-5
    for kind in ('LinearLR', 'mmdet.QuadraticWarmupLR'):
        first = dict(type=kind, end=5)
        assert optimization([first, poly])[0]['param_scheduler'] == [first, decay]
        assert 'param_scheduler' not in optimization([first])[0]
    constant, falling = (
        dict(type='ConstantLR', factor=0.1, end=5),
        dict(type='LinearLR', start_factor=1, end_factor=0.1),
    )
    assert optimization([constant, poly])[0]['param_scheduler'] == [warm_up, decay]
    assert optimization([falling])[0]['param_scheduler'] == [warm_up, falling]
    tail = dict(constant, begin=90, end=100)
    assert optimization([poly, tail])[0]['param_scheduler'] == [warm_up, decay, tail]
    one_cycle = dict(type='OneCycleLR', eta_max=0.01)
    assert optimization([one_cycle])[0]['param_scheduler'] == [dict(one_cycle, eta_max=6e-5)]


def test_options_made_for_sgd_are_left_out():
    changed, _ = optimization(paramwise_cfg=dict(bias_lr_mult=2.0, norm_decay_mult=0.0))
    assert changed['optim_wrapper']['paramwise_cfg'] == dict(_delete_=True, norm_decay_mult=0.0)


def test_a_learning_rate_for_training_from_scratch_is_named():
    note = 'the learning rate of the backbone, 0.001, is kept; the Swin V1 configs of mmseg have 6e-05 for 16 samples'
    assert note in optimization(optimizer=dict(type='AdamW'))[1][0]  # torch's default
    assert optimization(optimizer=dict(type='AdamW', lr=1e-4))[1] == []


def test_optimizer_of_adamw_is_kept():
    adamw = dict(type='AdamW', lr=1e-3)  # of the backbone, 1e-4
    keys = {'backbone': dict(lr_mult=0.1), 'backbone.layer1': dict(lr_mult=0), 'head': dict(lr_mult=2)}
    changed, notes = optimization(optimizer=adamw, paramwise_cfg=dict(custom_keys=keys, bypass_duplicate=True))
    kept = {key: keys[key] for key in ('backbone', 'head')}
    options = dict(_delete_=True, custom_keys=kept, bypass_duplicate=True)
    assert changed == dict(optim_wrapper=dict(constructor=CONSTRUCTOR, paramwise_cfg=options))
    assert notes == []
    ours = dict(
        optimizer=adamw, constructor=CONSTRUCTOR, paramwise_cfg=dict(custom_keys={'backbone': keys['backbone']})
    )
    assert optimization(**ours) == (dict(optim_wrapper=dict(constructor=CONSTRUCTOR)), [])
    slow = dict(adamw, lr=1e-4)
    changed, (note,) = optimization(optimizer=slow, constructor='LayerDecay', paramwise_cfg=dict(num_layers=12))
    assert changed == dict(optim_wrapper=dict(constructor=CONSTRUCTOR, paramwise_cfg=dict(_delete_=True)))
    assert note.startswith('optim_wrapper: without the options of LayerDecay; swinv2_mm.LearningRateDecay')


def test_an_optimizer_may_have_no_learning_rate():
    assert optimization(optimizer=dict(type='Adam'))[0]['optim_wrapper']['optimizer']['lr'] == 6e-5


def test_a_config_for_tests_gets_no_optimizer():
    assert new_optimization(Config(dict(default_scope='mmdet'))) == (
        {},
        ['the config has no optim_wrapper: it is for tests only'],
    )


# ---------------------------------------------------------------- text


def test_source_is_read_as_the_base_with_the_changes(tmp_path):
    base = tmp_path / 'base.py'
    base.write_text(
        "model = dict(backbone=dict(depth=50), neck=[dict(type='A'), dict(type='B')])\nload_from = 'a.pth'\n"
    )
    parts = dict(
        model=dict(
            backbone=dict(_delete_=True, arch=dict(depths=(1, 2)), out_indices=(3,), ratio=0.5, name="it's"),
            neck=[dict(type='A', in_channels=[96, 192]), dict(type='B' * 100)],
            head={'norm.1': dict(lr_mult=0.1), 'none': None, 'empty': {}, 'no': []},
        ),
        load_from=None,
    )
    text = source(str(base), parts, ['a note ' * 30])
    expected = Config.fromfile(base)
    expected.merge_from_dict(parts)
    assert read(text).to_dict() == expected.to_dict()
    assert read(text).model.backbone == dict(arch=dict(depths=(1, 2)), out_indices=(3,), ratio=0.5, name="it's")
    assert all(len(line) <= LINE_LENGTH for line in text.splitlines() if 'BBB' not in line and str(base) not in line)


# ---------------------------------------------------------------- check


def segmentor(**head) -> Config:
    cfg = Config.fromfile(NANO_CONFIGS / 'seg.py')
    cfg.model.decode_head.update(head)
    return cfg


@pytest.mark.parametrize('index', range(4))
def test_check_finds_out_whether_all_feature_maps_are_read(index):
    cfg = segmentor(in_channels=16 * 2**index)
    cfg.model.backbone.out_indices = (index,)
    assert check(cfg)
    cfg.model.backbone.out_indices = (0, 1, 2, 3)
    cfg.model.decode_head.in_index = index
    assert not check(cfg)


@pytest.mark.parametrize(
    ('head', 'text'),
    [
        (dict(in_channels=15), 'model.decode_head.convs.0.conv of type Conv2d: RuntimeError: .* 15 channels'),
        (dict(in_index=4), 'model.decode_head of type FCNHead: IndexError'),
        (dict(num_convs=0), r'FCNHead cannot be built: AssertionError: assert self.in_channels == self.channels'),
        (dict(channels='many'), 'Conv2d cannot be built: TypeError'),
        (dict(loss_decode=dict(type='CrossEntropyLoss', loss_weight=float('inf'))), 'random data is (inf|nan)'),
    ],
)
def test_check_names_the_part_that_does_not_work(head, text):
    with pytest.raises(ValueError, match=text) as error:
        check(segmentor(**head))
    assert '\n' not in str(error.value)


def test_check_loads_no_weights():
    pretrained = dict(type='Pretrained', checkpoint='missing.pth')
    cfg = segmentor(init_cfg=pretrained)
    cfg.model.backbone.init_cfg = pretrained
    check(cfg)


class Asks(nn.Module):
    """A head that asks another module for an attribute that it lacks."""

    def __init__(self):
        super().__init__()
        self.branches = nn.Linear(1, 1).num_branch


def test_check_names_the_part_that_asks_for_an_attribute():
    cfg = segmentor()
    cfg.model.decode_head = dict(type=Asks)
    with pytest.raises(ValueError, match="Asks cannot be built: AttributeError: 'Linear' object has no attribute"):
        check(cfg)


def test_check_of_an_operator_without_a_cpu_version_asks_for_a_gpu(monkeypatch):
    message = 'carafe_forward_impl: implementation for device cpu not found.'  # of mmcv
    monkeypatch.setattr('mmseg.models.FCNHead.forward', Mock(side_effect=RuntimeError(message)))
    with pytest.raises(
        ValueError, match=f'model.decode_head of type FCNHead: RuntimeError: {message}; run this on .* GPU'
    ):
        check(segmentor())


def test_check_builds_the_optimizer():
    cfg = segmentor()
    cfg.optim_wrapper = dict(type='AmpOptimWrapper', optimizer=dict(type='AdamW', lr=1e-3), loss_scale='dynamic')
    check(cfg)
    cfg.optim_wrapper.optimizer.learning_rate = 1
    with pytest.raises(ValueError, match='learning_rate'):
        check(cfg)


def test_check_of_a_detector_of_persons_in_video():
    name = 'mmaction::detection/slowonly/slowonly_k400-pre-r50_8xb8-8x8x1-10e_ava-kinetics-rgb.py'
    parts, _ = changes(stock(name), Backbone(ARCH, window=4))
    assert parts['model']['backbone']['out_indices'] == (2,)  # of stride 16, as the former one
    assert check(read(source(name, parts)))
    parts['model']['roi_head']['bbox_head']['in_channels'] += 1
    with pytest.raises(ValueError, match='model.roi_head.bbox_head'):
        check(read(source(name, parts)))


# ---------------------------------------------------------------- all families

# of families whose first config is a special case
REPRESENTATIVES = {
    'mmdet::bytetrack': 'yolox_x_8xb4-amp-80e_crowdhuman-mot17halftrain_test-mot17halfval.py',
    'mmdet::cascade_rpn': 'cascade-rpn_faster-rcnn_r50-caffe_fpn_1x_coco.py',
    'mmdet::dcn': 'faster-rcnn_r50-dconv-c3-c5_fpn_1x_coco.py',
    'mmdet::dcnv2': 'faster-rcnn_r50-mdconv-c3-c5_fpn_1x_coco.py',
    'mmdet::v3det': 'fcos_r50_fpn_8x4_sample1e-3_mstrain_v3det_2x.py',
    'mmseg::swin': SWIN_T_SEG.rpartition('/')[2],
    'mmaction::recognition/tpn': 'tpn-slowonly_r50_8xb8-8x8x1-150e_kinetics400-rgb.py',
}
# packages that these configs need
PACKAGES = {'mmdet::paa': 'sklearn', 'mmdet::timm_example': 'timm'}
TOOLBOXES = ('mmdet', 'mmseg', 'mmaction')


def stock_configs(toolbox: str) -> Path:
    return Path(importlib.util.find_spec(toolbox).origin).parent / '.mim/configs'


def families() -> dict[str, list[Path]]:
    """The configs of each folder of the toolboxes, by names such as mmdet::faster_rcnn."""
    found = defaultdict(list)
    for toolbox in TOOLBOXES:
        root = stock_configs(toolbox)
        for path in sorted(root.glob('**/*.py')):
            folder = path.parent.relative_to(root).as_posix()
            if '_base_' not in folder and folder != 'common':
                found[f'{toolbox}::{folder}'].append(path)
    return found


def simplest(family: str, configs: list[Path]) -> Path:
    """The config of a family for a small backbone and a short training, with the shortest name."""
    if family in REPRESENTATIVES:
        return configs[0].with_name(REPRESENTATIVES[family])
    sizes = ('r50', 'tiny', '-t')
    return min(configs, key=lambda c: (not any(s in c.name for s in sizes), '1x' not in c.name, len(c.name), c.name))


@functools.cache
def families_that_do_not_work() -> set[str]:
    """The families in the tables of the docs."""
    page = (REPOSITORY / 'docs/any_config.md').read_text()
    (section,) = re.findall(r'^## Families that do not work$(.*?)(?=^## |\Z)', page, re.MULTILINE | re.DOTALL)
    listed = set()
    for table in re.split(r'^### ', section, flags=re.MULTILINE)[1:]:
        rows = [line.split('|')[1] for line in table.splitlines() if line.startswith('| `')]
        listed |= {f'{table.split()[0]}::{name}' for row in rows for name in re.findall('`(.*?)`', row)}
    return listed


FAMILIES = families()


@pytest.mark.slow
def test_docs_list_families_that_exist():
    assert families_that_do_not_work() <= FAMILIES.keys()


@pytest.mark.slow
@pytest.mark.parametrize('family', FAMILIES)
def test_families_train_a_step_unless_the_docs_list_them(family, tmp_path, monkeypatch):
    if family in PACKAGES:
        pytest.importorskip(PACKAGES[family])
    if family == 'mmdet::crowddet' and not pytest.importorskip('torchvision.extension')._has_ops():
        pytest.skip('its RoIAlign of torchvision takes minutes without the compiled operators')
    monkeypatch.chdir(tmp_path)  # some models write files
    monkeypatch.setattr(socket, 'getaddrinfo', no_network)
    path = simplest(family, FAMILIES[family])
    toolbox, folder = family.split('::')
    # mmengine finds no folder of another kind by the name of a toolbox
    base = f'{toolbox}::{folder}/{path.name}' if re.match(r'\w+(/|$)', folder) else str(path)
    try:
        parts, _ = changes(stock(base), Backbone(ARCH, window=4))
        check(read(source(base, parts)))
        reason = ''
    except (ValueError, FileNotFoundError) as error:
        reason = str(error)
    print(reason)
    assert bool(reason) == (family in families_that_do_not_work()), reason


def no_network(*_):
    raise OSError('no network in tests')

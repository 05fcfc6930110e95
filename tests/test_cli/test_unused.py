"""Parameters without gradients are found before DistributedDataParallel fails; the suggested options avoid them."""

import inspect
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, DefaultScope
from nano import ARCH, CHANNELS, NANO_CONFIGS
from nano.det import narrow
from processes import ProcessError, run_processes
from torch import nn

from swinv2_mm.cli.classes import check_classes
from swinv2_mm.cli.inputs import random_data
from swinv2_mm.cli.unused import check_unused

CONFIGS = Path(__file__).parents[2] / 'configs'
LEVELS = dict(in_channels=CHANNELS, out_channels=8, num_outs=4)
HEAD = dict(channels=8, num_classes=3, num_convs=1, concat_input=False)


def config(scope: str, launcher: str = 'pytorch', **model) -> Config:
    """A model with a nano backbone of ours."""
    backbone = dict(type='swinv2_mm.SwinTransformerV2', arch=ARCH, window_size=4, **model.pop('backbone', {}))
    return Config(dict(default_scope=scope, launcher=launcher, model=dict(backbone=backbone, **model)))


def detector(neck: dict, **options) -> Config:
    return config('mmdet', type='RetinaNet', neck=LEVELS | neck, **options)


def fcn(in_index: int | list[int], **more) -> dict:
    """A head of mmsegmentation for one or several feature maps."""
    if isinstance(in_index, list):
        more |= dict(input_transform='resize_concat', in_channels=[CHANNELS[i] for i in in_index])
    return dict(type='FCNHead', in_index=in_index, **HEAD | dict(in_channels=CHANNELS[3]) | more)


def segmentor(*heads: dict, **options) -> Config:
    first, *others = heads
    return config('mmseg', type='EncoderDecoder', decode_head=first, auxiliary_head=others, **options)


def error_of(cfg: Config) -> str | None:
    """The error of the check, or None."""
    try:
        check_unused(cfg, check_classes(cfg))
    except ValueError as error:
        return str(error)
    return None


def apply_hint(cfg: Config) -> Config:
    """The config with the first options that the error suggests, parsed as on a command line."""
    options = error_of(cfg).partition('--cfg-options ')[2].partition(', or ')[0]
    cfg = cfg.copy()
    for option in shlex.split(options):
        name, _, value = option.partition('=')
        cfg.merge_from_dict({name: DictAction._parse_iterable(value)})
    return cfg


def without_gradient(cfg: Config) -> set[str]:
    """Parameters of the backbone that get no gradient from the outputs of the neck or the heads."""
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        backbone = MODELS.build(cfg.model.backbone)
        maps = backbone(torch.rand(1, 3, 128, 128))
        if 'neck' in cfg.model:
            outputs = MODELS.build(cfg.model.neck)(maps)
        else:
            heads = [cfg.model.decode_head, *cfg.model.auxiliary_head]
            outputs = [MODELS.build(head)(maps) for head in heads]
    sum(output.sum() for output in outputs).backward()
    return {name for name, p in backbone.named_parameters() if p.grad is None and p.requires_grad}


@MODELS.register_module()
class OwnDetector(nn.Module):
    """A detector of a user, which may use any feature map."""


# ---------------------------------------------------------------- unused outputs, and the suggested options


@pytest.mark.parametrize('kind', ['FPN', 'PAFPN', 'FPN_DropBlock'])
@pytest.mark.parametrize('start', [0, 1, 2])
def test_check_unused_start_level_of_a_neck(kind, start):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type=kind, start_level=start, num_outs=4 - start))
    unused = without_gradient(cfg)
    assert unused == {f'norm{i}.{name}' for i in range(start) for name in ('weight', 'bias')}
    assert bool(unused) == (error_of(cfg) is not None)
    if unused:
        better = apply_hint(cfg)
        assert not without_gradient(better)
        assert error_of(better) is None


def test_check_unused_default_of_a_neck():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='NASFCOS_FPN', num_outs=3))
    assert 'norm0.weight' in without_gradient(cfg)
    assert error_of(cfg) == (
        'nothing uses output 0 of model.backbone.out_indices=(0, 1, 2, 3), and DistributedDataParallel stops if '
        'parameters get no gradient: --cfg-options model.backbone.out_indices="[1,2,3]" '
        'model.neck.in_channels="[32,64,128]" model.neck.start_level=0, or find_unused_parameters=True'
    )


@pytest.mark.parametrize(
    'heads',
    [
        (fcn(3),),
        (fcn(-1),),
        (fcn(3), fcn(2, in_channels=CHANNELS[2])),
        (fcn([1, 3]), fcn(3)),
        (fcn([0, 1, 2, 3]),),
    ],
)
def test_check_unused_in_index_of_heads(heads):
    pytest.importorskip('mmseg')
    cfg = segmentor(*heads)
    unused = without_gradient(cfg)
    assert bool(unused) == (error_of(cfg) is not None)
    if unused:
        better = apply_hint(cfg)
        assert not without_gradient(better)
        assert error_of(better) is None


def test_check_unused_outputs_of_a_classifier():
    """Its head reads the last feature map; the default of the backbone is all four."""
    pytest.importorskip('mmpretrain')
    cfg = Config.fromfile(NANO_CONFIGS / 'cls.py')
    cfg.launcher = 'pytorch'
    assert error_of(cfg) is None
    cfg.model.backbone.out_indices = (1, 2, 3)
    assert error_of(cfg).startswith('nothing uses output 1 and 2 of model.backbone.out_indices=(1, 2, 3)')
    assert 'model.backbone.out_indices="[3]", or ' in error_of(cfg)
    assert unused_by_classifier(cfg) == {f'norm{i}.{name}' for i in (1, 2) for name in ('weight', 'bias')}
    better = apply_hint(cfg)
    assert error_of(better) is None
    assert not unused_by_classifier(better)
    cfg.model.neck.type = 'LinearNeck'  # may use any output
    assert error_of(cfg) is None


def unused_by_classifier(cfg: Config) -> set[str]:
    """Parameters of the backbone that get no gradient from the loss."""
    with DefaultScope.overwrite_default_scope('mmpretrain'):
        model = MODELS.build(cfg.model)
    data = model.data_preprocessor(random_data(cfg, (3, 64, 64)), True)
    model(**data, mode='loss')['loss'].backward()
    return {name for name, p in model.backbone.named_parameters() if p.grad is None}


def test_check_unused_end_level_of_a_neck():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', end_level=2, num_outs=3))
    assert any(name.startswith('layers.3.') for name in without_gradient(cfg))
    assert error_of(cfg).startswith('nothing uses output 3')
    assert not without_gradient(apply_hint(cfg))
    assert error_of(apply_hint(cfg)) is None


def test_check_unused_several_necks():
    pytest.importorskip('mmdet')
    attention = dict(type='swinv2_mm.GlobalAttention', in_channels=CHANNELS[3], num_heads=8)
    cfg = detector({})
    cfg.model.neck = [attention, LEVELS | dict(type='FPN', start_level=2, num_outs=2)]
    assert 'model.neck.1.in_channels="[64,128]" model.neck.1.start_level=0, or' in error_of(cfg)
    assert apply_hint(cfg).model.neck[1].in_channels == [64, 128]
    assert error_of(apply_hint(cfg)) is None


def test_check_unused_global_attention():
    pytest.importorskip('mmdet')
    attention = dict(type='swinv2_mm.GlobalAttention', in_channels=CHANNELS[3], num_heads=8)
    cfg = detector({})
    cfg.model.neck = [attention, LEVELS | dict(type='FPN', end_level=2, num_outs=3)]
    assert error_of(cfg).endswith('get no gradient: --cfg-options find_unused_parameters=True')
    assert error_of(apply_hint(cfg)) is None


@pytest.mark.parametrize('wrong', [dict(start_level='1'), dict(in_channels=None), dict(end_level=-2)], ids=str)
def test_check_unused_leaves_invalid_necks_to_their_own_errors(wrong):
    pytest.importorskip('mmdet')
    assert error_of(detector(dict(type='FPN', num_outs=4) | wrong)) is None


def test_check_unused_advice_for_retinanet():
    mmdet = pytest.importorskip('mmdet.testing')
    path = Path(inspect.getfile(mmdet)).parents[1] / '.mim/configs/_base_/models/retinanet_r50_fpn.py'
    cfg = config('mmdet', **{k: v for k, v in Config.fromfile(path).model.items() if k != 'backbone'})
    cfg.model.neck.in_channels = CHANNELS
    cfg.model = narrow(apply_hint(cfg).model, 16)
    assert cfg.model.neck.in_channels == CHANNELS[1:]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model).train()
        data = mmdet.demo_mm_inputs(1, [[3, 64, 64]], num_classes=80)
        losses = model(**model.data_preprocessor(data, True), mode='loss')
    sum(sum(loss) if isinstance(loss, list) else loss for loss in losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---------------------------------------------------------------- accepted configs


@pytest.mark.parametrize(
    'options',
    [
        dict(launcher='none'),
        dict(find_unused_parameters=True),
        dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', find_unused_parameters=True)),
        dict(model_wrapper_cfg=dict(type='MMDistributedDataParallel', static_graph=True)),
        dict(model_wrapper_cfg=dict(type='swinv2_mm.FullyShardedModel')),
        dict(runner_type='swinv2_mm.FlexibleRunner'),
        dict(model=dict(backbone=dict(frozen_stages=1))),
        dict(model=dict(neck=dict(type='ChannelMapper'))),
        dict(model=dict(type='OwnDetector')),
    ],
)
def test_check_unused_accepts(options):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    assert error_of(cfg) is not None
    cfg.merge_from_dict(options)
    assert error_of(cfg) is None


def test_check_unused_option_of_zero1():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    cfg.model_wrapper_cfg = dict(type='swinv2_mm.ZeroDistributedDataParallel')
    assert error_of(cfg).endswith(', or model_wrapper_cfg.find_unused_parameters=True')


def test_check_unused_accepts_heads_with_other_inputs():
    pytest.importorskip('mmseg')
    kind = dict(type='DepthwiseSeparableASPPHead', c1_in_channels=16, c1_channels=8, in_index=3, in_channels=128)
    assert error_of(segmentor(dict(kind, channels=8, num_classes=3))) is None
    assert error_of(segmentor(fcn(3), dict(kind, channels=8, num_classes=3))) is None


# ---------------------------------------------------------------- DistributedDataParallel


class Detector(nn.Module):
    """Backbone and neck of a config."""

    def __init__(self, cfg: Config):
        super().__init__()
        self.backbone = MODELS.build(cfg.model.backbone)
        self.neck = MODELS.build(dict(cfg.model.neck, _scope_='mmdet'))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(out.mean() for out in self.neck(self.backbone(x)))


def two_steps(cfg: dict) -> None:
    model = MMDistributedDataParallel(Detector(Config(cfg)))
    for _ in range(2):
        model(torch.rand(1, 3, 64, 64)).backward()


@pytest.mark.slow
def test_check_unused_advice_on_two_processes(tmp_path):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    with pytest.raises(ProcessError) as error:
        run_processes(two_steps, cfg.to_dict(), folder=tmp_path)
    assert 'Expected to have finished reduction in the prior iteration' in error.value.log
    run_processes(two_steps, apply_hint(cfg).to_dict(), folder=tmp_path)

"""Parameters without a gradient: found before DistributedDataParallel stops at them, and gone with what is advised."""

import inspect
import shlex
from pathlib import Path

import pytest
import torch
from mmengine.config import Config, DictAction
from mmengine.model import MMDistributedDataParallel
from mmengine.registry import MODELS, DefaultScope
from nano import ARCH, CHANNELS
from nano.det import narrow
from processes import ProcessError, run_processes
from torch import nn

from swinv2_mm.cli.classes import check_classes
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
    """A head of mmsegmentation for one map or several."""
    if isinstance(in_index, list):
        more |= dict(input_transform='resize_concat', in_channels=[CHANNELS[i] for i in in_index])
    return dict(type='FCNHead', in_index=in_index, **HEAD | dict(in_channels=CHANNELS[3]) | more)


def segmentor(*heads: dict, **options) -> Config:
    first, *others = heads
    return config('mmseg', type='EncoderDecoder', decode_head=first, auxiliary_head=others, **options)


def complaint(cfg: Config) -> str | None:
    """What the check says of a config, in one line."""
    try:
        check_unused(cfg, check_classes(cfg))
    except ValueError as error:
        return str(error)
    return None


def advised(cfg: Config) -> Config:
    """The config with the first of the options that the check advises, as they are read from a command line."""
    options = complaint(cfg).partition('--cfg-options ')[2].partition(', or ')[0]
    cfg = cfg.copy()
    for option in shlex.split(options):
        name, _, value = option.partition('=')
        cfg.merge_from_dict({name: DictAction._parse_iterable(value)})
    return cfg


def without_gradient(cfg: Config) -> set[str]:
    """Parameters of the backbone to which no gradient comes from what the neck, or the heads, give."""
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
    """A detector of a user, which may use any map."""


# ---------------------------------------------------------------- what is unused, and what to write


@pytest.mark.parametrize('kind', ['FPN', 'PAFPN', 'FPN_DropBlock'])
@pytest.mark.parametrize('start', [0, 1, 2])
def test_levels_below_the_first_of_a_neck_get_no_gradient(kind, start):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type=kind, start_level=start, num_outs=4 - start))
    unused = without_gradient(cfg)
    assert unused == {f'norm{i}.{name}' for i in range(start) for name in ('weight', 'bias')}
    assert bool(unused) == (complaint(cfg) is not None)
    if unused:
        better = advised(cfg)
        assert not without_gradient(better)
        assert complaint(better) is None


def test_a_default_of_the_neck_counts():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='NASFCOS_FPN', num_outs=3))
    assert 'norm0.weight' in without_gradient(cfg)
    assert complaint(cfg) == (
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
def test_maps_that_no_head_reads_get_no_gradient(heads):
    pytest.importorskip('mmseg')
    cfg = segmentor(*heads)
    unused = without_gradient(cfg)
    assert bool(unused) == (complaint(cfg) is not None)
    if unused:
        better = advised(cfg)
        assert not without_gradient(better)
        assert complaint(better) is None


def test_stages_after_the_last_that_is_used_get_no_gradient():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', end_level=2, num_outs=3))
    assert any(name.startswith('layers.3.') for name in without_gradient(cfg))
    assert complaint(cfg).startswith('nothing uses output 3')
    assert not without_gradient(advised(cfg))
    assert complaint(advised(cfg)) is None


def test_several_necks_one_after_the_other():
    pytest.importorskip('mmdet')
    attention = dict(type='swinv2_mm.GlobalAttention', in_channels=CHANNELS[3], num_heads=8)
    cfg = detector({})
    cfg.model.neck = [attention, LEVELS | dict(type='FPN', start_level=2, num_outs=2)]
    assert 'model.neck.1.in_channels="[64,128]" model.neck.1.start_level=0, or' in complaint(cfg)
    assert advised(cfg).model.neck[1].in_channels == [64, 128]
    assert complaint(advised(cfg)) is None


def test_global_attention_on_a_map_that_nothing_uses_cannot_be_cut_off():
    pytest.importorskip('mmdet')
    attention = dict(type='swinv2_mm.GlobalAttention', in_channels=CHANNELS[3], num_heads=8)
    cfg = detector({})
    cfg.model.neck = [attention, LEVELS | dict(type='FPN', end_level=2, num_outs=3)]
    assert complaint(cfg).endswith('get no gradient: --cfg-options find_unused_parameters=True')
    assert complaint(advised(cfg)) is None


@pytest.mark.parametrize('wrong', [dict(start_level='1'), dict(in_channels=None), dict(end_level=-2)], ids=str)
def test_quiet_about_a_neck_that_will_say_itself_what_is_wrong(wrong):
    pytest.importorskip('mmdet')
    assert complaint(detector(dict(type='FPN', num_outs=4) | wrong)) is None


def test_the_stock_retinanet_trains_every_parameter_after_the_advice():
    mmdet = pytest.importorskip('mmdet.testing')
    path = Path(inspect.getfile(mmdet)).parents[1] / '.mim/configs/_base_/models/retinanet_r50_fpn.py'
    cfg = config('mmdet', **{k: v for k, v in Config.fromfile(path).model.items() if k != 'backbone'})
    cfg.model.neck.in_channels = CHANNELS
    cfg.model = narrow(advised(cfg).model, 16)
    assert cfg.model.neck.in_channels == CHANNELS[1:]
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(cfg.model).train()
        data = mmdet.demo_mm_inputs(1, [[3, 64, 64]], num_classes=80)
        losses = model(**model.data_preprocessor(data, True), mode='loss')
    sum(sum(loss) if isinstance(loss, list) else loss for loss in losses.values()).backward()
    assert [name for name, p in model.named_parameters() if p.grad is None] == []


# ---------------------------------------------------------------- what is fine, or not known


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
def test_quiet_where_nothing_stops_or_nothing_is_known(options):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    assert complaint(cfg) is not None
    cfg.merge_from_dict(options)
    assert complaint(cfg) is None


def test_zero1_is_told_where_its_option_is():
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    cfg.model_wrapper_cfg = dict(type='swinv2_mm.ZeroDistributedDataParallel')
    assert complaint(cfg).endswith(', or model_wrapper_cfg.find_unused_parameters=True')


def test_heads_that_read_other_maps_too_are_left_alone():
    pytest.importorskip('mmseg')
    kind = dict(type='DepthwiseSeparableASPPHead', c1_in_channels=16, c1_channels=8, in_index=3, in_channels=128)
    assert complaint(segmentor(dict(kind, channels=8, num_classes=3))) is None
    assert complaint(segmentor(fcn(3), dict(kind, channels=8, num_classes=3))) is None


# ---------------------------------------------------------------- DistributedDataParallel itself


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
def test_two_processes_stop_without_the_advice_and_train_with_it(tmp_path):
    pytest.importorskip('mmdet')
    cfg = detector(dict(type='FPN', start_level=1))
    with pytest.raises(ProcessError) as error:
        run_processes(two_steps, cfg.to_dict(), folder=tmp_path)
    assert 'Expected to have finished reduction in the prior iteration' in error.value.log
    run_processes(two_steps, advised(cfg).to_dict(), folder=tmp_path)

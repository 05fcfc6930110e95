"""All roads that lead from a file to a backbone, with an official file and with a checkpoint of our own training.

The files are pre-trained with other windows than the backbone has, and the config does not say with which ones: a road
that does not pass through the conversion loads nothing, or computes another position bias.
"""

import contextlib
import copy
import functools
import http.server
import itertools
import math
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner, load_checkpoint
from oracles import randomize
from processes import run_processes
from tool_runs import call
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from swinv2_mm.checkpoints import load_swinv2_state_dict
from swinv2_mm.cli import launch
from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.models.block import SwinBlock

TINY = Path(__file__).parents[1] / 'helpers' / 'tiny'
ARCH = dict(embed_dims=16, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8))
PRETRAINED = (6, 6, 6, 3)
WINDOW = 8
ALL_STAGES = dict(arch=ARCH, window_size=WINDOW, out_indices=(0, 1, 2, 3), drop_path_rate=0.0)
COUNT = itertools.count()


# ---------------------------------------------------------------- files


def coords_table(window: int, pretrained: int) -> Tensor:
    """The `relative_coords_table` of the official code: (1, 2 * window - 1, 2 * window - 1, 2)."""
    offsets = torch.arange(-(window - 1), window, dtype=torch.float32) / (pretrained - 1) * 8
    table = torch.stack(torch.meshgrid(offsets, offsets, indexing='ij'), -1)
    return (table.sign() * (table.abs() + 1).log2() / math.log2(8))[None]


def source_backbone(**options) -> SwinTransformerV2:
    """Random weights with the windows of PRETRAINED, said to the constructor; output norms as new but for the last."""
    torch.manual_seed(0)
    backbone = SwinTransformerV2(**dict(ALL_STAGES, pretrained_window_sizes=PRETRAINED, **options)).eval()
    randomize(backbone)
    for stage in range(3):
        getattr(backbone, f'norm{stage}').reset_parameters()
    return backbone


def official_weights(backbone: nn.Module, windows: tuple[int, ...] = PRETRAINED) -> dict[str, Tensor]:
    """What a file of the official code holds under 'model', from a training with these windows."""
    weights = {}
    for name, value in backbone.state_dict().items():
        if name.startswith('norm3.'):
            weights[name.replace('norm3', 'norm')] = value
        elif not name.startswith('norm') and not name.endswith('pretrained_window_size'):
            weights[name] = value
        if name.endswith('attn.logit_scale'):
            stage, block = int(name.split('.')[1]), int(name.split('.')[3])
            window, prefix = windows[stage], name.removesuffix('attn.logit_scale')
            weights[f'{prefix}attn.relative_coords_table'] = coords_table(window, window)
            weights[f'{prefix}attn.relative_position_index'] = torch.zeros(window**2, window**2, dtype=torch.int64)
            if block % 2:
                weights[f'{prefix}attn_mask'] = torch.zeros(4, window**2, window**2)
    dim = 8 * ARCH['embed_dims']
    return weights | {'head.weight': torch.ones(10, dim), 'head.bias': torch.ones(10)}


def backbone_part(path) -> dict[str, Tensor]:
    """Weights of the backbone in a checkpoint of mmengine, read with torch alone."""
    weights = torch.load(path, weights_only=True)['state_dict']
    return {key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')}


def folder_with_shapes(folder: Path, shapes: Path) -> Path:
    """A folder for `detector_config`."""
    (folder / 'shapes').symlink_to(shapes)
    return folder


# ---------------------------------------------------------------- roads: (file, folder, options) -> backbone


class Stop(Exception):
    """Weights are loaded, training is about to begin."""


class StopHook(Hook):
    def before_train(self, runner):
        raise Stop


def detector_config(folder: Path, **backbone) -> Config:
    """The tiny detector with features of all stages; `folder` holds shapes/ and takes what is written."""
    cfg = launch.load_config(str(TINY / 'det.py'), dict(data_root=str(folder / 'shapes')))
    cfg.model.backbone.update(ALL_STAGES | backbone)
    cfg.model.neck.update(in_channels=[16, 32, 64, 128], start_level=1)
    cfg.train_dataloader.num_workers = 0
    cfg.train_dataloader.dataset.dataset.indices = 2  # one iteration
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    cfg.work_dir = str(folder / 'work')
    cfg.experiment_name = f'roads-{next(COUNT)}'  # mmengine keeps logs and scopes by this name
    cfg.log_level = 'ERROR'
    return cfg


def start_training(cfg: Config) -> Runner:
    """Do all that comes before the first iteration, but for the log of config and environment, which takes longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', '')
        patch.setattr(Runner, '_log_env', lambda *args: None)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(StopHook(), priority='LOWEST')
        with pytest.raises(Stop):
            runner.train()
    return runner


def train_once(folder: Path, load_from: Path | None = None) -> Path:
    """Train the tiny detector for one iteration; returns its checkpoint."""
    cfg = detector_config(folder)
    cfg.load_from = load_from and str(load_from)
    Runner.from_cfg(cfg).train()
    return folder / 'work' / 'epoch_1.pth'


def load_strictly_but_for_new_norms(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """`load_state_dict` of torch, which calls the output norms that no official file has missing."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    assert unexpected == []
    assert [name for name in missing if not name.startswith(('norm0.', 'norm1.', 'norm2.'))] == []


def by_load_state_dict_of_the_dict(path, folder, **options):
    backbone = SwinTransformerV2(**ALL_STAGES | options)
    load_strictly_but_for_new_norms(backbone, load_swinv2_state_dict(path))
    return backbone


def by_load_checkpoint(path, folder, **options):
    backbone = SwinTransformerV2(**ALL_STAGES | options)
    load_checkpoint(backbone, str(path))
    return backbone


def by_http(path, folder, **options):
    with serve(path.parent) as address, pytest.MonkeyPatch.context() as patch:
        patch.setenv('TORCH_HOME', str(folder / 'downloads'))
        return by_load_checkpoint(f'{address}/{path.name}', folder, **options)


@contextlib.contextmanager
def serve(folder: Path) -> Iterator[str]:
    """The files of a folder under an address of this machine."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def by_init_cfg(path, folder, **options):
    backbone = SwinTransformerV2(**ALL_STAGES | options, init_cfg=dict(type='Pretrained', checkpoint=str(path)))
    backbone.init_weights()
    return backbone


def by_init_cfg_with_prefix(path, folder, **options):
    init_cfg = dict(type='Pretrained', checkpoint=str(path), prefix='backbone.')
    backbone = SwinTransformerV2(**ALL_STAGES | options, init_cfg=init_cfg)
    backbone.init_weights()
    return backbone


def by_init_cfg_in_a_runner(path, folder, **options):
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    return start_training(detector_config(folder, **options, init_cfg=init_cfg)).model.backbone


def by_load_from(path, folder, **options):
    cfg = detector_config(folder, **options)
    cfg.load_from = str(path)
    return start_training(cfg).model.backbone


def by_resume(path, folder, **options):
    cfg = detector_config(folder, **options)
    cfg.update(load_from=str(path), resume=True)
    return start_training(cfg).model.backbone


def by_init_detector(path, folder, **options):
    from mmdet.apis import init_detector

    return init_detector(detector_config(folder, **options), str(path), device='cpu').backbone


def by_init_model(path, folder, **options):
    from mmseg.apis import init_model

    cfg = Config.fromfile(TINY / 'seg.py')
    cfg.model.backbone.update(ALL_STAGES | options)
    return init_model(cfg, str(path), device='cpu').backbone


def by_init_recognizer(path, folder, **options):
    from mmaction.apis import init_recognizer

    cfg = Config.fromfile(TINY / 'video.py')
    cfg.model.backbone = dict(ALL_STAGES | options, type='swinv2_mm.SwinTransformerV2')
    cfg.model.cls_head.in_channels = 128
    return init_recognizer(cfg, str(path), device='cpu').backbone


def by_converter(path, folder, **options):
    written = folder / 'written.pth'
    call(folder, 'model_converters/swinv2_to_mm.py', path, written)
    return by_load_checkpoint(written, folder, **options)


ROADS = {road.__name__.removeprefix('by_'): road for road in (
    by_load_state_dict_of_the_dict,
    by_load_checkpoint,
    by_http,
    by_init_cfg,
    by_init_cfg_with_prefix,
    by_init_cfg_in_a_runner,
    by_load_from,
    by_init_detector,
    by_init_model,
    by_init_recognizer,
    by_converter,
)}  # fmt: skip


# ---------------------------------------------------------------- what must arrive


def twin(weights: dict[str, Tensor], pretrained=PRETRAINED, **options) -> SwinTransformerV2:
    """A backbone that is told the windows, and gets the weights without any loading code."""
    backbone = SwinTransformerV2(**dict(ALL_STAGES, pretrained_window_sizes=pretrained) | options).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(weights[name])
    return backbone


def features(backbone: nn.Module) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return list(backbone.eval()(torch.randn(1, 3, 64, 64, generator=generator)))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))


def assert_arrived(backbone: nn.Module, expected: SwinTransformerV2) -> None:
    """Weights, windows and features are those of `expected`, bit for bit."""
    state, wanted = backbone.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    assert same(features(backbone), features(expected))


# ---------------------------------------------------------------- tests


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes):
    return folder_with_shapes(tmp_path_factory.mktemp('roads'), shapes)


@pytest.fixture(scope='module')
def official(folder):
    torch.save({'model': official_weights(source_backbone()), 'epoch': 3}, folder / 'official.pth')
    return folder / 'official.pth'


@pytest.fixture(scope='module')
def trained(folder, official):
    return train_once(folder, official)


def test_the_window_of_pretraining_matters():
    """The tests below can fail: without it, all features but the patches' own differ."""
    weights = source_backbone().state_dict()
    right, wrong = (features(twin(weights, pretrained)) for pretrained in (PRETRAINED, None))
    assert not any(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize('road', ROADS)
def test_an_official_file_arrives(road, official, folder):
    assert_arrived(ROADS[road](official, folder), source_backbone())


# a whole detector, its backbone in three ways, and all that a training stores
OWN_ROADS = ('init_detector', 'load_state_dict_of_the_dict', 'load_checkpoint', 'init_cfg_with_prefix', 'resume')


@pytest.mark.parametrize('road', OWN_ROADS)
def test_our_own_checkpoint_arrives_with_the_window_of_its_first_training(road, trained, folder):
    """Pre-trained at 6, trained at 8, now used at 12: the bias is still that of 6."""
    backbone = (ROADS | dict(resume=by_resume))[road](trained, folder, window_size=12)
    weights = backbone_part(trained)
    assert not torch.equal(weights['patch_embed.proj.weight'], source_backbone().patch_embed.proj.weight)
    assert_arrived(backbone, twin(weights, window_size=12))


def test_the_backbone_takes_the_dict_of_an_official_file():
    backbone = SwinTransformerV2(**ALL_STAGES)
    load_strictly_but_for_new_norms(backbone, official_weights(source_backbone()))
    assert_arrived(backbone, source_backbone())


@pytest.mark.parametrize(
    ('wrapper', 'prefix'),
    [
        ('model', 'module.'),
        ('model', 'backbone.'),
        ('state_dict', 'module.'),
        ('state_dict', 'module.backbone.'),
        (None, 'module.'),
        (None, 'backbone.'),
    ],
)
def test_prefixes_and_wrappers_do_not_matter(prefix, wrapper, folder, tmp_path):
    weights = {prefix + name: value for name, value in official_weights(source_backbone()).items()}
    torch.save({wrapper: weights, 'meta': {}} if wrapper else weights, tmp_path / 'a.pth')
    assert_arrived(by_load_checkpoint(tmp_path / 'a.pth', folder), source_backbone())
    assert_arrived(by_init_detector(tmp_path / 'a.pth', folder), source_backbone())


def test_a_copy_loads_on_its_own():
    """A hook that was bound to the first backbone would load into that one."""
    first = SwinTransformerV2(**ALL_STAGES)
    before = copy.deepcopy(first.state_dict())
    second = copy.deepcopy(first)
    load_strictly_but_for_new_norms(second, official_weights(source_backbone()))
    assert_arrived(second, source_backbone())
    assert all(torch.equal(first.state_dict()[name], value) for name, value in before.items())


def test_an_averaged_model_loads():
    averaged = ExponentialMovingAverage(SwinTransformerV2(**ALL_STAGES))
    weights = {f'module.{name}': value for name, value in official_weights(source_backbone()).items()}
    averaged.load_state_dict(weights, strict=False)
    assert_arrived(averaged.module, source_backbone())


def test_a_model_on_the_meta_device_takes_the_tensors_themselves():
    weights = official_weights(source_backbone())
    with torch.device('meta'):
        backbone = SwinTransformerV2(**dict(ALL_STAGES, out_indices=(3,)))
    backbone.load_state_dict(weights, assign=True)
    assert_arrived(backbone, twin(source_backbone().state_dict(), out_indices=(3,)))
    assert backbone.patch_embed.proj.weight.data_ptr() == weights['patch_embed.proj.weight'].data_ptr()


# ---------------------------------------------------------------- EMA


@pytest.mark.parametrize(
    ('road', 'options'),
    [('init_cfg', dict()), ('init_cfg', dict(begin_iter=1)), ('load_from', dict(update_buffers=True))],
    ids=str,
)
def test_the_averaged_copy_computes_with_the_window_of_pretraining(road, options, official, folder, tmp_path):
    """EMAHook copies the model before init_cfg is loaded, and never copies again."""
    cfg = detector_config(folder)
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook', **options)]
    if road == 'load_from':
        cfg.load_from = str(official)
    else:
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(official))
    runner = Runner.from_cfg(cfg)
    runner.train()
    averaged = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')).module.backbone
    weights = dict(averaged.named_parameters())
    assert same(features(averaged), features(twin(weights)))
    assert not same(features(averaged), features(twin(weights, None)))

    # the file holds the averaged weights where others would look for them, and both when it is resumed
    saved = tmp_path / 'epoch_1.pth'
    assert_arrived(by_load_checkpoint(saved, folder), averaged)
    cfg.update(load_from=str(saved), resume=True)
    cfg.model.backbone.pop('init_cfg', None)
    resumed = start_training(cfg)
    assert_arrived(resumed.model.backbone, runner.model.backbone)
    hook = next(hook for hook in resumed.hooks if hasattr(hook, 'ema_model'))
    assert_arrived(hook.ema_model.module.backbone, averaged)


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize('wrapper', ['model', 'state_dict'])
def test_resuming_from_weights_alone_says_to_use_load_from(wrapper, folder, tmp_path):
    weights = official_weights(source_backbone())
    if wrapper == 'state_dict':
        weights = {f'backbone.{name}': value for name, value in weights.items()}
    torch.save({wrapper: weights}, tmp_path / 'weights.pth')
    with pytest.raises(ValueError, match='load_from'):
        by_resume(tmp_path / 'weights.pth', folder)


# ---------------------------------------------------------------- FSDP

NEW = ('norm0.', 'norm1.', 'norm2.', 'backbone.norm0.', 'backbone.norm1.', 'backbone.norm2.', 'head.')


class Net(nn.Module):
    """A model around a backbone."""

    def __init__(self, backbone: nn.Module):
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(2, 2)


def load_in_shards(official: dict[str, Tensor], nested: bool, original: bool, net: bool) -> tuple[dict, list | None]:
    """Load an official file into a sharded model; returns what it holds and computes after that."""
    torch.manual_seed(0)
    model, weights = SwinTransformerV2(**ALL_STAGES), official
    if net:
        model, weights = Net(model), {f'backbone.{name}': value for name, value in official.items()}
    policy = ModuleWrapPolicy({SwinBlock}) if nested else None
    model = FSDP(model.eval(), auto_wrap_policy=policy, use_orig_params=original, device_id=torch.device('cpu'))
    with FSDP.state_dict_type(model, StateDictType.FULL_STATE_DICT):
        missing, unexpected = model.load_state_dict(weights, strict=False)
        assert not unexpected, unexpected
        assert all(name.startswith(NEW) for name in missing), missing
        state = model.state_dict()
    return state, None if net else features(model)


SHARDS = [  # nested, original, net
    (nested, original, net)
    for nested, original in ((True, True), (True, False), (False, True))
    for net in (False, True)
]


def load_in_shards_of_every_kind(folder: Path) -> None:
    """What each process does."""
    official = official_weights(source_backbone())
    outputs = [load_in_shards(official, *kind) for kind in SHARDS]
    if torch.distributed.get_rank() == 0:
        torch.save(outputs, folder / 'output.pt')


@pytest.mark.slow
def test_a_model_in_shards_loads(tmp_path):
    """FullyShardedDataParallel on two processes: with and without units inside, a backbone and a model around it."""
    run_processes(load_in_shards_of_every_kind, tmp_path, folder=tmp_path)
    source = source_backbone()
    wanted = source.state_dict()
    outputs = torch.load(tmp_path / 'output.pt')
    assert len(outputs) == len(SHARDS)
    for state, maps in outputs:
        state = {name.removeprefix('backbone.'): value for name, value in state.items() if not name.startswith('head')}
        assert state.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
        if maps is not None:
            torch.testing.assert_close(list(maps), features(source), rtol=1e-5, atol=1e-5)

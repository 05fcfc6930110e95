"""Every loading path from a file to a backbone, with an official file and with a checkpoint of our training.

The files are pre-trained with other windows than the backbone has, and the config does not have them: a loading path
without the conversion loads nothing, or computes another position bias.
"""

import copy
from pathlib import Path

import pytest
import torch
from loading_paths import (
    ALL_STAGES,
    LOADING_PATHS,
    PRETRAINED,
    by_init_detector,
    by_load_checkpoint,
    by_resume,
    detector_config,
    features,
    folder_with_shapes,
    load_strictly_but_for_new_norms,
    official_weights,
    same,
    source_backbone,
    start_training,
    train_once,
)
from mmengine.model import ExponentialMovingAverage
from mmengine.runner import Runner
from processes import run_processes
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import StateDictType
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.models.block import SwinBlock


def backbone_part(path) -> dict[str, Tensor]:
    """Weights of the backbone in a checkpoint of mmengine, read with torch only."""
    weights = torch.load(path, weights_only=True)['state_dict']
    return {key.removeprefix('backbone.'): value for key, value in weights.items() if key.startswith('backbone.')}


# ---------------------------------------------------------------- the expected backbone


def twin(weights: dict[str, Tensor], pretrained=PRETRAINED, **options) -> SwinTransformerV2:
    """A backbone with the windows in its config, and weights copied without loading code."""
    backbone = SwinTransformerV2(**dict(ALL_STAGES, pretrained_window_sizes=pretrained) | options).eval()
    with torch.no_grad():
        for name, parameter in backbone.named_parameters():
            parameter.copy_(weights[name])
    return backbone


def assert_arrived(backbone: nn.Module, expected: SwinTransformerV2) -> None:
    """Assert that weights, windows and features are bitwise those of `expected`."""
    state, wanted = backbone.state_dict(), expected.state_dict()
    assert state.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(state[name], wanted[name])] == []
    assert same(features(backbone), features(expected))


# ---------------------------------------------------------------- tests


@pytest.fixture(scope='module')
def folder(tmp_path_factory, shapes):
    return folder_with_shapes(tmp_path_factory.mktemp('loading_paths'), shapes)


@pytest.fixture(scope='module')
def official(folder):
    torch.save({'model': official_weights(source_backbone()), 'epoch': 3}, folder / 'official.pth')
    return folder / 'official.pth'


@pytest.fixture(scope='module')
def trained(folder, official):
    return train_once(folder, official)


def test_pretrained_window_changes_the_features():
    """The tests below can fail: without it, the features of all stages differ."""
    weights = source_backbone().state_dict()
    right, wrong = (features(twin(weights, pretrained)) for pretrained in (PRETRAINED, None))
    assert not any(torch.equal(a, b) for a, b in zip(right, wrong, strict=True))


@pytest.mark.parametrize('loading_path', LOADING_PATHS)
def test_official_file_on_every_loading_path(loading_path, official, folder):
    assert_arrived(LOADING_PATHS[loading_path](official, folder), source_backbone())


# a detector, its backbone in three ways, and a training state
OWN_LOADING_PATHS = (
    'init_detector',
    'load_state_dict_of_the_dict',
    'load_checkpoint',
    'init_cfg_with_prefix',
    'resume',
)


@pytest.mark.parametrize('loading_path', OWN_LOADING_PATHS)
def test_our_checkpoint_on_every_loading_path(loading_path, trained, folder):
    """Pre-trained with window 6, trained with 8, now used with 12: the bias is still that of 6."""
    backbone = (LOADING_PATHS | dict(resume=by_resume))[loading_path](trained, folder, window_size=12)
    weights = backbone_part(trained)
    assert not torch.equal(weights['patch_embed.proj.weight'], source_backbone().patch_embed.proj.weight)
    assert_arrived(backbone, twin(weights, window_size=12))


def test_load_state_dict_of_an_official_file():
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
def test_prefixes_and_wrappers(prefix, wrapper, folder, tmp_path):
    weights = {prefix + name: value for name, value in official_weights(source_backbone()).items()}
    torch.save({wrapper: weights, 'meta': {}} if wrapper else weights, tmp_path / 'a.pth')
    assert_arrived(by_load_checkpoint(tmp_path / 'a.pth', folder), source_backbone())
    assert_arrived(by_init_detector(tmp_path / 'a.pth', folder), source_backbone())


def test_deepcopy_loads_independently():
    """A load hook bound to the first backbone would load into that one."""
    first = SwinTransformerV2(**ALL_STAGES)
    before = copy.deepcopy(first.state_dict())
    second = copy.deepcopy(first)
    load_strictly_but_for_new_norms(second, official_weights(source_backbone()))
    assert_arrived(second, source_backbone())
    assert all(torch.equal(first.state_dict()[name], value) for name, value in before.items())


def test_averaged_model_loads():
    averaged = ExponentialMovingAverage(SwinTransformerV2(**ALL_STAGES))
    weights = {f'module.{name}': value for name, value in official_weights(source_backbone()).items()}
    averaged.load_state_dict(weights, strict=False)
    assert_arrived(averaged.module, source_backbone())


def test_load_state_dict_assign_on_the_meta_device():
    weights = official_weights(source_backbone())
    with torch.device('meta'):
        backbone = SwinTransformerV2(**dict(ALL_STAGES, out_indices=(3,)))
    backbone.load_state_dict(weights, assign=True)
    assert_arrived(backbone, twin(source_backbone().state_dict(), out_indices=(3,)))
    assert backbone.patch_embed.proj.weight.data_ptr() == weights['patch_embed.proj.weight'].data_ptr()


# ---------------------------------------------------------------- EMA


@pytest.mark.parametrize(
    ('loading_path', 'options'),
    [('init_cfg', dict()), ('init_cfg', dict(begin_iter=1)), ('load_from', dict(update_buffers=True))],
    ids=str,
)
def test_averaged_model_has_the_pretrained_window(loading_path, options, official, folder, tmp_path):
    """EMAHook copies the model before init_cfg is loaded, and never copies again."""
    cfg = detector_config(folder)
    cfg.work_dir = str(tmp_path)
    cfg.custom_hooks = [dict(type='EMAHook', **options)]
    if loading_path == 'load_from':
        cfg.load_from = str(official)
    else:
        cfg.model.backbone.init_cfg = dict(type='Pretrained', checkpoint=str(official))
    runner = Runner.from_cfg(cfg)
    runner.train()
    averaged = next(hook.ema_model for hook in runner.hooks if hasattr(hook, 'ema_model')).module.backbone
    weights = dict(averaged.named_parameters())
    assert same(features(averaged), features(twin(weights)))
    assert not same(features(averaged), features(twin(weights, None)))

    # other tools find the averaged weights in the file; resuming restores both
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
def test_resuming_from_weights_only_says_to_use_load_from(wrapper, folder, tmp_path):
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
    """Load an official file into a sharded model; returns its state and its features after that."""
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
    """Runs in each process."""
    official = official_weights(source_backbone())
    outputs = [load_in_shards(official, *kind) for kind in SHARDS]
    if torch.distributed.get_rank() == 0:
        torch.save(outputs, folder / 'output.pt')


@pytest.mark.slow
def test_sharded_model_loads(tmp_path):
    """FullyShardedDataParallel on two processes: with and without nested units, of a backbone and of a model."""
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

"""The bases that shard a training work with every config and set no key that a config sets."""

import functools
from pathlib import Path

import pytest
from mmengine.config import Config

import swinv2_mm  # noqa: F401  makes its names known to mmengine
from swinv2_mm.cli import classes, launch, unused
from swinv2_mm.registry import MODEL_WRAPPERS, RUNNERS, STRATEGIES

CONFIGS = Path(__file__).parents[2] / 'configs'
BASES = sorted((CONFIGS / '_base_/memory').glob('*.py'))
SHARDING_KEYS = {'runner_type', 'model_wrapper_cfg'}  # the configs of SwinV2-G inherit one of the bases


read = functools.cache(Config.fromfile)


@pytest.mark.parametrize('folder', ['cls', 'det', 'seg', 'ssl', 'video'])
def test_no_config_sets_the_keys_of_a_memory_base(folder):
    added = set().union(*(Config.fromfile(base).keys() for base in BASES))
    for path in (CONFIGS / folder).glob('*.py'):
        found = added & read(path).keys()
        assert found == (SHARDING_KEYS if 'swinv2_g' in path.stem else set()), path


@pytest.mark.parametrize('folder', ['cls', 'det', 'seg', 'ssl', 'video'])
def test_every_config_names_existing_classes_and_gives_every_parameter_a_gradient(folder):
    pytest.importorskip(dict(det='mmdet', seg='mmseg', video='mmaction').get(folder, 'mmpretrain'))
    for path in (CONFIGS / folder).glob('*.py'):
        cfg = read(path).copy()
        cfg.launcher = 'pytorch'
        unused.check_unused(cfg, classes.check_classes(cfg))


@pytest.mark.parametrize('base', BASES, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    'leaf',
    [
        'cls/swinv2_l_in22k_192.py',
        'det/htc_swinv2_l.py',
        'seg/upernet_swinv2_l.py',
        'video/swinv2_l_k400_224x224x32.py',
    ],
)
def test_a_memory_base_adds_only_its_keys_to_a_config(tmp_path, leaf, base):
    if base.stem.startswith('deepspeed'):
        pytest.importorskip('deepspeed')
    path = tmp_path / 'leaf.py'
    path.write_text(f'_base_ = {[str(CONFIGS / leaf), str(base)]}\n')
    cfg = Config.fromfile(path)
    plain = Config.fromfile(CONFIGS / leaf)
    assert {key: cfg[key] for key in plain} == dict(plain)
    assert RUNNERS.get(cfg.runner_type)
    launch.check_runner(cfg)
    if 'strategy' in cfg:
        assert STRATEGIES.get(cfg.strategy.type)
    else:
        assert MODEL_WRAPPERS.get(cfg.model_wrapper_cfg.type)

"""What saves memory by splitting a training goes with every config, and says nothing that a config says already."""

import functools
from pathlib import Path

import pytest
from mmengine.config import Config

import swinv2_mm  # noqa: F401  makes its names known to mmengine
from swinv2_mm.cli import classes, launch, unused
from swinv2_mm.registry import MODEL_WRAPPERS, RUNNERS, STRATEGIES

CONFIGS = Path(__file__).parents[2] / 'configs'
SAVERS = sorted((CONFIGS / '_base_/memory').glob('*.py'))
SPLIT = {'runner_type', 'model_wrapper_cfg'}  # of the configs of SwinV2-G, which have one of them


read = functools.cache(Config.fromfile)


@pytest.mark.parametrize('folder', ['det', 'seg', 'video'])
def test_no_config_has_the_keys_that_they_add(folder):
    added = set().union(*(Config.fromfile(saver).keys() for saver in SAVERS))
    for path in (CONFIGS / folder).glob('*.py'):
        found = added & read(path).keys()
        assert found == (SPLIT if 'swinv2_g' in path.stem else set()), path


@pytest.mark.parametrize('folder', ['det', 'seg', 'video'])
def test_every_config_names_its_classes_rightly_and_leaves_no_parameter_without_a_gradient(folder):
    pytest.importorskip(dict(det='mmdet', seg='mmseg', video='mmaction')[folder])
    for path in (CONFIGS / folder).glob('*.py'):
        cfg = read(path).copy()
        cfg.launcher = 'pytorch'
        unused.check_unused(cfg, classes.check_classes(cfg))


@pytest.mark.parametrize('saver', SAVERS, ids=lambda path: path.stem)
@pytest.mark.parametrize(
    'leaf', ['det/htc_swinv2_l.py', 'seg/upernet_swinv2_l.py', 'video/swinv2_l_k400_224x224x32.py']
)
def test_they_add_to_a_config_by_one_more_base(tmp_path, leaf, saver):
    if saver.stem.startswith('deepspeed'):
        pytest.importorskip('deepspeed')
    path = tmp_path / 'leaf.py'
    path.write_text(f'_base_ = {[str(CONFIGS / leaf), str(saver)]}\n')
    cfg = Config.fromfile(path)
    alone = Config.fromfile(CONFIGS / leaf)
    assert {key: cfg[key] for key in alone} == dict(alone)
    assert RUNNERS.get(cfg.runner_type)
    launch.check_runner(cfg)
    if 'strategy' in cfg:
        assert STRATEGIES.get(cfg.strategy.type)
    else:
        assert MODEL_WRAPPERS.get(cfg.model_wrapper_cfg.type)

"""Nano models, configs and data sets, which a CPU trains in a second.

`NANO_CONFIGS` has a small config of each task for the command line; `nano.det`, `nano.seg`, `nano.cls` and `nano.video`
shrink the recipes of this repository and write the data of both; `nano.starting_points` shrinks the toolboxes' recipes.
`nano.training` compares trainings of several processes.
"""

import argparse
import inspect
import re
import shlex
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.runner import Runner

from swinv2_mm.cli import launch

NANO_CONFIGS = Path(__file__).parent / 'configs'  # det.py, seg.py, cls.py, video.py
ARCH = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
CHANNELS = [16, 32, 64, 128]


def shrink_sizes(value, factor: int, key: str = ''):
    """A config value with the sizes of its transforms divided."""
    if isinstance(value, dict):
        return type(value)({k: shrink_sizes(v, factor, k) for k, v in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(shrink_sizes(item, factor, key) for item in value)
    return value // factor if key in ('scale', 'scales', 'crop_size', 'size') else value


def shrink_inputs(cfg: Config, factor: int) -> None:
    """Divide the sizes of images, load data without workers, and log every step."""
    cfg.model.data_preprocessor = shrink_sizes(cfg.model.data_preprocessor, factor)
    for split in ('train', 'val', 'test'):
        loader = cfg[f'{split}_dataloader']
        loader.update(num_workers=0, persistent_workers=False)
        loader.dataset.pipeline = shrink_sizes(loader.dataset.pipeline, factor)
    if 'tta_pipeline' in cfg:
        cfg.tta_pipeline = shrink_sizes(cfg.tta_pipeline, factor)
    cfg.default_hooks.logger.interval = 1


@dataclass(frozen=True)
class ConfigFolder:
    """A folder of configs, with the function that shrinks them."""

    path: Path
    shrink: Callable[[Config], Config]

    def read(self, name: str) -> Config:
        return Config.fromfile(self.path / f'{name}.py')

    def load(self, name: str | Path, data: Path, work_dir: Path) -> Config:
        """The config at a nano size, adapted to the CPU as the tools do it; `name` may be a path without `.py`."""
        cfg = launch.load_config(str(self.path / f'{name}.py'), dict(data_root=str(data)))
        launch.adapt_to_cpu(cfg)
        cfg.work_dir = str(work_dir)
        return self.shrink(cfg)


def train_a_step(cfg: Config) -> Runner:
    """Train one step and validate; assert that every parameter was updated and is finite."""
    runner = Runner.from_cfg(cfg)
    runner.train()
    trainable = [p for p in runner.model.parameters() if p.requires_grad]
    stepped = runner.optim_wrapper.optimizer.state
    assert all(p in stepped for p in trainable), 'some parameters got no gradient'
    assert all(p.isfinite().all() for p in trainable)
    return runner


def check_bfloat16(cfg: Config) -> None:
    """Assert that a training step under autocast has a finite loss and finite gradients of all parameters."""
    runner = Runner.from_cfg(cfg)
    batch = next(iter(runner.build_dataloader(runner.cfg.train_dataloader)))
    batch = runner.model.data_preprocessor(batch, True)
    with torch.autocast('cpu', dtype=torch.bfloat16):
        losses = runner.model(**batch, mode='loss')
    total, _ = runner.model.parse_losses(losses)
    total.backward()
    assert total.isfinite()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in runner.model.parameters())


# Numbers that change results but not which code runs; the tests of the recipes check their values.
NUMBERS = {
    *('window_size', 'pretrained_window_sizes', 'patch_size', 'drop_path_rate'),
    *('lr', 'weight_decay', 'max_norm', 'batch_size', 'base_batch_size', 'indices'),
    *('begin', 'end', 'T_max', 'interval', 'milestones'),
    *('scale', 'crop_size', 'size', 'clip_len', 'frame_interval'),
}
MEMORY_OPTIONS = {'with_cp', 'sequential_stages'}  # they do not change the output of the backbone


def closest(cfg: Config, trained: list[Config]) -> list[str]:
    """Entries in which a config differs from the most similar trained one, without `NUMBERS` and `MEMORY_OPTIONS`."""
    mine = runner_entries(cfg, NUMBERS | MEMORY_OPTIONS)
    others = [runner_entries(other, NUMBERS | MEMORY_OPTIONS) for other in trained]
    return min((sorted(key for key in mine | other if mine.get(key) != other.get(key)) for other in others), key=len)


def runner_entries(cfg: Config, without: Collection[str] = ()) -> dict:
    """The entries of a config that `Runner` reads, by their dotted names; keys of `without` are left out."""
    read = inspect.signature(Runner).parameters
    return dict(entry for key in cfg if key in read for entry in entries(cfg[key], key, without))


def entries(value, name: str, without: Collection[str]):
    """Dotted names and values inside a config value."""
    if not isinstance(value, (dict, list, tuple)):
        yield name, value
        return
    yield name, 'entries'
    for key, item in value.items() if isinstance(value, dict) else enumerate(value):
        if key not in without:
            yield from entries(item, f'{name}.{key}', without)


def trial_arguments(configs: Path) -> list[str]:
    """The command line options for a smaller backbone that the README of a folder of configs gives."""
    readme = (configs / 'README.md').read_text()
    return shlex.split(re.search(r'A smaller backbone for a trial: `(.*?)`', readme, re.DOTALL)[1])


def smaller_backbone(configs: Path) -> dict:
    """The same as `cfg_options`."""
    parser = argparse.ArgumentParser()
    parser.add_argument('--cfg-options', nargs='+', action=DictAction)
    return parser.parse_args(trial_arguments(configs)).cfg_options

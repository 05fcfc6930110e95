"""Every loading path from a checkpoint to a backbone, and the checkpoints: official ones and ours."""

import contextlib
import functools
import http.server
import itertools
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from layouts import coords_table
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner, load_checkpoint
from nano import NANO_CONFIGS
from oracles import randomize
from tool_runs import call
from torch import Tensor, nn

from swinv2_mm.checkpoints import load_swinv2_state_dict
from swinv2_mm.cli import launch
from swinv2_mm.models import SwinTransformerV2

ARCH = dict(embed_dims=16, depths=(2, 1, 2, 1), num_heads=(1, 2, 4, 8))
PRETRAINED = (6, 6, 6, 3)
WINDOW = 8
ALL_STAGES = dict(arch=ARCH, window_size=WINDOW, out_indices=(0, 1, 2, 3), drop_path_rate=0.0)
COUNT = itertools.count()


# ---------------------------------------------------------------- files


def source_backbone(**options) -> SwinTransformerV2:
    """A backbone with random weights and the windows of PRETRAINED; all output norms but the last are new."""
    torch.manual_seed(0)
    backbone = SwinTransformerV2(**dict(ALL_STAGES, pretrained_window_sizes=PRETRAINED, **options)).eval()
    randomize(backbone)
    for stage in range(3):
        getattr(backbone, f'norm{stage}').reset_parameters()
    return backbone


def official_weights(backbone: nn.Module, windows: tuple[int, ...] = PRETRAINED) -> dict[str, Tensor]:
    """The entry 'model' of a file of the official code, from a training with these windows."""
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


def folder_with_shapes(folder: Path, shapes: Path) -> Path:
    """A folder for `detector_config`."""
    (folder / 'shapes').symlink_to(shapes)
    return folder


# ---------------------------------------------------------------- loading paths: (file, folder, options) -> backbone


class Stop(Exception):
    """Raised between loading and training."""


class StopHook(Hook):
    """Raises `Stop` before the first iteration."""

    def before_train(self, runner):
        raise Stop


def detector_config(folder: Path, **backbone) -> Config:
    """The nano detector with features of all stages; `folder` has shapes/, and gets checkpoints and logs."""
    cfg = launch.load_config(str(NANO_CONFIGS / 'det.py'), dict(data_root=str(folder / 'shapes')))
    cfg.model.backbone.update(ALL_STAGES | backbone)
    cfg.model.neck.update(in_channels=[16, 32, 64, 128], start_level=1)
    cfg.train_dataloader.num_workers = 0
    cfg.train_dataloader.dataset.dataset.indices = 2  # one iteration
    cfg.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.optim_wrapper = dict(type='OptimWrapper', optimizer=dict(type='AdamW', lr=1e-3))
    cfg.work_dir = str(folder / 'work')
    cfg.experiment_name = f'loading-{next(COUNT)}'  # mmengine's key of logs and scopes
    cfg.log_level = 'ERROR'
    return cfg


def start_training(cfg: Config) -> Runner:
    """Run everything before the first iteration except the logs of config and environment, which are slow."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'pretty_text', '')
        patch.setattr(Runner, '_log_env', lambda *args: None)
        runner = Runner.from_cfg(cfg)
        runner.register_hook(StopHook(), priority='LOWEST')
        with pytest.raises(Stop):
            runner.train()
    return runner


def train_once(folder: Path, load_from: Path | None = None) -> Path:
    """Train the nano detector for one iteration; returns its checkpoint."""
    cfg = detector_config(folder)
    cfg.load_from = load_from and str(load_from)
    Runner.from_cfg(cfg).train()
    return folder / 'work' / 'epoch_1.pth'


def load_strictly_but_for_new_norms(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Torch's `load_state_dict`; only the output norms may be missing, which no official file has."""
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
    """Serve the files of a folder over HTTP; yields the address."""
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

    cfg = Config.fromfile(NANO_CONFIGS / 'seg.py')
    cfg.model.backbone.update(ALL_STAGES | options)
    return init_model(cfg, str(path), device='cpu').backbone


def by_init_recognizer(path, folder, **options):
    from mmaction.apis import init_recognizer

    cfg = Config.fromfile(NANO_CONFIGS / 'video.py')
    cfg.model.backbone = dict(ALL_STAGES | options, type='swinv2_mm.SwinTransformerV2')
    cfg.model.cls_head.in_channels = 128
    return init_recognizer(cfg, str(path), device='cpu').backbone


def by_converter(path, folder, **options):
    written = folder / 'written.pth'
    call(folder, 'model_converters/swinv2_to_mm.py', path, written)
    return by_load_checkpoint(written, folder, **options)


LOADING_PATHS = {load.__name__.removeprefix('by_'): load for load in (
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


# ---------------------------------------------------------------- comparing


def features(backbone: nn.Module) -> list[Tensor]:
    """Outputs of a backbone for a fixed image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        return list(backbone.eval()(torch.randn(1, 3, 64, 64, generator=generator)))


def same(left: list[Tensor], right: list[Tensor]) -> bool:
    """Whether all tensors are bitwise equal."""
    return all(torch.equal(a, b) for a, b in zip(left, right, strict=True))

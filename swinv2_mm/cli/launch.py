"""Shared by the command line tools: arguments, configs, process groups, and building the Runner."""

import argparse
import contextlib
import ctypes
import datetime
import importlib.util
import logging
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch.nn.parallel import DistributedDataParallel

from swinv2_mm.cli.checks import seen_from
from swinv2_mm.cli.classes import no_such_class
from swinv2_mm.cli.errors import one_line_errors, rank
from swinv2_mm.parallel.sharding import SHARDED_WRAPPERS, ShardedRunner
from swinv2_mm.registry import MODEL_WRAPPERS, RUNNERS

# extras of this package that install a toolbox
EXTRAS = {'mmdet': 'det', 'mmseg': 'seg', 'mmpretrain': 'cls', 'mmaction': 'video'}
PR_SET_PDEATHSIG = 1  # linux/prctl.h


# ---------------------------------------------------------------- command line and configs


def parse_args(parser: argparse.ArgumentParser, argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Add the arguments that training and testing share, and parse the command line or `argv`."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='change the config: key=value, with nested keys '
        'as in optim_wrapper.optimizer.lr=1e-4 and lists as in key="[a,b]"; data_root=DIR moves all data',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    # for dist_*.sh: run all checks for this number of processes, then exit
    parser.add_argument('--preflight', type=int, metavar='GPUS', help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(path: str, cfg_options: dict | None = None) -> Config:
    """Read a config and apply the user's options to it.

    The option `data_root` also changes data loaders and evaluators: a text config has already joined their paths with
    its own `data_root`, which is replaced there. Configs of mmpretrain get the defaults of its own scripts.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: It inherits from a toolbox that is not installed.
        ValueError: It is not valid Python, or an option does not fit it.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'config {path} does not exist{seen_from(path)}')
    try:
        cfg = Config.fromfile(path)
    except ImportError as error:  # ModuleNotFoundError, or one of `custom_imports`
        extra = next((extra for toolbox, extra in EXTRAS.items() if toolbox in str(error)), None)
        way_out = (
            f"pip install 'swinv2_mm[{extra}]'" if extra else 'modules of your own are found with PYTHONPATH=FOLDER'
        )
        reason = str(error).partition(', the current sys.path')[0]  # which mmengine lists in many lines
        raise ModuleNotFoundError(f'config {path} cannot be read: {reason}: {way_out}') from error
    except SyntaxError as error:
        raise ValueError(f'config {path} or one of its bases is not valid Python: {error}, {error.text!r}') from error
    scope = cfg.get('default_scope')
    if scope in EXTRAS and importlib.util.find_spec(scope) is None:
        raise ModuleNotFoundError(
            f"config {path} needs {scope}, which is not installed: pip install 'swinv2_mm[{EXTRAS[scope]}]'"
        )
    former_root = cfg.get('data_root')
    try:
        cfg.merge_from_dict(cfg_options or {})
    except (AssertionError, KeyError, TypeError) as error:
        raise ValueError(f'--cfg-options do not fit {path}: {error}') from error
    if 'data_root' in (cfg_options or {}) and isinstance(former_root, str):
        for key in [key for key in cfg if key.endswith(('_dataloader', '_evaluator'))]:
            cfg[key] = _move(cfg[key], former_root, cfg.data_root)
    if cfg.get('default_scope') == 'mmpretrain':
        _add_mmpretrain_defaults(cfg)
    return cfg


def _move(value, old: str, new: str):
    """Replace the folder `old` at the start of every string inside a config value."""
    if isinstance(value, dict):
        return type(value)({key: _move(item, old, new) for key, item in value.items()})
    if isinstance(value, (list, tuple)):
        return type(value)(_move(item, old, new) for item in value)
    if isinstance(value, str) and f'{value}/'.startswith(f'{old.rstrip("/")}/'):
        return new.rstrip('/') + value[len(old.rstrip('/')) :]
    return value


def _add_mmpretrain_defaults(cfg: Config) -> None:
    """Add the defaults that mmpretrain's scripts give the data loaders, and the Runner the model."""
    for split in ('train', 'val', 'test'):
        loader = cfg.get(f'{split}_dataloader')
        if isinstance(loader, dict):
            loader.setdefault('collate_fn', dict(type='default_collate'))
            loader.setdefault('pin_memory', torch.cuda.is_available())  # torch warns about it without a GPU
            loader.setdefault('persistent_workers', loader.get('num_workers', 0) > 0)
    if 'data_preprocessor' in cfg and isinstance(cfg.get('model'), dict):
        cfg.model.setdefault('data_preprocessor', cfg.data_preprocessor)


def default_work_dir(cfg: Config, config_path: str, work_dir: str | None) -> str:
    """The work folder: `work_dir`, or that of the config, or `./work_dirs/<name of the config>`."""
    return work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(config_path).stem)


# ---------------------------------------------------------------- devices and processes


@contextlib.contextmanager
def process_group() -> Iterator[None]:
    """Destroy the process group that was initialised inside, before Python exits and PyTorch's threads still run.

    After an error it is not destroyed, because other processes may wait for this one: the launcher then ends them all.
    """
    is_ours = not torch.distributed.is_initialized()
    yield
    if is_ours and torch.distributed.is_initialized():
        torch.distributed.barrier()  # no process may leave while another one still sends to it
        torch.distributed.destroy_process_group()


def build_runner(cfg: Config):
    """Set up this process for its device and launcher, and build the Runner, or the class that `runner_type` names.

    Errors of `check_runner` are reported in one line.

    Raises:
        ValueError: See `init_cpu_processes`.
    """
    with one_line_errors(ImportError, ValueError):
        check_runner(cfg)
    die_with_launcher(cfg)
    adapt_to_cpu(cfg)
    init_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def check_runner(cfg: Config) -> None:
    """Check that the config's runner, model wrapper and optimizer exist and work together.

    Raises:
        ImportError: One of them needs a package that is not installed.
        ValueError: A class does not exist, or does not support this config.
    """
    runner_type = cfg.get('runner_type', 'Runner')
    wrapper_type = (cfg.get('model_wrapper_cfg') or {}).get('type', 'MMDistributedDataParallel')
    runner, wrapper = RUNNERS.get(runner_type), MODEL_WRAPPERS.get(wrapper_type)
    if runner is None:
        raise ValueError(no_such_class('runner_type', runner_type, [RUNNERS]))
    if wrapper is None:
        raise ValueError(no_such_class('model_wrapper_cfg.type', wrapper_type, [MODEL_WRAPPERS]))
    if wrapper in SHARDED_WRAPPERS and not issubclass(runner, ShardedRunner):
        raise ValueError(
            f'model_wrapper_cfg.type={wrapper_type} needs runner_type=swinv2_mm.ShardedRunner, but it is {runner_type}'
        )
    optimizer = (cfg.get('optim_wrapper') or {}).get('optimizer') or {}
    if optimizer.get('type') == 'ZeroRedundancyOptimizer':
        raise ValueError(
            'optim_wrapper.optimizer.type=ZeroRedundancyOptimizer: the Runner waits forever when it saves its state. '
            'Name the optimizer itself, and shard its state with configs/_base_/memory/zero1.py'
        )
    if hasattr(runner, 'check'):
        runner.check(cfg)


def adapt_to_cpu(cfg: Config) -> None:
    """Without a GPU, replace AmpOptimWrapper and SyncBN, which do not run on a CPU, and log a warning."""
    if get_device() != 'cpu':
        return
    replaced = []
    wrapper = cfg.get('optim_wrapper') or {}
    if str(wrapper.get('type')).split('.')[-1] == 'AmpOptimWrapper':
        cfg.optim_wrapper = {k: v for k, v in wrapper.items() if k not in ('dtype', 'loss_scale', 'use_fsdp')}
        cfg.optim_wrapper.type = 'OptimWrapper'
        replaced.append('training in fp32 (OptimWrapper) instead of mixed precision (AmpOptimWrapper)')
    if _replace_type(cfg.get('model'), 'SyncBN', 'BN'):
        replaced.append('statistics of each process (BN) instead of all (SyncBN)')
    if replaced and rank() == 0:
        print_log(f'No GPU: {"; ".join(replaced)}.', logger='current', level=logging.WARNING)


def _replace_type(value, old: str, new: str) -> bool:
    """Replace `type=old` at any depth; returns whether there was any."""
    if isinstance(value, (list, tuple)):
        return any([_replace_type(item, old, new) for item in value])
    if not isinstance(value, dict):
        return False
    found = value.get('type') == old
    if found:
        value['type'] = new
    return any([_replace_type(item, old, new) for item in value.values()]) or found


def init_cpu_processes(cfg: Config) -> None:
    """On a machine without a GPU, initialise the process group with gloo; mmengine itself would call CUDA.

    Does nothing without a launcher, nor on GPUs, where mmengine initialises NCCL.

    Raises:
        ValueError: MPI is the launcher and MASTER_ADDR is not set.
    """
    if cfg.launcher == 'none' or get_device() != 'cpu':
        return
    _export_ranks(cfg.launcher)
    # by default torchrun sets one thread for each process, which leaves cores idle
    if os.environ.get('OMP_NUM_THREADS', '1') == '1':
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    if not torch.distributed.is_initialized():
        timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
        torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=timeout))

    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    if issubclass(MODEL_WRAPPERS.get(wrapper.get('type', 'MMDistributedDataParallel')), DistributedDataParallel):
        wrapper = dict(wrapper, device_ids=None)
    if issubclass(RUNNERS.get(cfg.get('runner_type', 'Runner')), Runner):
        cfg.model_wrapper_cfg = wrapper
    elif cfg.get('strategy', {}).get('type', 'DDPStrategy') == 'DDPStrategy':
        cfg.strategy = dict(cfg.get('strategy', {}), type='DDPStrategy', model_wrapper=wrapper)


def die_with_launcher(cfg: Config) -> None:
    """Have this process and its data workers killed when torchrun is; otherwise they would go on in the background.

    A resumed training would then write to the same folder as the old one. Linux only.
    """
    if cfg.launcher == 'pytorch' and sys.platform == 'linux':
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _export_ranks(launcher: str) -> None:
    """Set the environment variables that torch reads from those of SLURM or Open MPI; torchrun sets them itself."""
    env = os.environ
    if launcher == 'slurm':
        env.update(RANK=env['SLURM_PROCID'], WORLD_SIZE=env['SLURM_NTASKS'], LOCAL_RANK=env.get('SLURM_LOCALID', '0'))
        if 'MASTER_ADDR' not in env:
            hosts = subprocess.check_output(['scontrol', 'show', 'hostnames', env['SLURM_NODELIST']], text=True)
            env['MASTER_ADDR'] = hosts.split()[0]
    elif launcher == 'mpi':
        if 'MASTER_ADDR' not in env:
            raise ValueError('the MPI launcher needs the address of the first machine: set MASTER_ADDR')
        env.update(
            {name: env[f'OMPI_COMM_WORLD_{name}'] for name in ('RANK', 'LOCAL_RANK')},
            WORLD_SIZE=env['OMPI_COMM_WORLD_SIZE'],
        )
    env.setdefault('MASTER_PORT', '29500')

"""What the command line tools share: reading a config, checking it before anything starts, and starting processes.

The checks look at what a newcomer gets wrong first (paths, numbers of GPUs, ports, sizes of the backbone), so that it
ends in one line at once and not in a traceback per process after the data have been loaded.
"""

import argparse
import contextlib
import copy
import ctypes
import datetime
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from mmengine.config import Config, DictAction
from mmengine.device import get_device
from mmengine.logging import print_log
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, find_latest_checkpoint

from swinv2_mm.checkpoints import releases
from swinv2_mm.registry import MODELS

PR_SET_PDEATHSIG = 1  # linux/prctl.h


@contextlib.contextmanager
def one_line_errors(*errors: type[Exception]) -> Iterator[None]:
    """Turn the given exceptions into `error: ...`, printed by the first process alone, and exit code 2."""
    try:
        yield
    except errors as error:
        if _rank() == 0:
            print(f'error: {error}', file=sys.stderr, flush=True)
        sys.exit(2)


def _rank() -> int:
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')
    return int(next((os.environ[name] for name in names if name in os.environ), 0))


# ---------------------------------------------------------------- command line and configs


def parse_args(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Read the command line, with the arguments that training and testing have in common."""
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        help='change the config: key=value, with nested keys '
        'as in optim_wrapper.optimizer.lr=1e-4 and lists as in key="[a,b]"; data_root=DIR moves all data',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none')
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    # for dist_*.sh: check everything for that many processes, then leave
    parser.add_argument('--preflight', type=int, metavar='GPUS', help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    return args


def load_config(path: str, cfg_options: dict | None = None) -> Config:
    """Read a config and apply the user's options to it.

    `data_root` among the options also moves the paths below the config's former `data_root` in data loaders and
    evaluators, which a text config has copied from it by then.

    Raises:
        FileNotFoundError: There is no such file.
        ModuleNotFoundError: It inherits from a toolbox that is not installed.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'config {path} does not exist{_seen_from(path)}')
    try:
        cfg = Config.fromfile(path)
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f'config {path} cannot be read: {error}. The extras of this package name the toolboxes: '
            'pip install swinv2_mm[det], [seg] or [video]'
        ) from error
    former_root = cfg.get('data_root')
    cfg.merge_from_dict(cfg_options or {})
    if 'data_root' in (cfg_options or {}) and isinstance(former_root, str):
        for key in [key for key in cfg if key.endswith(('_dataloader', '_evaluator'))]:
            cfg[key] = _move(cfg[key], former_root, cfg.data_root)
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


def default_work_dir(cfg: Config, config_path: str, work_dir: str | None) -> str:
    """Where results go: what the user says, else what the config says, else `./work_dirs/<name of the config>`."""
    return work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(config_path).stem)


# ---------------------------------------------------------------- checks


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check that the files and folders of the data sets exist.

    Looks at `ann_file` and `data_prefix` of every data set, inside wrappers too, joined with `data_root` as mmengine's
    BaseDataset joins them, and at the evaluators' `ann_file`. Paths with a protocol (s3://...) are left alone.

    Args:
        cfg: A config of mmdet, mmseg or mmaction.
        splits: Some of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: Something is missing; the message names the split, the option, the path and the way out.
    """
    for split in splits:
        for path, option, root_option in _data_paths(cfg, split):
            if '://' in path or os.path.exists(path):
                continue
            ways_out = [f'{root_option}=DIR' if root_option else f'{option}=PATH']
            if cfg.get('data_root') and path.startswith(cfg.data_root):
                ways_out.insert(0, 'data_root=DIR (which moves all data)')
            raise FileNotFoundError(
                f'{split} data: {path} does not exist{_seen_from(path)}; it is set by {option}. Put the '
                f'data there, or point the config to them: --cfg-options {" or ".join(ways_out)}'
            )


def _data_paths(cfg: Config, split: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each path of a split, the option that holds it, and the option of the root it is relative to, if any."""
    loader = cfg.get(f'{split}_dataloader') or {}
    for dataset, option in _leaf_datasets(loader.get('dataset'), f'{split}_dataloader.dataset'):
        if (dataset.get('backend_args') or {}).get('backend', 'local') != 'local':
            continue
        root = dataset.get('data_root') or ''
        prefix = dataset.get('data_prefix') or {}
        prefixes = prefix.items() if isinstance(prefix, dict) else [(None, prefix)]
        paths = [(f'{option}.ann_file', dataset.get('ann_file') or None)]
        paths += [(f'{option}.data_prefix.{key}' if key else f'{option}.data_prefix', path) for key, path in prefixes]
        for path_option, path in paths:
            if not isinstance(path, str) or not (root or path):
                continue
            relative = bool(root) and not os.path.isabs(path) and '://' not in path
            yield (
                os.path.join(root, path) if relative else path,
                path_option,
                f'{option}.data_root' if relative else None,
            )
    evaluator = cfg.get(f'{split}_evaluator') or []
    for i, metric in enumerate(evaluator if isinstance(evaluator, (list, tuple)) else [evaluator]):
        if isinstance(metric, dict) and isinstance(metric.get('ann_file'), str):
            name = f'{split}_evaluator.{i}' if isinstance(evaluator, (list, tuple)) else f'{split}_evaluator'
            yield metric['ann_file'], f'{name}.ann_file', None


def _leaf_datasets(dataset, option: str) -> Iterator[tuple[dict, str]]:
    """Walk through RepeatDataset, ConcatDataset and the like."""
    if not isinstance(dataset, dict):
        return
    inner = [(dataset['dataset'], f'{option}.dataset')] if 'dataset' in dataset else []
    inner += [(item, f'{option}.datasets.{i}') for i, item in enumerate(dataset.get('datasets', []))]
    if not inner:
        yield dataset, option
    for item, name in inner:
        yield from _leaf_datasets(item, name)


def check_backbone(cfg: Config) -> None:
    """Build a backbone of this package without memory, so that a wrong argument shows once and early.

    Raises:
        ValueError: What the backbone says about its arguments.
    """
    backbone = cfg.get('model', {}).get('backbone', {})
    if not str(backbone.get('type')).startswith('swinv2_mm.'):
        return
    arguments = {key: value for key, value in copy.deepcopy(backbone).items() if key not in ('type', '_scope_')}
    backbone_class = MODELS.get(backbone.type)
    if backbone_class is None:
        raise ValueError(f'model.backbone.type: there is no {backbone.type}')
    with torch.device('meta'):
        backbone_class(**arguments)


def check_checkpoint(path: str | None, option: str) -> None:
    """Check that a local checkpoint exists, or a release of that name.

    Raises:
        FileNotFoundError: No such file; the message names the option.
        ValueError: No such release.
    """
    if path and path.startswith(releases.SCHEME):
        releases.find(path)
    elif path and '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(f'{option}: checkpoint {path} does not exist{_seen_from(path)}')


def check_init_cfg(cfg: Config) -> None:
    """Check the checkpoint that the backbone starts from.

    Raises:
        FileNotFoundError: See `check_checkpoint`.
        ValueError: See `check_checkpoint`.
    """
    init_cfg = cfg.get('model', {}).get('backbone', {}).get('init_cfg')
    if isinstance(init_cfg, dict) and init_cfg.get('type') == 'Pretrained':
        check_checkpoint(init_cfg.get('checkpoint'), 'model.backbone.init_cfg.checkpoint')


def check_last_checkpoint(work_dir: str) -> None:
    """Check that the checkpoint which `--resume` would take is there; a folder without any starts from the beginning.

    Raises:
        FileNotFoundError: `last_checkpoint` names a file that is gone.
    """
    last = find_latest_checkpoint(work_dir) if os.path.exists(os.path.join(work_dir, 'last_checkpoint')) else None
    if last is not None and not os.path.exists(last):
        raise FileNotFoundError(
            f'{work_dir}/last_checkpoint names {last or "nothing"}, which does not exist; pass the '
            'checkpoint to go on from: --resume PATH'
        )


def check_gpus(processes: int) -> None:
    """Check that the machine has a GPU for each process; without any GPU, processes run on the CPU.

    Raises:
        ValueError: It has fewer.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f'{processes} GPUs asked for, but this machine has {torch.cuda.device_count()} '
            f'(CUDA_VISIBLE_DEVICES={os.environ.get("CUDA_VISIBLE_DEVICES", "not set")})'
        )


def check_port(port: int) -> None:
    """Check that the processes can meet at a port of this machine.

    Raises:
        ValueError: It is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: a port just left is free
        try:
            probe.bind(('', port))
        except OSError as error:
            raise ValueError(
                f'port {port} cannot be used ({error.strerror}): choose another one, such as '
                f'PORT={port + 1} before the command'
            ) from None


def check_processes(preflight: int | None) -> None:
    """Check GPUs, and for processes that are about to start (`preflight`, by dist_*.sh) the port as well.

    Raises:
        ValueError: Too few GPUs, or a port in use; only the first machine of several opens the port.
    """
    check_gpus(preflight or int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    if preflight and os.environ.get('NODE_RANK', '0') == '0':
        check_port(int(os.environ.get('PORT', 29500)))


def _seen_from(path: str) -> str:
    return '' if os.path.isabs(path) else f' (seen from {os.getcwd()})'


# ---------------------------------------------------------------- devices and processes


def build_runner(cfg: Config):
    """Tie this process to its launcher and to the other processes, and build the Runner, or what `runner_type` names.

    Raises:
        ValueError: See `init_cpu_processes`.
    """
    die_with_launcher(cfg)
    init_cpu_processes(cfg)
    return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def use_fp32_on_cpu(cfg: Config) -> None:
    """Replace AmpOptimWrapper, which refuses to run without a GPU, and say so once."""
    wrapper = cfg.get('optim_wrapper') or {}
    if get_device() != 'cpu' or str(wrapper.get('type')).split('.')[-1] != 'AmpOptimWrapper':
        return
    cfg.optim_wrapper = {k: v for k, v in wrapper.items() if k not in ('dtype', 'loss_scale', 'use_fsdp')}
    cfg.optim_wrapper.type = 'OptimWrapper'
    if _rank() == 0:
        print_log(
            'No GPU: training in fp32 (OptimWrapper) instead of mixed precision (AmpOptimWrapper).',
            logger='current',
            level=logging.WARNING,
        )


def init_cpu_processes(cfg: Config) -> None:
    """On a machine without a GPU, let the processes of a launcher meet through gloo; mmengine itself would call CUDA.

    Does nothing for a single process, and nothing on GPUs, where mmengine starts NCCL.

    Raises:
        ValueError: MPI is the launcher and MASTER_ADDR is not set.
    """
    if cfg.launcher == 'none' or get_device() != 'cpu':
        return
    _export_ranks(cfg.launcher)
    # torchrun allows one thread for each process unless told otherwise, which leaves cores idle
    if os.environ.get('OMP_NUM_THREADS', '1') == '1':
        cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
        torch.set_num_threads(max(1, cores // int(os.environ.get('LOCAL_WORLD_SIZE', 1))))
    timeout = cfg.get('env_cfg', {}).get('dist_cfg', {}).get('timeout', 1800)
    torch.distributed.init_process_group('gloo', timeout=datetime.timedelta(seconds=timeout))

    wrapper = cfg.get('model_wrapper_cfg') or dict(
        type='MMDistributedDataParallel',
        broadcast_buffers=False,
        find_unused_parameters=cfg.get('find_unused_parameters', False),
    )
    wrapper = dict(wrapper, device_ids=None)
    if 'runner_type' not in cfg:
        cfg.model_wrapper_cfg = wrapper
    elif cfg.get('strategy', {}).get('type', 'DDPStrategy') == 'DDPStrategy':
        cfg.strategy = dict(cfg.get('strategy', {}), type='DDPStrategy', model_wrapper=wrapper)


def die_with_launcher(cfg: Config) -> None:
    """Have this process and its data workers killed when torchrun is; they would train on, or wait for ever, unseen.

    A resumed training would then write into the same folder as the one believed dead. Linux only.
    """
    if cfg.launcher == 'pytorch' and sys.platform == 'linux':
        _die_with_parent()
        os.register_at_fork(after_in_child=_die_with_parent)


def _die_with_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _export_ranks(launcher: str) -> None:
    """Translate the variables of SLURM or Open MPI into those that torch reads; torchrun has set these already."""
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

"""Checks that the command line tools run before the launch: paths, metrics, checkpoints, GPUs and ports.

A wrong value is reported in one line, instead of a traceback per process after the data have been loaded. Classes and
their arguments are checked in `classes.py`.
"""

import copy
import os
import socket
from collections.abc import Iterable, Iterator

import torch
from mmengine.config import Config
from mmengine.registry import WEIGHT_INITIALIZERS
from mmengine.runner import find_latest_checkpoint

from swinv2_mm.arguments import did_you_mean
from swinv2_mm.checkpoints import loaders
from swinv2_mm.cli.folders import check_folders, check_same_classes, has_folders, with_paths_of_split
from swinv2_mm.registry import TRANSFORMS


def check_data(cfg: Config, splits: Iterable[str]) -> None:
    """Check that the files and folders of the data sets exist; of classifiers, also what `check_folders` checks.

    Looks at `ann_file` and `data_prefix` of every data set, inside wrappers too, joined with `data_root` as mmengine's
    BaseDataset joins them, and at the evaluators' `ann_file`. Paths with a protocol (s3://...) are not checked.

    Args:
        cfg: A config of one of the toolboxes.
        splits: Some of 'train', 'val' and 'test'.

    Raises:
        FileNotFoundError: A path does not exist; the message names the split, the path and the options that set it.
        ValueError: See `check_folders`.
    """
    classes = {}
    for split in splits:
        for path, option, root_option in _data_paths(cfg, split):
            if '://' in path or os.path.exists(path):
                continue
            ways_out = [f'{root_option}=DIR' if root_option else f'{option}=PATH']
            if cfg.get('data_root') and path.startswith(cfg.data_root):
                ways_out.insert(0, 'data_root=DIR (which moves all data)')
            raise FileNotFoundError(
                f'{split} data: {path} does not exist{seen_from(path)}; it is set by {option}. Put the '
                f'data there, or set their path: --cfg-options {" or ".join(ways_out)}'
            )
        for dataset, option in _split_datasets(cfg, split):
            if has_folders(cfg, dataset):
                found = check_folders(cfg, split, dataset, option)
                if found is not None:
                    check_same_classes(split, found, *classes.setdefault('first', (split, found)))


def _data_paths(cfg: Config, split: str) -> Iterator[tuple[str, str, str | None]]:
    """Yield each path of a split, its option, and the option of the root folder it is relative to, if any."""
    for dataset, option in _split_datasets(cfg, split):
        if has_folders(cfg, dataset):
            dataset = with_paths_of_split(dataset)
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
    for metric, option in _metrics(cfg, split):
        if isinstance(metric.get('ann_file'), str):
            yield metric['ann_file'], f'{option}.ann_file', None


def _metrics(cfg: Config, split: str) -> Iterator[tuple[dict, str]]:
    """Yield each metric of a split and its option."""
    evaluator = cfg.get(f'{split}_evaluator') or []
    several = isinstance(evaluator, (list, tuple))
    for i, metric in enumerate(evaluator if several else [evaluator]):
        if isinstance(metric, dict):
            yield metric, f'{split}_evaluator.{i}' if several else f'{split}_evaluator'


def _split_datasets(cfg: Config, split: str) -> Iterator[tuple[dict, str]]:
    """Yield the data sets of a split, each with its option; see `_leaf_datasets`."""
    loader = cfg.get(f'{split}_dataloader') or {}
    yield from _leaf_datasets(loader.get('dataset'), f'{split}_dataloader.dataset')


def _leaf_datasets(dataset, option: str) -> Iterator[tuple[dict, str]]:
    """Yield the data sets inside RepeatDataset, ConcatDataset and other wrappers, each with its option."""
    if not isinstance(dataset, dict):
        return
    inner = [(dataset['dataset'], f'{option}.dataset')] if 'dataset' in dataset else []
    inner += [(item, f'{option}.datasets.{i}') for i, item in enumerate(dataset.get('datasets', []))]
    if not inner:
        yield dataset, option
    for item, name in inner:
        yield from _leaf_datasets(item, name)


def check_transforms(cfg: Config, splits: Iterable[str]) -> None:
    """Build the data transforms of this package once, so that a missing requirement is reported before the launch.

    Raises:
        ImportError: A transform needs a package that is not installed.
        ValueError: A transform has a wrong argument.
    """
    for split in splits:
        for dataset, _ in _split_datasets(cfg, split):
            for transform in dataset.get('pipeline') or ():
                if str(transform.get('type')).startswith('swinv2_mm.'):
                    TRANSFORMS.build(copy.deepcopy(transform))


def check_metrics(cfg: Config, splits: Iterable[str]) -> None:
    """Check that mask AP is not computed for a two-stage detector without masks; mmdet fails only after the last image.

    Raises:
        ValueError: A metric needs masks; the message names the option.
    """
    model = cfg.get('model', {})
    if 'roi_head' not in model or has_masks(model):
        return
    for split in splits:
        for metric, option in _metrics(cfg, split):
            kinds = metric.get('metric') or ()
            if 'segm' in ([kinds] if isinstance(kinds, str) else kinds):
                raise ValueError(
                    f'{option}.metric={kinds} asks for masks, but without a mask_head the model predicts only boxes: '
                    f'--cfg-options {option}.metric=bbox'
                )


def check_num_classes(cfg: Config, splits: Iterable[str]) -> None:
    """Check that the parts of a classifier agree on the number of classes; mmpretrain fails later, or after an epoch.

    Raises:
        ValueError: They do not; the message names the options.
    """
    model = cfg.get('model') or {}
    classes = (model.get('head') or {}).get('num_classes')
    if cfg.get('default_scope') != 'mmpretrain' or classes is None:
        return
    mixed = (model.get('data_preprocessor') or {}).get('num_classes')
    if (model.get('train_cfg') or {}).get('augments') and mixed not in (None, classes):
        raise ValueError(
            f'model.data_preprocessor.num_classes={mixed}, for Mixup and CutMix, but model.head.num_classes={classes}: '
            'both must be the number of classes'
        )
    for split in splits:
        for metric, option in _metrics(cfg, split):
            topk = metric.get('topk', 1)
            if max([topk] if isinstance(topk, int) else topk) > classes:
                raise ValueError(f'{option}.topk={topk} of {classes} classes: --cfg-options {option}.topk=1')


def has_masks(model: dict) -> bool:
    """Whether a detector's config has a mask head, at any depth."""
    return any(
        key == 'mask_head' and bool(value) or isinstance(value, dict) and has_masks(value)
        for key, value in model.items()
    )


def check_checkpoint(path: str | None, option: str) -> None:
    """Check that a checkpoint exists: a local file, or the release that `swinv2://NAME` names.

    Raises:
        FileNotFoundError: No such file; the message names the option.
        ValueError: No such release.
    """
    if path and path.startswith(loaders.SCHEME):
        loaders.find_release(path)
    elif path and '://' not in path and not os.path.exists(path):
        raise FileNotFoundError(f'{option}: checkpoint {path} does not exist{seen_from(path)}')


def check_init_cfg(cfg: Config) -> None:
    """Check the backbone's `init_cfg`: its type, and its checkpoint if that is Pretrained.

    Raises:
        FileNotFoundError: See `check_checkpoint`.
        ValueError: See `check_checkpoint`; or the type is not registered, or `checkpoint` is missing.
    """
    found = ((cfg.get('model') or {}).get('backbone') or {}).get('init_cfg')
    for init_cfg in found if isinstance(found, list) else [found]:
        if not isinstance(init_cfg, dict):
            continue
        option, kind = 'model.backbone.init_cfg', init_cfg.get('type')
        if isinstance(kind, str) and kind not in WEIGHT_INITIALIZERS or kind is None:
            raise ValueError(
                f'{option}.type: there is no {kind}{did_you_mean(str(kind), WEIGHT_INITIALIZERS.module_dict)}; to load '
                'weights, set it to Pretrained'
            )
        if kind == 'Pretrained':
            path = init_cfg.get('checkpoint')
            if not path or not isinstance(path, str):
                raise ValueError(f'{option}.checkpoint must be a file, an address or swinv2://NAME, got {path!r}')
            check_checkpoint(path, f'{option}.checkpoint')


def check_last_checkpoint(work_dir: str) -> None:
    """Check that the checkpoint from which `--resume` continues exists; without `last_checkpoint` training starts anew.

    Raises:
        FileNotFoundError: `last_checkpoint` names a file that does not exist.
    """
    last = find_latest_checkpoint(work_dir) if os.path.exists(os.path.join(work_dir, 'last_checkpoint')) else None
    if last is not None and not os.path.exists(last):
        raise FileNotFoundError(
            f'{work_dir}/last_checkpoint names {last or "nothing"}, which does not exist; pass the '
            'checkpoint to resume from: --resume PATH'
        )


def check_gpus(processes: int) -> None:
    """Check that the machine has a GPU for each process; without any GPU, processes run on the CPU.

    Raises:
        ValueError: It has fewer GPUs than processes.
    """
    if torch.cuda.is_available() and processes > torch.cuda.device_count():
        raise ValueError(
            f'{processes} GPUs asked for, but this machine has {torch.cuda.device_count()} '
            f'(CUDA_VISIBLE_DEVICES={os.environ.get("CUDA_VISIBLE_DEVICES", "not set")})'
        )


def check_port(port: int) -> None:
    """Check that a port of this machine is free for the rendezvous of the processes.

    Raises:
        ValueError: It is in use, or cannot be bound.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as torch does: accepts a port in TIME_WAIT
        try:
            probe.bind(('', port))
        except OSError as error:
            raise ValueError(
                f'port {port} cannot be used ({error.strerror}): choose another one, such as '
                f'PORT={port + 1} before the command'
            ) from None


def check_processes(preflight: int | None) -> None:
    """Check the number of GPUs, and before dist_*.sh launches `preflight` processes, PORT as well.

    Raises:
        ValueError: Too few GPUs, or PORT is not a number or in use. Only the machine with NODE_RANK 0 binds the port.
    """
    check_gpus(preflight or int(os.environ.get('LOCAL_WORLD_SIZE', 1)))
    port = os.environ.get('PORT')  # if it is not set, dist_*.sh choose a free port
    if not (preflight and port):
        return
    if not (port.isdecimal() and 0 < int(port) < 2**16):
        raise ValueError(
            f'PORT must be a number from 1 to {2**16 - 1}, got {port!r}; if it is not set, a free port is used'
        )
    if os.environ.get('NODE_RANK', '0') == '0':
        check_port(int(port))


def seen_from(path: str) -> str:
    """For a message about a relative path: the current folder, to which it is relative."""
    return '' if os.path.isabs(path) else f' (relative to {os.getcwd()})'

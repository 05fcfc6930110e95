"""Hooks for interrupted training: checkpoints are written atomically, and resuming reproduces the same weights."""

import functools
import os
import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from mmengine.dist import barrier, is_main_process
from mmengine.fileio import LocalBackend
from mmengine.hooks import CheckpointHook, Hook
from torch.utils.data import get_worker_info

from swinv2_mm.arguments import check_arguments
from swinv2_mm.registry import HOOKS

UNFINISHED = '.unfinished'


@HOOKS.register_module()
@check_arguments()
class AtomicCheckpointHook(CheckpointHook):
    """mmengine's CheckpointHook with the same arguments, but crash-safe.

    A checkpoint is written under a temporary name and renamed when it is complete on disk. Only then is
    `last_checkpoint` updated, and outdated files are removed last. (The stock hook removes first and writes in place.)
    Unfinished files of a killed run are removed at the next start.

    This holds for checkpoints that are files in a local folder. Sharded checkpoints that are folders (DeepSpeed, FSDP
    with local state) are renamed too, but replacing one of the same epoch takes two renames, which are not atomic.
    Remote `out_dir`s are left to their file backend.

    Examples:
        >>> default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def before_train(self, runner) -> None:
        """Resolve `out_dir` as in mmengine, and remove unfinished files of an interrupted run."""
        super().before_train(runner)
        self._is_local = isinstance(self.file_backend, LocalBackend)
        self.file_backend = _DeferredRemovals(self.file_backend)
        if is_main_process():
            folders = {Path(runner.work_dir), Path(self.out_dir)} if self._is_local else {Path(runner.work_dir)}
            for leftover in [path for folder in folders for path in folder.glob(f'*{UNFINISHED}')]:
                runner.logger.info(f'Removing {leftover}, left unfinished by an interrupted run.')
                _remove(leftover)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        """Write the checkpoint, then `last_checkpoint`, and only then remove outdated checkpoints."""
        if self.max_keep_ckpts > 0 and step not in self.keep_ckpt_ids:
            if len(self.keep_ckpt_ids) == self.max_keep_ckpts:
                oldest = self.filename_tmpl.format(self.keep_ckpt_ids.popleft())
                self.file_backend.remove(self.file_backend.join_path(self.out_dir, oldest))
            self.keep_ckpt_ids.append(step)
            runner.message_hub.update_info('keep_ckpt_ids', list(self.keep_ckpt_ids))

        name = self.filename_tmpl.format(step)
        self.last_ckpt = self.file_backend.join_path(self.out_dir, name)
        runner.message_hub.update_info('last_ckpt', self.last_ckpt)
        self._atomic(runner).save_checkpoint(
            self.out_dir,
            name,
            self.file_client_args,
            save_optimizer=self.save_optimizer,
            save_param_scheduler=self.save_param_scheduler,
            meta=meta,
            by_epoch=self.by_epoch,
            backend_args=self.backend_args,
            **self.args,
        )
        if is_main_process():
            pointer = Path(runner.work_dir, 'last_checkpoint')
            _unfinished(pointer).write_text(self.last_ckpt)
            _finish(pointer)
        self._remove_outdated()

    def _save_best_checkpoint(self, runner, metrics: dict) -> None:
        """As in mmengine, but the previous best is removed only after `last_checkpoint` refers to the new one."""
        super()._save_best_checkpoint(self._atomic(runner), metrics)
        self._remove_outdated()

    def _atomic(self, runner):
        return _AtomicSaves(runner) if self._is_local and not isinstance(runner, _AtomicSaves) else runner

    def _remove_outdated(self) -> None:
        bests = {getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()}
        self.file_backend.remove_now(keep=bests | {self.last_ckpt})


class _AtomicSaves:
    """Proxy of a runner: `save_checkpoint` writes under a temporary name, and renames when all ranks have written."""

    def __init__(self, runner):
        self._runner = runner

    def __getattr__(self, name: str):
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        self._runner.save_checkpoint(out_dir, _unfinished(filename).name, *args, **kwargs)
        barrier()
        if is_main_process():
            _finish(Path(out_dir, filename))


class _DeferredRemovals:
    """Proxy of a file backend that collects removals until `remove_now`, when the replacements are on disk."""

    def __init__(self, backend):
        self._backend = backend
        self._outdated: set[str] = set()

    def __getattr__(self, name: str):
        return getattr(self._backend, name)

    def remove(self, path: str) -> None:
        self._outdated.add(path)

    rmtree = remove

    def remove_now(self, keep: set) -> None:
        outdated, self._outdated = self._outdated - keep, set()
        for path in outdated if is_main_process() else ():
            if self._backend.isfile(path):
                self._backend.remove(path)
            elif self._backend.isdir(path):  # sharded checkpoints are folders
                self._backend.rmtree(path)


def _unfinished(path: str | Path) -> Path:
    return Path(f'{path}{UNFINISHED}')


def _finish(path: Path) -> None:
    """Sync a complete file or folder to disk and rename it to its final name; for a file, the rename is atomic."""
    unfinished = _unfinished(path)
    for written in [*(unfinished.iterdir() if unfinished.is_dir() else ()), unfinished]:
        _sync(written)
    if path.is_dir():
        replaced = _unfinished(f'{path}.replaced')
        os.replace(path, replaced)
        os.replace(unfinished, path)
        _remove(replaced)
    else:
        os.replace(unfinished, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk. Folders are skipped on Windows, which cannot open them."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only writable descriptors
    except PermissionError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@HOOKS.register_module()
@check_arguments()
class ReproducibleResumeHook(Hook):
    """Make resumed training reach the same weights as uninterrupted training.

    mmengine restores weights, optimizer and schedules, but not the state of the random number generators, so that drop
    path, RoI sampling and augmentation differ after resuming. This hook reseeds all generators: with (seed, rank,
    epoch) at the start of an epoch and in its data loader workers, and with (seed, rank, iteration) before each
    iteration. The seed is that of the runner; when resuming, it is read from the checkpoint and need not be set. As a
    side effect, augmentation differs from epoch to epoch, while mmengine seeds the workers of all epochs alike.

    With the same config, number of processes and machine, the weights are bitwise equal if

    - the kernels are deterministic: on CPU, or on a GPU with `randomness=dict(deterministic=True)`;
    - with `EpochBasedTrainLoop`, checkpoints are saved at ends of epochs, `persistent_workers=False`, and no transform
      in the main process caches data of earlier epochs (as `CachedMosaic` does with `num_workers=0`);
    - with `IterBasedTrainLoop`, mmengine replays the data loader up to the iteration of the checkpoint, and there is no
      further condition;
    - no gradient accumulation spans the checkpoint (`accumulative_counts` divides its iteration).

    Examples:
        >>> custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Remember the seed of the samplers: they are built before the checkpoint, and its seed, is loaded."""
        self._sampler_seed = runner.seed

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuse to resume from a file with weights only; mmengine would fail later, on a missing entry.

        Raises:
            ValueError: The checkpoint has no training state.
        """
        if runner._resume and not {'epoch', 'iter'} <= checkpoint.get('meta', {}).keys():
            raise ValueError(
                f'{runner._load_from} cannot be resumed: it has weights, but no training state; to start from its '
                'weights, set load_from (or init_cfg of the backbone) instead of resume'
            )

    def before_train(self, runner) -> None:
        """Set up the seeding of the data loader.

        Raises:
            ValueError: The data loader has persistent workers; or training with `diff_rank_seed` is resumed without
                its seed.
        """
        loop = runner.train_loop
        iter_based = hasattr(loop, 'dataloader_iterator')
        if loop.dataloader.persistent_workers and not iter_based:
            raise ValueError(
                'ReproducibleResumeHook needs workers that are restarted in each epoch: set '
                'train_dataloader.persistent_workers=False (or remove the hook)'
            )
        if runner.seed != self._sampler_seed:
            self._rebuild_dataloader(runner)
        if not iter_based and runner.iter % len(loop.dataloader):
            runner.logger.warning(
                'Resuming from the middle of an epoch, which mmengine restarts: the weights will differ from those '
                'of uninterrupted training.'
            )
        loop.dataloader.worker_init_fn = functools.partial(_seed_worker, first=loop.dataloader.worker_init_fn)
        if iter_based:
            loop.dataloader_iterator = _SeededFetches(loop.dataloader_iterator, runner.seed, runner.rank)

    def before_train_epoch(self, runner) -> None:
        """Seed the sample order and augmentation of this epoch."""
        _seed_all(runner.seed, runner.rank, _EPOCH, runner.epoch)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed the random numbers of the model in this iteration."""
        _seed_all(runner.seed, runner.rank, _ITERATION, runner.iter)

    def _rebuild_dataloader(self, runner) -> None:
        """Rebuild the data loader with the seed of the checkpoint, which was read after the samplers were built."""
        loop = runner.train_loop
        if runner.cfg.get('randomness', {}).get('diff_rank_seed', False):
            raise ValueError(
                'to resume training with diff_rank_seed, set the seed of the first run: '
                f'randomness.seed={runner.seed - runner.rank}'
            )
        loop.dataloader = runner.build_dataloader(runner.cfg.train_dataloader, seed=runner.seed)
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)


_EPOCH, _ITERATION, _FETCH = range(3)  # part of the seed, so that the random streams differ


class _SeededFetches:
    """Iterator that reseeds before each batch, so that a replay without training in between gives the same batches."""

    def __init__(self, batches: Iterator, seed: int, rank: int):
        self._batches = batches
        self._entropy = (seed, rank, _FETCH)
        self._count = 0

    def __iter__(self):
        return self

    def __next__(self):
        _seed_all(*self._entropy, self._count)
        self._count += 1
        return next(self._batches)


def _seed_worker(worker_id: int, first=None) -> None:
    """Seed a worker with torch's worker seed, which is drawn in the main process and so depends on the epoch."""
    if first is not None:
        first(worker_id)
    _seed_all(get_worker_info().seed)


def _seed_all(*entropy: int) -> None:
    python, numpy, torch_ = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(torch_))

"""Hooks that make a training survive an interruption: no broken checkpoint, and the same weights after resuming."""

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
    """mmengine's CheckpointHook with the same arguments, safe against a kill at any moment.

    A checkpoint gets its name only when it is complete on the disk, `last_checkpoint` changes only after that, and
    older files are removed last. (The stock hook removes first and writes in place.) What a kill leaves unfinished is
    removed at the next start. Holds for checkpoints that are files in a local folder; sharded ones that are folders
    (DeepSpeed, FSDP with local state) get their name when complete too, but when validation writes the same epoch again
    there is a moment between two renames. Remote `out_dir`s are left to their backend.

    Examples:
        >>> default_hooks = dict(checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', interval=1, max_keep_ckpts=3))
    """

    def before_train(self, runner) -> None:
        """Find the folder as mmengine does, and clear it of what an interrupted run left unfinished."""
        super().before_train(runner)
        self._is_local = isinstance(self.file_backend, LocalBackend)
        self.file_backend = _LateRemovals(self.file_backend)
        if is_main_process():
            folders = {Path(runner.work_dir), Path(self.out_dir)} if self._is_local else {Path(runner.work_dir)}
            for leftover in [path for folder in folders for path in folder.glob(f'*{UNFINISHED}')]:
                runner.logger.info(f'Removing {leftover}, left by an interrupted run.')
                _remove(leftover)

    def _save_checkpoint_with_step(self, runner, step: int, meta: dict) -> None:
        """Write the checkpoint, then `last_checkpoint`, and only then remove what they replace."""
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
        """Let mmengine decide; its removal of the former best waits until `last_checkpoint` knows the new one."""
        super()._save_best_checkpoint(self._atomic(runner), metrics)
        self._remove_outdated()

    def _atomic(self, runner):
        return _AtomicSaves(runner) if self._is_local and not isinstance(runner, _AtomicSaves) else runner

    def _remove_outdated(self) -> None:
        bests = {getattr(self, 'best_ckpt_path', None), *getattr(self, 'best_ckpt_path_dict', {}).values()}
        self.file_backend.remove_now(keep=bests | {self.last_ckpt})


class _AtomicSaves:
    """A runner whose `save_checkpoint` writes under another name, and renames when every rank has written its part."""

    def __init__(self, runner):
        self._runner = runner

    def __getattr__(self, name: str):
        return getattr(self._runner, name)

    def save_checkpoint(self, out_dir: str, filename: str, *args, **kwargs) -> None:
        self._runner.save_checkpoint(out_dir, _unfinished(filename).name, *args, **kwargs)
        barrier()
        if is_main_process():
            _finish(Path(out_dir, filename))


class _LateRemovals:
    """A file backend that remembers what it shall remove, until it is told that the replacements are in place."""

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
    """Give a complete file or folder its name, a file in one step, and have it on the disk before returning."""
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
    """Have a file on the disk, or the entries of a folder, where the system can: Windows does not open folders."""
    is_folder = path.is_dir()
    try:
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR)  # Windows syncs only what may be written
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
    """Make a resumed training reach the same weights as one that was never interrupted.

    mmengine restores weights, optimizer and schedules, but not the state of the random generators, so that drop path,
    sampling of RoIs and augmentation differ after resuming. This hook makes every random state a pure function of the
    seed: of (seed, rank, epoch) at the start of an epoch and in its data loader workers, of (seed, rank, iteration)
    before each iteration. The seed is the runner's; a resumed runner takes it from the checkpoint, so that none has to
    be given. As a side effect, augmentation differs from epoch to epoch, where mmengine starts the workers of each
    epoch alike.

    With the same configuration, number of processes and machine, the weights are equal bit for bit if

    - the kernels are deterministic: CPU, or a GPU under `randomness=dict(deterministic=True)`;
    - with `EpochBasedTrainLoop`, checkpoints are those of ends of epochs, `persistent_workers=False`, and no transform
      in the main process remembers data of earlier epochs (`CachedMosaic` with `num_workers=0` does);
    - with `IterBasedTrainLoop`, nothing more: mmengine replays the data loader up to the iteration of the checkpoint;
    - gradients are not being accumulated across the checkpoint (`accumulative_counts` divides its iteration).

    Examples:
        >>> custom_hooks = [dict(type='swinv2_mm.ReproducibleResumeHook')]
    """

    priority = 'VERY_HIGH'

    def before_run(self, runner) -> None:
        """Remember with which seed the samplers were built: resuming comes later and may bring another."""
        self._sampler_seed = runner.seed

    def after_load_checkpoint(self, runner, checkpoint: dict) -> None:
        """Refuse to resume from weights alone, where mmengine would miss an entry later on.

        Raises:
            ValueError: The checkpoint is not that of a training.
        """
        if runner._resume and not {'epoch', 'iter'} <= checkpoint.get('meta', {}).keys():
            raise ValueError(
                f'{runner._load_from} cannot be resumed: it holds weights, but no state of a training; to start from '
                'its weights, set load_from (or init_cfg of the backbone) instead of resume'
            )

    def before_train(self, runner) -> None:
        """Take charge of the data loader.

        Raises:
            ValueError: The data loader's workers live on from epoch to epoch, or different seeds per rank are to be
                resumed without being given.
        """
        loop = runner.train_loop
        iter_based = hasattr(loop, 'dataloader_iterator')
        if loop.dataloader.persistent_workers and not iter_based:
            raise ValueError(
                'ReproducibleResumeHook needs workers that start anew in each epoch: set '
                'train_dataloader.persistent_workers=False (or remove the hook)'
            )
        if runner.seed != self._sampler_seed:
            self._rebuild_dataloader(runner)
        if not iter_based and runner.iter % len(loop.dataloader):
            runner.logger.warning(
                'Resuming from the middle of an epoch, which mmengine begins again: the weights will '
                'differ from those of an uninterrupted training.'
            )
        loop.dataloader.worker_init_fn = functools.partial(_seed_worker, first=loop.dataloader.worker_init_fn)
        if iter_based:
            loop.dataloader_iterator = _SeededFetches(loop.dataloader_iterator, runner.seed, runner.rank)

    def before_train_epoch(self, runner) -> None:
        """Seed what draws the order and the augmentation of this epoch."""
        _seed_all(runner.seed, runner.rank, _EPOCH, runner.epoch)

    def before_train_iter(self, runner, batch_idx: int, data_batch=None) -> None:
        """Seed what the model draws in this iteration."""
        _seed_all(runner.seed, runner.rank, _ITERATION, runner.iter)

    def _rebuild_dataloader(self, runner) -> None:
        """Build the data loader anew with the restored seed: its samplers took theirs before the file was read."""
        loop = runner.train_loop
        if runner.cfg.get('randomness', {}).get('diff_rank_seed', False):
            raise ValueError(
                'to resume a training with different seeds per rank, give the seed of the first run: '
                f'randomness.seed={runner.seed - runner.rank}'
            )
        loop.dataloader = runner.build_dataloader(runner.cfg.train_dataloader, seed=runner.seed)
        if hasattr(loop, 'dataloader_iterator'):
            loop.dataloader_iterator = type(loop.dataloader_iterator)(loop.dataloader)


_EPOCH, _ITERATION, _FETCH = range(3)  # keep the streams of random numbers apart


class _SeededFetches:
    """Iterator over batches that seeds before each one: replaying them gives the same without training between."""

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
    """Seed a worker by its epoch as well: torch draws `get_worker_info().seed` from the main process's generator."""
    if first is not None:
        first(worker_id)
    _seed_all(get_worker_info().seed)


def _seed_all(*entropy: int) -> None:
    python, numpy, torch_ = np.random.SeedSequence(entropy).generate_state(3)
    random.seed(int(python))
    np.random.seed(numpy)
    torch.manual_seed(int(torch_))

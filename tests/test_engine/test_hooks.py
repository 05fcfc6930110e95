"""Hooks in a real Runner, with a tiny model with dropout and random augmentation."""

import io
import os
import random
import shutil
import time

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import CheckpointHook, Hook
from mmengine.model import BaseModel
from mmengine.registry import DATASETS, HOOKS, METRICS, MODELS
from mmengine.runner import Runner
from torch.utils.data import Dataset

import swinv2_mm  # noqa: F401
from swinv2_mm.engine import AtomicCheckpointHook

STEPS_PER_EPOCH = 3


@DATASETS.register_module()
class NoisyData(Dataset):
    """Each item uses all three random number generators, like augmentation."""

    def __len__(self):
        return 2 * STEPS_PER_EPOCH

    def __getitem__(self, index):
        return dict(inputs=torch.rand(4) + random.random() + np.random.rand() + index)


@MODELS.register_module()
class Net(BaseModel):
    def __init__(self):
        super().__init__()
        self.layers = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 1))

    def forward(self, inputs, mode='tensor'):
        out = self.layers(torch.stack(inputs))
        return dict(loss=(out - random.random()).square().mean()) if mode == 'loss' else out


@METRICS.register_module()
class Score(BaseMetric):
    """Scores 1, 2, 1, 2, ...: the first two validations are a new best, the later ones are not."""

    values = (1.0, 2.0)

    def process(self, data_batch, data_samples):
        self.results.append(0)

    def compute_metrics(self, results):
        self.count = getattr(self, 'count', -1) + 1
        return dict(score=self.values[self.count % len(self.values)])


class Killed(Exception):
    """Simulates SIGKILL: the hooks catch no exception."""


@HOOKS.register_module()
class KillHook(Hook):
    def __init__(self, iteration):
        self.iteration = iteration

    def before_train_iter(self, runner, batch_idx, data_batch=None):
        if runner.iter == self.iteration:
            raise Killed


def make_runner(work_dir, by_epoch=True, workers=0, seed=None, total=4, sampler='DefaultSampler', **kwargs):
    cfg = dict(
        model=dict(type='Net'),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=dict(type='NoisyData'), batch_size=2, num_workers=workers, sampler=dict(type=sampler)
        ),
        train_cfg=dict(by_epoch=True, max_epochs=total) if by_epoch else dict(by_epoch=False, max_iters=total),
        randomness=dict(seed=seed),
        default_hooks=dict(
            checkpoint=dict(type='swinv2_mm.AtomicCheckpointHook', interval=1 if by_epoch else 2, by_epoch=by_epoch)
        ),
        custom_hooks=[dict(type='swinv2_mm.ReproducibleResumeHook')],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        param_scheduler=dict(type='CosineAnnealingLR', T_max=8),
        log_level='ERROR',
        experiment_name=f'{work_dir.name}-{time.time()}',
    )
    cfg.update(kwargs)
    return Runner.from_cfg(Config(cfg))


def train(runner):
    try:
        runner.train()
    finally:
        # if garbage collected later, an infinite iterator takes five seconds per worker
        vars(runner.train_loop).pop('dataloader_iterator', None)


def interrupt(work_dir, iteration, **kwargs):
    runner = make_runner(work_dir, **kwargs)
    runner.register_hook(KillHook(iteration))
    with pytest.raises(Killed):
        train(runner)


def assert_same_weights(left, right):
    left, right = (torch.load(path, weights_only=True)['state_dict'] for path in (left, right))
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


def test_atomic_checkpoint_where_folders_cannot_be_opened(tmp_path, monkeypatch):
    """As on Windows, which also cannot sync a file opened read-only."""
    open_, fsync, flags_of, synced = os.open, os.fsync, {}, []

    def refuse_folders(path, flags, *args, **kwargs):
        if os.path.isdir(path):
            raise PermissionError(13, 'Permission denied', str(path))
        descriptor = open_(path, flags, *args, **kwargs)
        flags_of[descriptor] = flags
        return descriptor

    def refuse_readers(descriptor):
        if not flags_of[descriptor] & os.O_RDWR:
            raise OSError(9, 'Bad file descriptor')
        synced.append(descriptor)
        fsync(descriptor)

    monkeypatch.setattr('swinv2_mm.engine.hooks.os.open', refuse_folders)
    monkeypatch.setattr('swinv2_mm.engine.hooks.os.fsync', refuse_readers)
    train(make_runner(tmp_path, total=2))
    assert (tmp_path / 'last_checkpoint').read_text().endswith('epoch_2.pth')
    assert torch.load(tmp_path / 'epoch_2.pth', weights_only=True)['meta']['epoch'] == 2
    assert len(synced) == 4  # two checkpoints, and last_checkpoint twice


@pytest.mark.parametrize(
    ('by_epoch', 'sampler', 'workers'),
    [
        (True, 'DefaultSampler', 0),
        (True, 'DefaultSampler', 2),
        (False, 'DefaultSampler', 2),  # crosses the end of the dataset before and after the interruption
        (False, 'InfiniteSampler', 0),
    ],
)
def test_reproducible_resume_equals_uninterrupted_training(tmp_path, monkeypatch, by_epoch, sampler, workers):
    """Four epochs or eight iterations, uninterrupted and resumed once; the seed is not given when resuming."""
    monkeypatch.setattr('mmengine.runner.loops.time.sleep', lambda seconds: None)
    kwargs = dict(by_epoch=by_epoch, workers=workers, sampler=sampler)
    total, name = (4, 'epoch_4.pth') if by_epoch else (8, 'iter_8.pth')
    train(make_runner(tmp_path / 'whole', seed=7, total=total, **kwargs))
    interrupt(tmp_path / 'parts', iteration=7, seed=7, total=total, **kwargs)
    train(make_runner(tmp_path / 'parts', total=total, resume=True, **kwargs))
    assert_same_weights(tmp_path / 'whole' / name, tmp_path / 'parts' / name)


def test_without_reproducible_resume_the_weights_differ(tmp_path):
    """Control of the test above: stock mmengine does not restore random states."""
    kwargs = dict(seed=7, custom_hooks=[])
    make_runner(tmp_path / 'whole', **kwargs).train()
    interrupt(tmp_path / 'parts', iteration=7, **kwargs)
    make_runner(tmp_path / 'parts', resume=True, **kwargs).train()
    with pytest.raises(AssertionError):
        assert_same_weights(tmp_path / 'whole/epoch_4.pth', tmp_path / 'parts/epoch_4.pth')


def test_reproducible_resume_augments_each_epoch_differently(tmp_path):
    seen = []

    class Spy(Net):
        def forward(self, inputs, mode='tensor'):
            seen.append(torch.stack(inputs).frac().sum().item())
            return super().forward(inputs, mode)

    runner = make_runner(tmp_path, seed=1, workers=1, total=2)
    runner.model = Spy()
    runner.train()
    assert not set(seen[:STEPS_PER_EPOCH]) & set(seen[STEPS_PER_EPOCH:])


def test_reproducible_resume_rejects_persistent_workers(tmp_path):
    runner = make_runner(tmp_path, workers=1)
    runner._train_dataloader['persistent_workers'] = True
    with pytest.raises(ValueError, match='train_dataloader.persistent_workers=False'):
        runner.train()


def test_reproducible_resume_with_diff_rank_seed_needs_the_seed(tmp_path):
    randomness = dict(seed=None, diff_rank_seed=True)
    make_runner(tmp_path, total=1, randomness=dict(randomness)).train()
    with pytest.raises(ValueError, match=r'randomness.seed=\d+'):
        make_runner(tmp_path, resume=True, randomness=dict(randomness)).train()


CHECKPOINT = dict(
    type='swinv2_mm.AtomicCheckpointHook', interval=1, max_keep_ckpts=1, save_best='score', rule='greater'
)
VALIDATION = dict(
    val_dataloader=dict(
        dataset=dict(type='NoisyData'), batch_size=2, sampler=dict(type='DefaultSampler', shuffle=False)
    ),
    val_cfg=dict(),
    val_evaluator=dict(type='Score'),
)


def assert_resumable(work_dir):
    """The file in `last_checkpoint`, and the best checkpoint that it refers to, can be loaded."""
    last = (work_dir / 'last_checkpoint').read_text()
    best = torch.load(last, weights_only=True)['message_hub']['runtime_info'].get('best_ckpt')
    for path in [last, best] if best else [last]:
        assert torch.load(path, weights_only=True)['state_dict']


def save_three_epochs(runner, hook):
    """The calls of mmengine's loop: a checkpoint per epoch, and a new best one after the first two validations."""
    hook.before_train(runner)
    for epoch, score in enumerate((1.0, 2.0, 1.0)):
        runner.train_loop._epoch = epoch
        hook.after_train_epoch(runner)
        runner.train_loop._epoch = epoch + 1
        hook.after_val_epoch(runner, dict(score=score))


def kill_at(operation, patch, work_dir):
    """Raise Killed at the n-th file operation after the first checkpoint; a file opened for writing stays empty."""
    count = 0

    def watched(function, changes=lambda *args: True):
        def run(*args, **kwargs):
            nonlocal count
            result = function(*args, **kwargs) if function is real_open else None
            if changes(*args) and (work_dir / 'last_checkpoint').exists():
                count += 1
                if count > operation:
                    raise Killed
            return function(*args, **kwargs) if function is not real_open else result

        return run

    real_open = open
    patch.setattr('builtins.open', watched(real_open, lambda path, mode='r', *args: 'w' in mode))
    patch.setattr(io, 'open', watched(real_open, lambda path, mode='r', *args: 'w' in mode))  # pathlib's
    for name in ('replace', 'remove', 'unlink'):
        patch.setattr(os, name, watched(getattr(os, name)))
    patch.setattr(os, 'fsync', watched(lambda descriptor: None))  # slow, and without an effect that a test could see


@pytest.mark.parametrize('hook_type', ['swinv2_mm.AtomicCheckpointHook', 'CheckpointHook'])
def test_atomic_checkpoint_survives_a_kill_at_any_file_operation(tmp_path, monkeypatch, hook_type):
    """Stop before the n-th file operation, for every n. As a control, mmengine's own hook fails."""
    work_dir = tmp_path / 'run'
    runner = make_runner(work_dir, default_hooks=dict(checkpoint=dict(CHECKPOINT, type=hook_type)))
    runner.train_loop  # noqa: B018  builds it
    runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    runner.param_schedulers = runner.build_param_scheduler(runner.param_schedulers)
    hook = next(hook for hook in runner.hooks if isinstance(hook, CheckpointHook))
    monkeypatch.setattr(Config, 'pretty_text', '')  # with the git hash, most of the time of a small checkpoint
    monkeypatch.setattr('mmengine.runner.runner.get_git_hash', lambda: '')
    broken = []
    for operation in range(1000):
        shutil.rmtree(work_dir)
        work_dir.mkdir()
        runner.message_hub.runtime_info.clear()
        with monkeypatch.context() as patch:
            kill_at(operation, patch, work_dir)
            try:
                save_three_epochs(runner, hook)
                break
            except Killed:
                pass
        try:
            assert_resumable(work_dir)
        except Exception:
            broken.append(operation)
    assert 5 < operation < 999
    assert bool(broken) == (hook_type == 'CheckpointHook')


def test_atomic_checkpoint_leaves_the_last_and_the_best_file(tmp_path):
    """The last and the best checkpoint (epoch 2) remain, unfinished files of a killed run are removed."""
    (tmp_path / 'epoch_9.pth.unfinished').write_bytes(b'half')
    make_runner(tmp_path, seed=1, total=3, default_hooks=dict(checkpoint=CHECKPOINT), **VALIDATION).train()
    files = {path.name for path in tmp_path.iterdir() if path.is_file() and path.suffix != '.py'}
    assert files == {'epoch_3.pth', 'best_score_epoch_2.pth', 'last_checkpoint'}
    assert (tmp_path / 'last_checkpoint').read_text() == str(tmp_path / 'epoch_3.pth')


def test_atomic_checkpoint_of_a_folder(tmp_path):
    """A runner that writes folders, like DeepSpeed's strategy; the second save of an epoch replaces the first."""
    runner = make_runner(tmp_path, seed=1, total=1)

    def save_folder(out_dir, filename, *args, **kwargs):
        folder = tmp_path / filename
        folder.mkdir()
        (folder / 'shard').write_text('1')

    runner.save_checkpoint = save_folder
    hook = next(hook for hook in runner.hooks if isinstance(hook, AtomicCheckpointHook))
    runner.train()
    hook._save_checkpoint_with_step(runner, 1, {})
    assert sorted(path.name for path in tmp_path.iterdir() if '.pth' in path.name) == ['epoch_1.pth']
    assert (tmp_path / 'epoch_1.pth' / 'shard').read_text() == '1'

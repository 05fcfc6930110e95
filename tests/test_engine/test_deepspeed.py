"""ZeRO of DeepSpeed trains as one process does on the joint batch, and its checkpoints load and resume.

Run by torchrun, this file does the trainings that need several processes, and leaves what it saw in the folder:
    python -m torch.distributed.run --nproc_per_node 2 tests/test_engine/test_deepspeed.py FOLDER DATA
"""

import copy
import functools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import mmengine.config.config
import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS, DefaultScope
from mmengine.runner import Runner

pytest.importorskip('mmdet')
pytest.importorskip('deepspeed')
if __name__ == '__main__':  # for the helpers; pytest has conftest.py
    sys.path.insert(0, str(Path(__file__).parents[1]))
import nano_training
from tool_runs import command, environment, free_port, metrics, run

from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.engine import deepspeed, launch

STAGES = (1, 2, 3)
FROZEN = (2, 3)  # stages that train with frozen parameters
PROCESSES = 2
STEPS, SAVED, FALL = 6, 4, 5  # of the optimizer; until the first checkpoint; until the learning rate falls
TINY = Path(__file__).parents[1] / 'test_tools/tiny/det.py'
CONFIGS = Path(__file__).parents[2] / 'configs'


def config(folder: Path, data: Path, stage: int, accumulate: int = 1, steps: int = STEPS) -> Config:
    """A nano HTC with layer-wise rates, which fall in the middle; stage 0 is plain training."""
    saver = f'deepspeed_zero{stage}' if stage else 'ddp'
    cfg = nano_training.config(folder, data, saver, accumulate, steps)
    cfg.param_scheduler = [dict(type='MultiStepLR', milestones=[FALL * accumulate], gamma=0.5, by_epoch=False)]
    cfg.default_hooks.checkpoint.interval = SAVED * accumulate
    cfg.launcher = 'pytorch' if stage else 'none'
    return cfg


# ---------------------------------------------------------------- what runs in several processes


@HOOKS.register_module()
class Trace(Hook):
    """Keeps the weights after each iteration."""

    def before_train(self, runner) -> None:
        self.weights = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.weights.append({name: p.detach().clone() for name, p in runner.model.module.named_parameters()})


def train(cfg: Config):
    launch.adapt_to_cpu(cfg)
    runner = RUNNERS.build(cfg)
    runner.train()
    return runner


def finish(runner) -> None:
    """Give up what DeepSpeed holds, before the next training."""
    runner.model.destroy()


def held(runner) -> dict[str, int]:
    """Bytes of this process's parameters, of the copies that its optimizer updates, and of its states."""
    optimizer = runner.optim_wrapper.optimizer
    copies = getattr(optimizer, 'single_partition_of_fp32_groups', None) or optimizer.fp32_partitioned_groups_flat
    states = [value for state in optimizer.optimizer.state.values() for value in state.values()]
    whole = list(runner.model.parameters())
    parts = [p.ds_tensor for p in whole if hasattr(p, 'ds_tensor')]
    return {
        name: sum(tensor.numel() * tensor.element_size() for tensor in tensors if torch.is_tensor(tensor))
        for name, tensors in dict(parameters=whole + parts, copies=copies, states=states).items()
    }


def predict(model, dataset, threshold: float = 0.0) -> torch.Tensor:
    """Boxes and scores of the first image; above a score of 1 there are none, and no mask head runs."""
    item = copy.deepcopy(dataset[0])
    item['data_samples'].set_metainfo(dict(scale_factor=(1.0, 1.0)))
    module = getattr(model, 'module', model)
    module.roi_head.test_cfg.score_thr = threshold
    model.eval()
    with torch.no_grad():
        (sample,) = model.val_step({key: [value] for key, value in item.items()})
    return torch.cat([sample.pred_instances.bboxes, sample.pred_instances.scores[:, None]], 1)


def run_stage(folder: Path, data: Path, stage: int) -> None:
    """Train; predict where one process runs other modules than the rest; resume; accumulate gradients; freeze."""
    runner = train(config(folder / f'{stage}', data, stage))
    found = predict(runner.model, runner.train_dataloader.dataset, threshold=0.0 if runner.rank == 0 else 2.0)
    assert bool(len(found)) == (runner.rank == 0)
    torch.save(dict(held(runner), found=found), folder / f'{stage}/after{runner.rank}.pth')
    finish(runner)
    cfg = config(folder / f'{stage}_resumed', data, stage)
    cfg.update(resume=True, load_from=str(folder / f'{stage}/iter_{SAVED}.pth'))
    finish(train(cfg))
    finish(train(config(folder / f'{stage}_accumulated', data, stage, accumulate=2, steps=2)))
    if stage in FROZEN:
        cfg = config(folder / f'{stage}_frozen', data, stage, steps=2)
        cfg.model.backbone.update(frozen_stages=1, with_cp=True)
        cfg.load_from = str(data / 'backbone.pth')
        finish(train(cfg))


def run_in_bf16(folder: Path, data: Path) -> None:
    """Autocast works on the CPU too; only mmengine's AmpOptimWrapper does not."""
    runner = RUNNERS.build(config(folder / 'bf16', data, 2, steps=2))
    runner.train()
    engine = runner.model.model
    assert engine.torch_autocast_dtype() == torch.bfloat16
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert set(engine.optimizer.ipg_buckets) == {torch.float32}, 'gradients are exchanged in less than fp32'
    finish(runner)


def run_ema(folder: Path, data: Path) -> None:
    """Average weights for four steps, and resume from two."""
    for name in ('ema', 'ema_resumed'):
        cfg = config(folder / name, data, 2, steps=4)
        cfg.default_hooks.checkpoint.interval = 2
        cfg.custom_hooks += [dict(type='EMAHook', momentum=0.25), dict(type='Trace')]
        if name == 'ema_resumed':
            cfg.update(resume=True, load_from=str(folder / 'ema/iter_2.pth'))
        runner = train(cfg)
        (trace,) = [hook for hook in runner.hooks if isinstance(hook, Trace)]
        if runner.rank == 0:
            torch.save(trace.weights, folder / name / 'trace.pth')
        finish(runner)


def run_one_process(folder: Path, data: Path) -> None:
    """Take the images of all processes in turn."""
    train(config(folder / '0', data, 0, accumulate=PROCESSES))
    train(config(folder / '0_accumulated', data, 0, accumulate=2 * PROCESSES, steps=2))


def main(folder: Path, data: Path) -> None:
    torch.set_num_threads(1)  # threads that wait for each other are slower than one, where cores are shared
    if 'RANK' not in os.environ:
        run_one_process(folder, data)
        return
    launch.init_cpu_processes(config(folder / 'none', data, 1))
    torch.set_num_threads(1)
    for stage in STAGES:
        run_stage(folder, data, stage)
    run_in_bf16(folder, data)
    run_ema(folder, data)


if __name__ == '__main__':
    mmengine.config.config.FormatCode = lambda text, **_: (text, True)  # see conftest.py
    with DefaultScope.overwrite_default_scope('mmdet'):
        main(*map(Path, sys.argv[1:]))


# ---------------------------------------------------------------- tests of what it has left


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Trainings at each stage on two processes, and those of one process under `0`."""
    folder = tmp_path_factory.mktemp('deepspeed')
    data = nano_training.write_data(folder / 'data')
    torch.save(dict(model=backbone(data / 'start.pth')), data / 'backbone.pth')
    launcher = ['-m', 'torch.distributed.run', '--nproc_per_node', str(PROCESSES), '--master_port', str(free_port())]
    for start in (launcher, []):
        result = subprocess.run(
            [sys.executable, *start, __file__, folder, data],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={**os.environ, 'OMP_NUM_THREADS': '1'},
            check=False,
        )
        assert result.returncode == 0, result.stdout[-3000:]
    return folder


def notes(folder: Path, key: str) -> torch.Tensor:
    """What nano_training's hook has written down, for each process."""
    return torch.tensor([process[key] for process in torch.load(folder / 'notes.pth', weights_only=True)])


def weights(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path / 'weights.pth' if path.is_dir() else path, weights_only=True)['state_dict']


def backbone(path: Path) -> dict[str, torch.Tensor]:
    """Weights of the backbone as a file of Microsoft's has them: for it alone, and without pre-training windows."""
    names = [name for name in weights(path) if name.startswith('backbone.layers.') or '.patch_embed.' in name]
    return {n.removeprefix('backbone.'): weights(path)[n] for n in names if 'window_size' not in n}


def equal(one: dict, other: dict) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_training_is_that_of_one_process_on_the_joint_batch(trained, stage):
    """Losses, the norm of all gradients before they are clipped, and weights, with layer-wise rates."""
    losses = notes(trained / f'{stage}', 'losses').mean(0)
    torch.testing.assert_close(losses, notes(trained / '0', 'losses').view(STEPS, PROCESSES).mean(1), rtol=2e-5, atol=0)
    norms = notes(trained / f'{stage}', 'norms')[0]
    torch.testing.assert_close(norms, notes(trained / '0', 'norms')[0][::PROCESSES], rtol=5e-5, atol=0)
    assert (norms > 5).all(), 'nothing was clipped'
    start = weights(trained / 'data/start.pth')
    found, expected = (
        weights(trained / f'{stage}/iter_{STEPS}.pth'),
        weights(trained / f'0/iter_{STEPS * PROCESSES}.pth'),
    )
    assert found.keys() == expected.keys()
    distance, change = (
        torch.cat([(expected[name] - other[name]).flatten() for name in expected]).norm() for other in (found, start)
    )
    assert distance < 2e-3 * change


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_resumed_training_reaches_the_same_weights(trained, stage):
    end = f'iter_{STEPS}.pth'
    assert equal(weights(trained / f'{stage}_resumed' / end), weights(trained / f'{stage}' / end))
    assert notes(trained / f'{stage}_resumed', 'losses').shape == (PROCESSES, STEPS - SAVED)


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_accumulated_gradients_are_those_of_the_joint_batch(trained, stage):
    """Two processes that accumulate over two iterations have four images, as one has that takes them in turn."""
    losses = notes(trained / f'{stage}_accumulated', 'losses').mean(0).view(2, 2).mean(1)
    expected = notes(trained / '0_accumulated', 'losses').view(2, 4).mean(1)
    torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_each_process_holds_its_share(trained, stage):
    """Bytes of two processes against those of the whole model; at stage 3, small parameters stay whole."""
    size = sum(4 * w.numel() for name, w in weights(trained / 'data/start.pth').items() if 'window_size' not in name)
    for rank in range(PROCESSES):
        after = torch.load(trained / f'{stage}/after{rank}.pth', weights_only=True)
        assert after['copies'] == pytest.approx(size / PROCESSES, rel=1e-3)
        assert after['states'] == pytest.approx(2 * size / PROCESSES, rel=1e-3)
        if stage < 3:
            assert after['parameters'] == pytest.approx(size, rel=1e-3)
        else:
            assert after['parameters'] < 0.65 * size


@pytest.mark.slow
@pytest.mark.parametrize('stage', STAGES)
def test_checkpoints_load_in_a_plain_process(trained, stage):
    """As `load_from`, and for a prediction, which is that of the training's processes."""
    folder = trained / f'{stage}/iter_{STEPS}.pth'
    cfg = config(trained / f'plain{stage}', trained / 'data', 0, steps=1)
    cfg.update(load_from=str(folder))
    with DefaultScope.overwrite_default_scope('mmdet'):
        launch.adapt_to_cpu(cfg)
        runner = Runner.from_cfg(cfg)
        runner.load_or_resume()
        assert equal(runner.model.state_dict(), weights(folder))
        found = predict(runner.model, runner.build_dataloader(cfg.train_dataloader).dataset)
    after = torch.load(trained / f'{stage}/after0.pth', weights_only=True)
    torch.testing.assert_close(found, after['found'])


@pytest.mark.slow
@pytest.mark.parametrize('stage', FROZEN)
def test_frozen_parameters_stay_those_of_the_file(trained, stage):
    """The training started from a backbone alone, as Microsoft's files are; with activation checkpointing."""
    start, end = backbone(trained / 'data/start.pth'), backbone(trained / f'{stage}_frozen/iter_2.pth')
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert 'layers.1.blocks.0.norm1.weight' in changed
    assert not any(name.startswith(('patch_embed.', 'layers.0.')) for name in changed)


@pytest.mark.slow
def test_bf16_computes_in_bf16_alone(trained):
    """Checked further where it runs: parameters and what processes exchange are fp32."""
    losses, exact = notes(trained / 'bf16', 'losses'), notes(trained / '2', 'losses')[:, :2]
    torch.testing.assert_close(losses, exact, rtol=2e-2, atol=0)
    assert not torch.isclose(losses, exact, rtol=1e-6, atol=0).any()


@pytest.mark.slow
def test_averaged_weights(trained):
    """EMAHook against the formula; the checkpoint has the average in place of the weights, and resuming swaps back."""
    first, *others = torch.load(trained / 'ema/trace.pth', weights_only=True)
    averages = dict(first)
    for step in others:
        averages = {name: 0.75 * value + 0.25 * step[name] for name, value in averages.items()}
    saved = weights(trained / 'ema/iter_4.pth')
    for name, average in averages.items():
        torch.testing.assert_close(saved[name], average)
    assert equal(weights(trained / 'ema_resumed/iter_4.pth'), saved)


@pytest.fixture(scope='module')
def shapes(tmp_path_factory):
    folder = tmp_path_factory.mktemp('shapes')
    arguments = ['--train', '8', '--val', '4', '--size', '64', '--seed', '0']
    subprocess.run([sys.executable, nano_training.SHAPES, folder, *arguments], check=True)
    return folder


@pytest.mark.slow
def test_tools_train_validate_resume_and_test(shapes, tmp_path):
    """`--cfg-options` alone turn any config into one for DeepSpeed; a test needs neither it nor processes."""
    strategy = ['strategy.type=swinv2_mm.DeepSpeedStrategy', 'strategy.zero_optimization.stage=3']
    options = ['--cfg-options', f'data_root={shapes}', 'runner_type=swinv2_mm.FlexibleRunner', *strategy]
    train = ['dist_train.sh', TINY, 2, '--work-dir', 'work', '--auto-scale-lr', '--seed', 3]
    more = [
        'default_hooks.checkpoint.save_best=coco/bbox_mAP',
        'train_cfg.max_epochs=2',
        'auto_scale_lr.base_batch_size=8',
    ]
    log = run(tmp_path, *train, *options, *more)
    assert 'Scaling the original LR by 0.5' in log
    assert 'Epoch(val) [2][2/2]' in log
    shutil.rmtree(tmp_path / 'work/epoch_2.pth')
    log = run(tmp_path, *train, '--resume', 'work/epoch_1.pth', '--no-validate', *options, *more)
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(val)' not in log
    run(tmp_path, 'test.py', TINY, 'work/epoch_2.pth', '--work-dir', 'tested', *options)
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'tested')
    assert 'state_dict' in read_checkpoint(next((tmp_path / 'work').glob('best_coco_bbox_mAP_epoch_*.pth')))
    result = fail(tmp_path, 'dist_train.sh', TINY, 1, '--work-dir', 'work', '--resume', *options)
    assert 'was written at ZeRO stage 3 by 2 processes, and this is stage 3 with 1' in result


def fail(folder: Path, script: str, *args) -> str:
    """Run a tool that must not succeed; returns what it has printed."""
    program, args = command(script, *args)
    result = subprocess.run(
        [*program, *args], cwd=folder, env=environment(), capture_output=True, text=True, check=False
    )
    assert result.returncode != 0
    return result.stdout + result.stderr


# ---------------------------------------------------------------- configs


@functools.cache
def htc() -> Config:
    return Config.fromfile(CONFIGS / 'det/htc_swinv2_b.py')


def with_deepspeed(stage: object = 2, **more) -> Config:
    cfg = copy.deepcopy(htc())
    cfg.runner_type = 'swinv2_mm.FlexibleRunner'
    cfg.strategy = dict(type='swinv2_mm.DeepSpeedStrategy', zero_optimization=dict(stage=stage))
    cfg.merge_from_dict(more)
    return cfg


@pytest.mark.parametrize(
    ('leaf', 'stage'),
    [('det/htc_swinv2_l.py', 1), ('seg/upernet_swinv2_l.py', 2), ('video/swinv2_l_k400_224x224x32.py', 3)],
)
def test_bases_add_to_any_leaf(tmp_path, leaf, stage):
    bases = [str(CONFIGS / leaf), str(CONFIGS / f'_base_/memory/deepspeed_zero{stage}.py')]
    (tmp_path / 'leaf.py').write_text(f'_base_ = {bases}\n')
    cfg = Config.fromfile(tmp_path / 'leaf.py')
    launch.check_runner(cfg)
    assert cfg.strategy.zero_optimization.stage == stage
    assert {key: cfg[key] for key in cfg if key not in ('runner_type', 'strategy')} == {
        **Config.fromfile(CONFIGS / leaf)
    }


def test_recipe_is_translated():
    cfg = with_deepspeed()
    cfg.optim_wrapper.clip_grad = dict(max_norm=0.5, norm_type=2)
    recipe, sections = deepspeed.translate(cfg.optim_wrapper)
    assert recipe['optimizer'] == cfg.optim_wrapper.optimizer
    assert recipe['paramwise_cfg'] == cfg.optim_wrapper.paramwise_cfg
    assert sections['gradient_clipping'] == 0.5
    assert sections['gradient_accumulation_steps'] == 4
    assert sections['torch_autocast'] == dict(enabled=True, dtype='bfloat16', lower_precision_safe_modules=[])


@pytest.mark.parametrize(
    ('option', 'message'),
    [
        ({'optim_wrapper.clip_grad': dict(type='value', clip_value=1.0)}, '2-norm of all gradients alone'),
        ({'optim_wrapper.clip_grad': dict(max_norm=1.0, norm_type=1)}, '2-norm of all gradients alone'),
        ({'optim_wrapper.dtype': 'float16'}, 'optim_wrapper.dtype=bfloat16'),
        ({'optim_wrapper.type': 'ApexOptimWrapper'}, 'it is OptimWrapper or AmpOptimWrapper'),
        ({'optim_wrapper.momentum_cache': 1}, 'optim_wrapper.momentum_cache has no counterpart'),
        ({'strategy.config': dict(gradient_clipping=1.0)}, 'strategy.config.gradient_clipping=1.0'),
        ({'strategy.zero_optimization.stage': 0}, 'must be 1, 2 or 3, got 0'),
        ({'compile': True}, 'compile=True has no effect'),
        ({'sync_bn': 'torch'}, "sync_bn='torch' has no effect"),
        ({'model_wrapper_cfg': dict(type='MMDistributedDataParallel')}, 'model_wrapper_cfg=None'),
    ],
)
def test_what_has_no_counterpart_is_refused(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        launch.check_runner(with_deepspeed(**option))


def test_averaging_parts_of_weights_is_refused():
    hooks = dict(custom_hooks=[dict(type='EMAHook')])
    launch.check_runner(with_deepspeed(2, **hooks))
    with pytest.raises(ValueError, match='use stage 1 or 2'):
        launch.check_runner(with_deepspeed(3, **hooks))


def test_missing_package_ends_in_one_line(monkeypatch, capsys):
    monkeypatch.setattr(deepspeed, 'deepspeed', None)
    with pytest.raises(SystemExit):
        launch.build_runner(with_deepspeed())
    assert capsys.readouterr().err == 'error: DeepSpeedStrategy needs DeepSpeed: pip install swinv2_mm[deepspeed]\n'


def test_a_single_process_needs_a_launcher(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='tools/dist_train.sh CONFIG 1'):
        strategy.prepare(torch.nn.Linear(1, 1), optim_wrapper=dict(optimizer=dict(type='AdamW')))


def test_plain_checkpoint_is_not_resumed(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='set load_from instead of resume'):
        strategy.resume(str(tmp_path))


def test_folders_are_not_written_to_remote_storage(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='only local ones'):
        strategy.save_checkpoint('s3://bucket/epoch_1.pth')

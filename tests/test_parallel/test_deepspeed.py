"""Training with DeepSpeed's ZeRO is that of one process on the joint batch, and its checkpoints load and resume.

test_sharded_training.py trains a detector with it.
"""

import copy
import functools
import re
import shutil
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.dist import get_rank
from mmengine.hooks import Hook
from mmengine.registry import HOOKS, RUNNERS
from mmengine.runner import Runner
from nano import NANO_CONFIGS, training
from processes import ProcessError, run_processes
from tool_runs import call, call_together, metrics, run

pytest.importorskip('mmdet')
pytest.importorskip('deepspeed')

from swinv2_mm.checkpoints.files import read_checkpoint
from swinv2_mm.cli import launch
from swinv2_mm.parallel import deepspeed

STAGES = (1, 2, 3)
FROZEN = (2, 3)  # ZeRO stages that are also tested with frozen parameters
PROCESSES = 2
DET = NANO_CONFIGS / 'det.py'
CONFIGS = Path(__file__).parents[2] / 'configs'


# ---------------------------------------------------------------- what runs in the processes


def config(folder: Path, data: Path, stage: int, **more) -> Config:
    return training.config(folder, data, f'deepspeed_zero{stage}', **more)


@HOOKS.register_module()
class WeightTrace(Hook):
    """Keeps the weights after each iteration."""

    def before_train(self, runner) -> None:
        self.weights = []

    def after_train_iter(self, runner, batch_idx: int, data_batch=None, outputs=None) -> None:
        self.weights.append({name: p.detach().clone() for name, p in runner.model.module.named_parameters()})


def train(cfg: Config) -> None:
    training.finish(training.train(cfg))


def copies(optimizer) -> int:
    """Bytes of the fp32 copies of parameters that the optimizer of this process updates."""
    parts = getattr(optimizer, 'single_partition_of_fp32_groups', None) or optimizer.fp32_partitioned_groups_flat
    return sum(training.nbytes(part) for part in parts)


def predict(model, threshold: float = 0.0) -> torch.Tensor:
    """The prediction for the first image; with a threshold above 1, the last layer does not run."""
    getattr(model, 'module', model).threshold = threshold
    model.eval()
    with torch.no_grad():
        (prediction,) = model.val_step(dict(inputs=[training.Pixels()[0]['inputs']]))
    return prediction


def train_stage(folder: Path, data: Path, stage: int) -> None:
    """Train, predict with other modules in one process than in the rest, resume, accumulate gradients, freeze."""
    runner = training.train(config(folder / f'{stage}', data, stage))
    found = predict(runner.model, threshold=0.0 if runner.rank == 0 else 2.0)
    after = dict(found=found, copies=copies(runner.optim_wrapper.optimizer))
    torch.save(after, folder / f'{stage}/after{runner.rank}.pth')
    training.finish(runner)
    train(
        training.resumed(
            config(folder / f'{stage}_resumed', data, stage), folder / f'{stage}/iter_{training.SAVED}.pth'
        )
    )
    train(config(folder / f'{stage}_accumulated', data, stage, accumulate=2))
    if stage in FROZEN:
        cfg = config(folder / f'{stage}_frozen', data, stage, steps=2)
        cfg.model.backbone.update(frozen_stages=1, with_cp=True)
        cfg.load_from = str(data / 'backbone.pth')
        train(cfg)


def train_in_bf16(folder: Path, data: Path) -> None:
    """With autocast, which works on a CPU too, but not with mmengine's AmpOptimWrapper."""
    runner = RUNNERS.build(config(folder / 'bf16', data, 2, steps=2))
    runner.train()
    engine = runner.model.model
    assert engine.torch_autocast_dtype() == torch.bfloat16
    assert {p.dtype for p in engine.module.parameters()} == {torch.float32}
    assert set(engine.optimizer.ipg_buckets) == {torch.float32}, 'gradients are exchanged in less than fp32'
    training.finish(runner)


def train_averages(folder: Path, data: Path) -> None:
    """Train with EMA for four steps, and resume from step two."""
    for name in ('ema', 'ema_resumed'):
        cfg = config(folder / name, data, 2, steps=4)
        cfg.default_hooks.checkpoint.interval = 2
        cfg.custom_hooks += [dict(type='EMAHook', momentum=0.25), dict(type='WeightTrace')]
        runner = training.train(cfg if name == 'ema' else training.resumed(cfg, folder / 'ema/iter_2.pth'))
        (trace,) = [hook for hook in runner.hooks if isinstance(hook, WeightTrace)]
        if get_rank() == 0:
            torch.save(trace.weights, folder / name / 'trace.pth')
        training.finish(runner)


def train_two_processes(folder: Path, data: Path) -> None:
    for stage in STAGES:
        train_stage(folder, data, stage)
    train_in_bf16(folder, data)
    train_averages(folder, data)


def train_one_process(folder: Path, data: Path) -> None:
    """Train on the joint batch of all processes."""
    training.train(training.config(folder / '0', data, accumulate=PROCESSES))
    training.train(training.config(folder / '0_accumulated', data, accumulate=2 * PROCESSES))


# ---------------------------------------------------------------- training


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    """Trainings at each stage on two processes, and of one process in the folders `0...`."""
    folder = tmp_path_factory.mktemp('deepspeed')
    (folder / 'data').mkdir()
    data = training.write_start(folder / 'data')
    torch.save(dict(model=backbone(data / training.START)), data / 'backbone.pth')
    run_processes(train_one_process, folder, data, processes=1, folder=folder)
    run_processes(train_two_processes, folder, data, processes=PROCESSES, folder=folder)
    return folder


def backbone(path: Path) -> dict[str, torch.Tensor]:
    """Weights of the backbone as in a file of Microsoft: only the backbone, and without pre-training windows."""
    weights = training.weights(path)
    names = [name for name in weights if name.startswith('backbone.layers.') or '.patch_embed.' in name]
    return {n.removeprefix('backbone.'): weights[n] for n in names if 'window_size' not in n}


@pytest.mark.parametrize('stage', STAGES)
@pytest.mark.parametrize('accumulated', ['', '_accumulated'])
def test_deepspeed_trains_like_one_process(trained, stage, accumulated):
    """Losses, gradient norms before clipping, and weights, with layer-wise learning rates.

    Two processes that accumulate over two iterations train on four images, like one that accumulates over four.
    """
    start = trained / 'data' / training.START
    tolerances = dict(first=1e-5, rest=1e-5, norm=1e-5, distance=1e-4)
    training.check_agreement(trained / f'{stage}{accumulated}', trained / f'0{accumulated}', start, **tolerances)


@pytest.mark.parametrize('stage', STAGES)
def test_deepspeed_resumes(trained, stage):
    resumed = trained / f'{stage}_resumed'
    assert training.same_weights(training.last(resumed), training.last(trained / f'{stage}'))
    assert training.records(resumed, 'losses').shape == (PROCESSES, training.STEPS - training.SAVED)


@pytest.mark.parametrize('stage', STAGES)
def test_deepspeed_shards_parameters_and_states(trained, stage):
    """Bytes of each of two processes; at stage 3, small parameters are not sharded."""
    start = training.weights(trained / 'data' / training.START)
    size = sum(4 * w.numel() for name, w in start.items() if 'window_size' not in name)
    parameters, states = (training.records(trained / f'{stage}', key).tolist() for key in ('parameters', 'states'))
    for rank in range(PROCESSES):
        after = torch.load(trained / f'{stage}/after{rank}.pth', weights_only=True)
        assert after['copies'] == pytest.approx(size / PROCESSES, rel=1e-2)
        assert states[rank] == pytest.approx(2 * size / PROCESSES, rel=1e-2)
        if stage < 3:
            assert parameters[rank] == pytest.approx(size, rel=1e-3)
        else:
            assert parameters[rank] < 0.65 * size


@pytest.mark.parametrize('stage', STAGES)
def test_deepspeed_checkpoints_load_without_deepspeed(trained, tmp_path, stage):
    """`load_from` loads the weights, and predictions are those of the training processes."""
    folder = training.last(trained / f'{stage}')
    cfg = training.config(tmp_path, trained / 'data')
    cfg.load_from = str(folder)
    launch.adapt_to_cpu(cfg)
    runner = Runner.from_cfg(cfg)
    runner.load_or_resume()
    expected = training.weights(folder)
    assert runner.model.state_dict().keys() == expected.keys()
    assert all(torch.equal(value, expected[name]) for name, value in runner.model.state_dict().items())
    first, second = (torch.load(trained / f'{stage}/after{rank}.pth', weights_only=True)['found'] for rank in range(2))
    torch.testing.assert_close(predict(runner.model), first)
    torch.testing.assert_close(predict(runner.model, threshold=2.0), second)


def resume_in_one_process(folder: Path, data: Path) -> None:
    cfg = training.resumed(config(folder / 'other', data, 2), training.last(folder / '1'))
    cfg.launcher = 'pytorch'
    train(cfg)


def test_deepspeed_refuses_to_resume_at_another_stage(trained):
    with pytest.raises(ProcessError) as refused:
        run_processes(resume_in_one_process, trained, trained / 'data', processes=1, folder=trained)
    assert 'was written at ZeRO stage 1 by 2 processes, and this is stage 2 with 1' in refused.value.log


@pytest.mark.parametrize('stage', FROZEN)
def test_deepspeed_keeps_frozen_parameters(trained, stage):
    """The training started from a file of only the backbone, with activation checkpointing."""
    start, end = backbone(trained / 'data' / training.START), backbone(training.last(trained / f'{stage}_frozen'))
    changed = {name for name in start if not torch.equal(start[name], end[name])}
    assert 'layers.1.blocks.0.norm1.weight' in changed
    assert not any(name.startswith(('patch_embed.', 'layers.0.')) for name in changed)


def test_deepspeed_bf16(trained):
    """`train_in_bf16` also checks that parameters and exchanged gradients are fp32."""
    losses, exact = training.records(trained / 'bf16', 'losses'), training.records(trained / '2', 'losses')[:, :2]
    torch.testing.assert_close(losses, exact, rtol=5e-2, atol=0)
    assert not torch.isclose(losses, exact, rtol=1e-6, atol=0).any()


def test_deepspeed_ema(trained):
    """EMAHook agrees with the formula; the checkpoint has the average as its weights, and resuming swaps back."""
    first, *others = torch.load(trained / 'ema/trace.pth', weights_only=True)
    averages = dict(first)
    for step in others:
        averages = {name: 0.75 * value + 0.25 * step[name] for name, value in averages.items()}
    saved = training.weights(trained / 'ema/iter_4.pth')
    for name, average in averages.items():
        torch.testing.assert_close(saved[name], average)
    assert training.same_weights(trained / 'ema_resumed/iter_4.pth', trained / 'ema/iter_4.pth')


@pytest.mark.slow
def test_tools_with_deepspeed(shapes, tmp_path):
    """`--cfg-options` turn any config into one for DeepSpeed; testing needs neither DeepSpeed nor processes."""
    strategy = ['strategy.type=swinv2_mm.DeepSpeedStrategy', 'strategy.zero_optimization.stage=3']
    options = ['--cfg-options', f'data_root={shapes}', 'runner_type=swinv2_mm.FlexibleRunner', *strategy]
    train = ['--work-dir', 'work', '--auto-scale-lr', '--seed', 3]
    more = [
        'default_hooks.checkpoint.save_best=coco/bbox_mAP',
        'train_cfg.max_epochs=2',
        'auto_scale_lr.base_batch_size=8',
    ]
    log = run(tmp_path, 'dist_train.sh', DET, 2, *train, *options, *more)
    assert 'Scaling the original LR by 0.5' in log
    assert 'Epoch(val) [2][3/3]' in log
    shutil.rmtree(tmp_path / 'work/epoch_2.pth')
    again = ['--resume', 'work/epoch_1.pth', '--no-validate']
    log = call_together(tmp_path, 'train.py', DET, *train, *again, *options, *more)
    assert 'resumed epoch: 1, iter: 2' in log
    assert 'Epoch(val)' not in log
    call(tmp_path, 'test.py', DET, 'work/epoch_2.pth', '--work-dir', 'tested', *options)
    assert 'coco/bbox_mAP' in metrics(tmp_path / 'tested')
    assert 'state_dict' in read_checkpoint(next((tmp_path / 'work').glob('best_coco_bbox_mAP_epoch_*.pth')))


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


@pytest.mark.parametrize('stage', STAGES)
def test_deepspeed_configs_have_their_stage(stage):
    cfg = Config.fromfile(CONFIGS / f'_base_/memory/deepspeed_zero{stage}.py')
    assert cfg.strategy.zero_optimization.stage == stage


def test_translate_a_recipe():
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
        ({'optim_wrapper.clip_grad': dict(type='value', clip_value=1.0)}, 'clips only by the 2-norm of all gradients'),
        ({'optim_wrapper.clip_grad': dict(max_norm=1.0, norm_type=1)}, 'clips only by the 2-norm of all gradients'),
        ({'optim_wrapper.dtype': 'float16'}, 'optim_wrapper.dtype=bfloat16'),
        ({'optim_wrapper.type': 'ApexOptimWrapper'}, 'must be OptimWrapper or AmpOptimWrapper'),
        ({'optim_wrapper.momentum_cache': 1}, 'optim_wrapper.momentum_cache has no counterpart'),
        ({'strategy.config': dict(gradient_clipping=1.0)}, 'strategy.config.gradient_clipping=1.0'),
        ({'strategy.zero_optimization.stage': 0}, 'must be 1, 2 or 3, got 0'),
        ({'compile': True}, 'compile=True has no effect'),
        ({'sync_bn': 'torch'}, "sync_bn='torch' has no effect"),
        ({'model_wrapper_cfg': dict(type='MMDistributedDataParallel')}, 'model_wrapper_cfg=None'),
    ],
)
def test_check_runner_refuses_what_deepspeed_does_not_have(option, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        launch.check_runner(with_deepspeed(**option))


def test_check_runner_refuses_ema_at_stage_3():
    hooks = dict(custom_hooks=[dict(type='EMAHook')])
    launch.check_runner(with_deepspeed(2, **hooks))
    with pytest.raises(ValueError, match='use stage 1 or 2'):
        launch.check_runner(with_deepspeed(3, **hooks))


def test_build_runner_without_deepspeed(monkeypatch, capsys):
    monkeypatch.setattr(deepspeed, 'deepspeed', None)
    with pytest.raises(SystemExit):
        launch.build_runner(with_deepspeed())
    assert capsys.readouterr().err == 'error: DeepSpeedStrategy needs DeepSpeed: pip install swinv2_mm[deepspeed]\n'


def test_deepspeed_strategy_needs_a_launcher(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='tools/dist_train.sh CONFIG 1'):
        strategy.prepare(torch.nn.Linear(1, 1), optim_wrapper=dict(optimizer=dict(type='AdamW')))


def test_deepspeed_strategy_does_not_resume_a_plain_checkpoint(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='set load_from instead of resume'):
        strategy.resume(str(tmp_path))


def test_deepspeed_strategy_writes_no_folder_to_remote_storage(tmp_path):
    strategy = deepspeed.DeepSpeedStrategy(zero_optimization=dict(stage=1), work_dir=str(tmp_path))
    with pytest.raises(ValueError, match='only be written to a local path'):
        strategy.save_checkpoint('s3://bucket/epoch_1.pth')

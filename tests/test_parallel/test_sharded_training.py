"""Training with sharded optimizer states and parameters on several processes, compared with one process."""

import copy
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from nano import training
from processes import ProcessError, run_processes
from tool_runs import HELPERS, REPOSITORY, environment, free_port
from torch import nn

from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.parallel.sharding import FullyShardedModel

STRATEGIES = ['ddp', 'zero1', 'fsdp']
DEEPSPEED = [f'deepspeed_zero{stage}' for stage in (1, 2, 3)] if importlib.util.find_spec('deepspeed') else []
# tolerances: of rounding in another order of summation
ROUNDING = dict(first=1e-5, rest=1e-5, norm=1e-5, distance=1e-4)
DECISIONS = dict(first=2e-5, rest=2e-2, norm=1e-4, distance=2e-2)  # and of proposals that only one of them keeps


# ---------------------------------------------------------------- what runs in the processes


def train_one_process(folder: Path, data: Path) -> None:
    """Train on the joint batch of two and of four processes."""
    for images in (2, 4):
        training.train(training.config(folder / f'one{images}', data, accumulate=images))


def train_two_processes(folder: Path, data: Path) -> None:
    """Train with each strategy, resume from the middle, train with EMA, and accumulate gradients."""
    for strategy in STRATEGIES:
        training.train(training.config(folder / strategy, data, strategy))
        checkpoint = folder / strategy / f'iter_{training.SAVED}.pth'
        training.train(training.resumed(training.config(folder / f'{strategy}_resumed', data, strategy), checkpoint))
    for strategy in ('ddp', 'zero1'):
        cfg = training.config(folder / f'{strategy}_ema', data, strategy, steps=2)
        cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.5))
        training.train(cfg)
    training.train(training.config(folder / 'fsdp_accumulated', data, 'fsdp', accumulate=2))


def train_each(folder: Path, data: Path, strategies: list[str]) -> None:
    for strategy in strategies:
        training.finish(training.train(training.config(folder / strategy, data, strategy)))


def train_htc(folder: Path, data: Path, strategies: list[str], accumulate: int = 1) -> None:
    """Train with each strategy; with DeepSpeed, then predict, with other modules in one process than in the rest."""
    htc_training = importlib.import_module('nano.htc_training')
    for strategy in strategies:
        runner = training.train(htc_training.config(folder / strategy, data, strategy, accumulate))
        if strategy in DEEPSPEED:
            found = htc_training.detect(runner, threshold=0.0 if runner.rank == 0 else 2.0)
            assert bool(len(found)) == (runner.rank == 0)
            training.finish(runner)


# ---------------------------------------------------------------- the nano model


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return training.write_start(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def one_process(data, tmp_path_factory):
    """Trainings of one process on the joint batch of several."""
    folder = tmp_path_factory.mktemp('one')
    run_processes(train_one_process, folder, data, processes=1, folder=folder)
    return folder


@pytest.fixture(scope='module')
def two_processes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    run_processes(train_two_processes, folder, data, folder=folder)
    return folder


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_training_on_two_processes_is_that_of_one(one_process, two_processes, data, strategy):
    # DDP and ZeRO-1 add two gradients, in whichever order
    tolerances = ROUNDING if strategy == 'fsdp' else {}
    training.check_agreement(two_processes / strategy, one_process / 'one2', data / training.START, **tolerances)


def test_fsdp_accumulates_gradients(one_process, two_processes, data):
    folder = two_processes / 'fsdp_accumulated'
    training.check_agreement(folder, one_process / 'one4', data / training.START, **ROUNDING)


@pytest.mark.slow
def test_training_on_four_processes_is_that_of_one(one_process, data, tmp_path):
    strategies = ['zero1', 'fsdp', *DEEPSPEED[2:]]
    run_processes(train_each, tmp_path, data, strategies, processes=4, folder=tmp_path)
    for strategy in strategies:
        training.check_agreement(tmp_path / strategy, one_process / 'one4', data / training.START, **ROUNDING)


def test_parameters_and_states_are_sharded(two_processes):
    full = {key: training.records(two_processes / 'ddp', key) for key in ('parameters', 'states')}
    assert full['states'][0].item() == pytest.approx(2 * full['parameters'][0].item(), rel=1e-2)  # two moments
    for strategy, sharded in (('zero1', ['states']), ('fsdp', ['parameters', 'states'])):
        for key in full:
            shares = training.records(two_processes / strategy, key) / full[key]
            # ZeRO-1 assigns whole parameters, FSDP cuts them along their first axis: shares are not exactly equal
            expected = [1 / 2] * 2 if key in sharded else [1] * 2
            assert shares.tolist() == pytest.approx(expected, rel=1e-1), (strategy, key)
            assert shares.sum().item() == pytest.approx(1 if key in sharded else 2, rel=1e-3), (strategy, key)


@pytest.mark.parametrize('strategy', ['zero1', 'fsdp'])
def test_checkpoints_have_the_layout_of_ddp(two_processes, strategy):
    found, expected = (torch.load(training.last(two_processes / name), weights_only=True) for name in (strategy, 'ddp'))
    assert found.keys() == expected.keys()
    assert all(type(a) is type(b) and a.shape == b.shape for a, b in pairs(found, expected, 'state_dict'))
    states, states_expected = found['optimizer'], expected['optimizer']
    assert states['param_groups'] == states_expected['param_groups']
    assert states['state'].keys() == states_expected['state'].keys()
    for index, state in states_expected['state'].items():
        assert {key: (type(v), v.shape) for key, v in state.items()} == {
            key: (type(v), v.shape) for key, v in states['state'][index].items()
        }
    plain = torch.optim.AdamW(
        [
            dict(params=[torch.zeros_like(states['state'][i]['exp_avg']) for i in group['params']])
            for group in states['param_groups']
        ]
    )
    plain.load_state_dict(states)


def pairs(a, b, key):
    return [(a[key][name], b[key][name]) for name in b[key]]


@pytest.mark.parametrize('strategy', STRATEGIES)
def test_resumed_training_reaches_the_weights(two_processes, strategy):
    resumed = two_processes / f'{strategy}_resumed'
    assert training.records(resumed, 'losses').shape == (2, training.STEPS - training.SAVED), 'it was not resumed'
    assert training.same_weights(training.last(resumed), training.last(two_processes / strategy))


def test_zero1_with_ema(two_processes, data):
    expected, found = (
        torch.load(training.last(two_processes / f'{strategy}_ema'), weights_only=True) for strategy in ('ddp', 'zero1')
    )
    for key in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(a, b) for a, b in pairs(found, expected, key))
    start = training.weights(data / training.START)
    assert any(not torch.equal(found['state_dict'][name], start[name]) for name in start)


def train_fsdp_with_ema(folder, data):
    cfg = training.config(folder, data, 'fsdp')
    cfg.launcher = 'pytorch'
    cfg.custom_hooks.append(dict(type='EMAHook', momentum=0.5))
    training.train(cfg)


def test_fsdp_refuses_ema(data, tmp_path):
    with pytest.raises(ProcessError) as refused:
        run_processes(train_fsdp_with_ema, tmp_path, data, processes=1, folder=tmp_path)
    hint = 'leave the hook out, or shard only the optimizer states (configs/_base_/memory/zero1.py)'
    assert hint in refused.value.log


# ---------------------------------------------------------------- FullyShardedModel compared with the full model


class Model(BaseModel):
    def __init__(self):
        super().__init__()
        self.backbone = SwinTransformerV2(
            arch=training.ARCH, window_size=4, with_cp=True, drop_path_rate=0.0, out_indices=(0, 1)
        )

    def forward(self, inputs, mode='loss'):
        return sum(out.square().mean() for out in self.backbone(inputs))


def full_and_sharded():
    torch.manual_seed(0)
    full = Model()
    return full, FullyShardedModel(copy.deepcopy(full)), torch.randn(2, 3, 32, 32)


def predict_and_train():
    full, sharded, images = full_and_sharded()
    rank = dist.get_rank()
    for _ in range(2):
        sharded.eval()
        full.eval()
        for _ in range(1 + 3 * rank):  # another number of images in each process
            with torch.no_grad():
                assert torch.equal(sharded(images), full(images))
        sharded.train()
        local = sum(p.to_local().numel() for p in sharded.parameters())
        assert local < 0.52 * sum(p.numel() for p in full.parameters())
        sharded(images[rank : rank + 1]).backward()
        sharded.zero_grad()


def test_fully_sharded_model_evaluates_different_numbers_of_images(tmp_path):
    run_processes(predict_and_train, folder=tmp_path)


def step_scaled(model, inputs):
    scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, eps=1e-3)
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(inputs)
    scaler.scale(loss).backward()
    scaler.unscale_(optimizer)
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    scaler.step(optimizer)
    scaler.update(4.0)
    return float(norm)


def compare_scaled_steps():
    full, sharded, images = full_and_sharded()
    rank = dist.get_rank()
    initial = copy.deepcopy(full)
    norm = step_scaled(sharded, images[rank : rank + 1])
    expected = step_scaled(nn.parallel.DistributedDataParallel(full), images[rank : rank + 1])
    assert expected > 0.1, 'nothing to clip'
    assert abs(norm - expected) < 1e-5 * expected, (norm, expected)
    parameters = zip(sharded.module.named_parameters(), full.parameters(), initial.parameters(), strict=True)
    for (name, p), q, start in parameters:
        moved, apart = (q - start).norm(), (p.full_tensor() - q).norm()
        assert apart <= 1e-4 * moved, (name, moved, apart)
        assert p.to_local().dtype == torch.float32


def test_fully_sharded_model_in_bf16_with_a_gradient_scaler(tmp_path):
    """The steps of AmpOptimWrapper, which needs a GPU: scale the loss, unscale and clip the gradients, step."""
    run_processes(compare_scaled_steps, folder=tmp_path)


# ---------------------------------------------------------------- torchrun, and dist_train.sh on two machines


@pytest.fixture(scope='module')
def config_files(data, tmp_path_factory):
    """The training with each strategy as a file for tools/train.py, without `work_dir`."""
    folder = tmp_path_factory.mktemp('config')
    for strategy in STRATEGIES:
        cfg = training.config(folder, data, strategy)
        cfg.custom_imports = dict(imports=['nano.training'])
        cfg.dump(folder / f'{strategy}.py')
    return folder


def torchrun(*args, **env: str) -> subprocess.CompletedProcess:
    """Run tools/train.py on two processes; `args` start with arguments of torchrun."""
    command = [sys.executable, '-m', 'torch.distributed.run', '--nproc_per_node', 2, *args]
    return subprocess.run(
        [*map(str, command)],
        env=environment(PYTHONPATH=str(HELPERS), **env),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def train_py(config: Path, work_dir: Path) -> list:
    return [REPOSITORY / 'tools/train.py', config, '--launcher', 'pytorch', '--resume', '--work-dir', work_dir]


@pytest.mark.slow
def test_fsdp_killed_process_ends_all_and_training_resumes(two_processes, config_files, data, tmp_path):
    kill = dict(NANO_KILL=str(training.SAVED + 1))
    killed = torchrun('--master_port', free_port(), *train_py(config_files / 'fsdp.py', tmp_path), **kill)
    assert killed.returncode != 0
    report = killed.stdout[killed.stdout.index('Root Cause') :]
    assert 'rank      : 1 ' in report
    assert 'SIGKILL' in report
    assert (tmp_path / 'last_checkpoint').read_text().endswith(f'iter_{training.SAVED}.pth')
    assert not (tmp_path / 'records.pth').exists()

    resumed = torchrun('--master_port', free_port(), *train_py(config_files / 'fsdp.py', tmp_path))
    assert resumed.returncode == 0, resumed.stdout[-3000:]
    check_resumed(tmp_path, two_processes / 'fsdp')


def check_resumed(folder, expected):
    losses = training.records(folder, 'losses')
    assert losses.shape == (2, training.STEPS - training.SAVED), 'it was not killed, or not resumed'
    assert training.same_weights(training.last(folder), training.last(expected))


@pytest.mark.slow
def test_torchrun_restarts_a_killed_training(two_processes, config_files, tmp_path):
    """With `--resume`, the first start loads `load_from`, the restart the last checkpoint."""
    result = torchrun(
        *('--max-restarts', 1, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{free_port()}'),
        *train_py(config_files / 'zero1.py', tmp_path),
        NANO_KILL=str(training.SAVED + 1),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',  # otherwise the restarted processes find stale addresses
    )
    assert result.returncode == 0, result.stdout[-3000:]
    check_resumed(tmp_path, two_processes / 'zero1')


@pytest.mark.slow
def test_dist_train_on_two_machines(two_processes, config_files, tmp_path):
    """Two launchers on this machine, with the variables of two machines."""
    place = environment(NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(free_port()), PYTHONPATH=str(HELPERS))
    machines = [
        subprocess.Popen(
            [REPOSITORY / 'tools/dist_train.sh', config_files / 'ddp.py', '1', '--work-dir', tmp_path],
            env=place | dict(NODE_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    assert training.same_weights(training.last(tmp_path), training.last(two_processes / 'ddp'))


# ---------------------------------------------------------------- a nano HTC


@pytest.fixture(scope='module')
def htc(tmp_path_factory):
    """Trainings of a nano HTC: with each strategy on two processes, and on the joint batch in one process."""
    pytest.importorskip('mmdet')
    folder = tmp_path_factory.mktemp('htc')
    data = importlib.import_module('nano.htc_training').write_data(folder / 'data')
    run_processes(train_htc, folder / 'one', data, ['ddp'], 2, processes=1, folder=folder)
    run_processes(train_htc, folder, data, STRATEGIES + DEEPSPEED, folder=folder)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize('strategy', STRATEGIES + DEEPSPEED)
def test_detector_on_two_processes_trains_like_on_one(htc, strategy):
    tolerances = {} if strategy in ('ddp', 'zero1') else DECISIONS
    training.check_agreement(htc / strategy, htc / 'one/ddp', htc / 'data' / training.START, **tolerances)

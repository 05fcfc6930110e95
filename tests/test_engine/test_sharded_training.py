"""Optimizer states and parameters in parts on several processes, against one process that has everything."""

import importlib.util
import subprocess

import nano_training as nano
import pytest
import torch
from tool_runs import REPOSITORY, environment, free_port

from swinv2_mm.checkpoints.files import read_checkpoint

SAVERS = ['ddp', 'zero1', 'fsdp']
DEEPSPEED = ['deepspeed_zero3'] if importlib.util.find_spec('deepspeed') else []  # more in test_deepspeed.py


@pytest.fixture(scope='module')
def data(tmp_path_factory):
    return nano.write_data(tmp_path_factory.mktemp('data'))


@pytest.fixture(scope='module')
def one_process(data, tmp_path_factory):
    """Trainings of one process on the joint batch of several; made when they are asked for, and once."""
    folders = {}

    def train(images: int):
        if images not in folders:
            folders[images] = tmp_path_factory.mktemp(f'one{images}')
            nano.train(folders[images], data, 'ddp', '--accumulate', images)
        return folders[images] / 'ddp'

    return train


@pytest.fixture(scope='module')
def two_processes(data, tmp_path_factory):
    folder = tmp_path_factory.mktemp('two')
    nano.train(folder, data, *SAVERS, processes=2)
    return folder


def weights(checkpoint) -> dict:
    return read_checkpoint(checkpoint)['state_dict']


def check_agreement(folder, reference, images, start, exact):
    """Losses of each image, norms of gradients and final weights are those of one process.

    Where gradients are summed up in another order, the trainings drift apart by rounding: a proposal that is kept here
    is dropped there. The first steps agree to fp32's precision then.
    """
    processes = len(nano.notes(folder, 'losses'))
    losses = nano.notes(folder, 'losses').view(processes, nano.STEPS, -1).permute(1, 2, 0).flatten(1)
    expected = nano.notes(reference, 'losses').view(nano.STEPS, images)
    norms = nano.notes(folder, 'norms')[0, :: images // processes]
    norms_expected = nano.notes(reference, 'norms')[0, ::images]
    assert (norms_expected > 5).any(), 'gradients were never clipped'
    initial = weights(start)
    (end,), (end_expected,) = (
        f.glob(f'iter_{nano.STEPS * n}.pth') for f, n in ((folder, images // processes), (reference, images))
    )
    found, wanted = weights(end), weights(end_expected)
    assert found.keys() == wanted.keys() == initial.keys()
    moved = sum((wanted[name] - initial[name]).double().square().sum() for name in wanted) ** 0.5
    apart = sum((wanted[name] - found[name]).double().square().sum() for name in wanted) ** 0.5
    if exact:
        assert torch.equal(losses, expected)
        assert torch.equal(norms, norms_expected)
        assert apart == 0
    else:
        torch.testing.assert_close(losses[:3], expected[:3], rtol=1e-5, atol=0)
        torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0)
        torch.testing.assert_close(norms[:3], norms_expected[:3], rtol=1e-4, atol=0)
        assert apart < 0.02 * moved


@pytest.mark.slow
@pytest.mark.parametrize('saver', SAVERS)
def test_two_processes_train_like_one(one_process, two_processes, data, saver):
    # the sum of two numbers is the same in any order
    check_agreement(two_processes / saver, one_process(2), 2, data / nano.START, exact=saver != 'fsdp')


@pytest.mark.slow
@pytest.mark.timeout(1200)  # of twice as many processes as many a machine has cores
def test_four_processes_train_like_one(one_process, data, tmp_path):
    savers = ['zero1', 'fsdp', *DEEPSPEED]
    nano.train(tmp_path, data, *savers, processes=4)
    for saver in savers:
        check_agreement(tmp_path / saver, one_process(4), 4, data / nano.START, exact=False)


@pytest.mark.slow
def test_gradients_accumulate_in_parts(one_process, data, tmp_path):
    nano.train(tmp_path, data, 'fsdp', '--accumulate', 2, processes=2)
    check_agreement(tmp_path / 'fsdp', one_process(4), 4, data / nano.START, exact=False)


@pytest.mark.slow
def test_a_process_holds_its_share(two_processes):
    whole = {key: nano.notes(two_processes / 'ddp', key) for key in ('parameters', 'states')}
    assert whole['states'][0].item() == pytest.approx(2 * whole['parameters'][0].item(), rel=1e-3)  # two moments
    for saver, split in (('zero1', ['states']), ('fsdp', ['parameters', 'states'])):
        for key in whole:
            share = nano.notes(two_processes / saver, key) / whole[key]
            expected = 1 / 2 if key in split else 1
            assert share.tolist() == pytest.approx([expected] * 2, rel=1e-3), (saver, key)


@pytest.mark.slow
@pytest.mark.parametrize('saver', ['zero1', 'fsdp'])
def test_checkpoints_are_those_of_an_ordinary_training(two_processes, saver):
    found, expected = (
        torch.load(two_processes / name / f'iter_{nano.STEPS}.pth', weights_only=True) for name in (saver, 'ddp')
    )
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


@pytest.mark.slow
@pytest.mark.parametrize('saver', SAVERS)
def test_a_killed_process_ends_the_others_and_the_resumed_training_is_the_same(two_processes, data, tmp_path, saver):
    kill_at = nano.STEPS // 2 + 1
    killed = nano.run(tmp_path, data, saver, processes=2, NANO_KILL=str(kill_at))
    assert killed.returncode != 0
    report = killed.stdout[killed.stdout.index('Root Cause') :]
    assert 'rank      : 1 ' in report
    assert 'SIGKILL' in report
    assert (tmp_path / saver / 'last_checkpoint').read_text().endswith(f'iter_{nano.STEPS // 2}.pth')
    assert not (tmp_path / saver / 'notes.pth').exists()

    nano.train(tmp_path, data, saver, '--resume', processes=2)
    assert nano.notes(tmp_path / saver, 'losses').shape == (2, nano.STEPS // 2), 'it began anew'
    check_same_weights(tmp_path / saver, two_processes / saver)


@pytest.fixture(scope='module')
def config_file(data, tmp_path_factory):
    """The training as a file for tools/train.py; `work_dir` is given on the command line."""
    folder = tmp_path_factory.mktemp('config')
    cfg = nano.config(folder / 'ddp', data)
    cfg.custom_imports = dict(imports=['nano_training'])
    cfg.dump(folder / 'nano.py')
    return folder / 'nano.py'


@pytest.mark.slow
def test_torchrun_starts_a_killed_training_again(two_processes, config_file, tmp_path):
    """With `--resume`, the first start takes the weights of `load_from`, the second the last checkpoint."""
    result = nano.torchrun(
        *('--max-restarts', 1, '--rdzv-backend', 'c10d', '--rdzv-endpoint', f'localhost:{free_port()}'),
        *(REPOSITORY / 'tools/train.py', config_file, '--launcher', 'pytorch', '--resume', '--work-dir', tmp_path),
        processes=2,
        NANO_KILL=str(nano.STEPS // 2 + 1),
        PYTHONPATH=str(REPOSITORY / 'tests'),
        TORCH_DISABLE_SHARE_RDZV_TCP_STORE='1',  # else the new processes find the addresses of the old ones
    )
    assert result.returncode == 0, result.stdout[-3000:]
    assert nano.notes(tmp_path, 'losses').shape == (2, nano.STEPS // 2), 'it was never killed, or began anew'
    check_same_weights(tmp_path, two_processes / 'ddp')


def check_same_weights(folder, expected):
    found, expected = (weights(f / f'iter_{nano.STEPS}.pth') for f in (folder, expected))
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.slow
def test_two_machines_train_like_two_processes_of_one(two_processes, config_file, tmp_path):
    """Each of two launchers believes that it is on a machine of its own."""
    place = environment(
        NNODES='2', MASTER_ADDR='127.0.0.1', PORT=str(free_port()), PYTHONPATH=str(REPOSITORY / 'tests')
    )
    machines = [
        subprocess.Popen(
            [REPOSITORY / 'tools/dist_train.sh', config_file, '1', '--work-dir', tmp_path],
            env=place | dict(NODE_RANK=str(rank)),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in range(2)
    ]
    logs = [machine.communicate()[0] for machine in machines]
    assert [machine.returncode for machine in machines] == [0, 0], logs[0][-2000:] + logs[1][-2000:]
    check_same_weights(tmp_path, two_processes / 'ddp')


@pytest.mark.slow
def test_averaged_weights_go_with_split_states_and_are_refused_for_split_parameters(data, tmp_path):
    nano.train(tmp_path, data, 'ddp', 'zero1', '--ema', '--steps', 2, processes=2)
    expected, found = (torch.load(tmp_path / saver / 'iter_2.pth', weights_only=True) for saver in ('ddp', 'zero1'))
    for key in ('state_dict', 'ema_state_dict'):
        assert all(torch.equal(a, b) for a, b in pairs(found, expected, key))
    assert any(
        not torch.equal(found['state_dict'][name], weights(data / nano.START)[name]) for name in found['state_dict']
    )

    # one process: two write into each other's lines
    arguments = (nano.__file__, tmp_path, data, 'fsdp', '--ema', '--steps', 2)
    refused = nano.torchrun('--master_port', free_port(), *arguments, processes=1)
    assert refused.returncode != 0
    assert 'leave the hook out, or split the optimizer states alone (configs/_base_/memory/zero1.py)' in refused.stdout


# a model of our blocks alone, split, beside the same one whole; on each process
SPLIT = """
import copy
import os
import torch
import torch.distributed as dist
from mmengine.model import BaseModel
from torch import nn
import swinv2_mm
from swinv2_mm.engine.sharding import FullyShardedModel
from swinv2_mm.models import SwinTransformerV2

class Model(BaseModel):
    def __init__(self):
        super().__init__()
        arch = dict(embed_dims=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
        self.backbone = SwinTransformerV2(arch=arch, window_size=4, with_cp=True, drop_path_rate=0.0)
    def forward(self, inputs, mode='loss'):
        return sum(out.square().mean() for out in self.backbone(inputs))

dist.init_process_group('gloo')
torch.set_num_threads(1)
rank = dist.get_rank()
torch.manual_seed(0)
whole = Model()
split = FullyShardedModel(copy.deepcopy(whole))
images = torch.randn(2, 3, 64, 64)
"""


def run_split(tmp_path, text):
    script = tmp_path / 'worker.py'
    # now and then a thread of gloo is still there when Python ends, which aborts the process
    script.write_text(SPLIT + text + '\ndist.barrier()\ndist.destroy_process_group()\nos._exit(0)\n')
    result = nano.torchrun('--master_port', free_port(), script, processes=2)
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.slow
def test_processes_test_different_numbers_of_images_and_train_on(tmp_path):
    run_split(
        tmp_path,
        """
for turn in range(2):
    split.eval()
    for _ in range(1 + 3 * rank):  # each process at its own pace
        with torch.no_grad():
            assert torch.equal(split(images), whole(images))
    split.train()
    assert sum(p.to_local().numel() for p in split.parameters()) < 0.51 * sum(p.numel() for p in whole.parameters())
    split(images[rank : rank + 1]).backward()
    split.zero_grad()
""",
    )


@pytest.mark.slow
def test_split_parameters_train_in_bf16_with_a_gradient_scaler(tmp_path):
    """What AmpOptimWrapper does, which itself needs a GPU: loss scaled, gradients unscaled, clipped, stepped."""
    run_split(
        tmp_path,
        """
def step(model, inputs):
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

initial = copy.deepcopy(whole)
norm = step(split, images[rank : rank + 1])
expected = step(nn.parallel.DistributedDataParallel(whole), images[rank : rank + 1])
assert expected > 0.1, 'nothing to clip'
assert abs(norm - expected) < 1e-5 * expected, (norm, expected)
for (name, p), q, start in zip(split.module.named_parameters(), whole.parameters(), initial.parameters(), strict=True):
    moved, apart = (q - start).norm(), (p.full_tensor() - q).norm()
    assert apart <= 1e-4 * moved, (name, moved, apart)
    assert p.to_local().dtype == torch.float32
""",
    )

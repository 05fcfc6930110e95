"""The tables and the command line of plan_memory."""

import argparse

import pytest
from mmengine.config import Config
from tool_runs import REPOSITORY, TOOLS, call, load_tool, refuse, run

from swinv2_mm.cli import memory_plan
from swinv2_mm.cli.memory import BackboneMemory

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmaction')

TOOL = 'analysis_tools/plan_memory.py'
CONFIGS = REPOSITORY / 'configs'
GIB = 2**30


@pytest.fixture(scope='module')
def plan():
    return load_tool(TOOLS / TOOL)


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def size(**changes):
    """Ten million parameters: eight million are trained, two of them outside of blocks of up to one million."""
    sizes = dict(parameters=40e6, trained=32e6, largest_block=4e6, rest=8e6, ema=0, optimizer=64e6)
    return memory_plan.ModelSize(**sizes | changes)


def rows(peak: float) -> list:
    memory = BackboneMemory([int(peak)], 0, 0, [])
    return [
        memory_plan.Activations('none', memory, 0, False),
        memory_plan.Activations('checkpointing', memory, 0, True),
    ]


def test_report_of_plan_memory_totals_and_marks(plan, monkeypatch):
    monkeypatch.setattr(plan, 'model_size', lambda cfg: size())
    cfg = read('seg/upernet_swinv2_demo.py')
    text = plan.report(cfg, (3, 128, 128), 8, 12.0, rows(10 * GIB))
    cells = text[text.index('Total') :].splitlines()[1].split()
    ddp, zero2 = 10 + 1.5 + 168e6 / GIB, 10 + 1.5 + 2056e6 / GIB
    assert cells[:3] == ['none', f'{ddp:.2f}', '+']
    assert f'{zero2:.2f}' in cells
    assert zero2 > 12
    assert cells[cells.index(f'{zero2:.2f}') + 1] != '+'
    marked = [line.split()[0] for line in text.splitlines() if line.endswith('<')]
    assert marked == ['checkpointing', 'DDP', 'checkpointing']


# ---------------------------------------------------------------- wrong inputs, and the command line


@pytest.mark.parametrize(
    ('arguments', 'changes', 'text'),
    [
        (dict(gpus=0), {}, '--gpus must be at least 1, got 0'),
        (dict(gpu_mem=0), {}, '--gpu-mem must be more than 0, got 0'),
        (dict(shape=[1, 2, 3]), {}, '--shape of an image takes one or two numbers'),
        ({}, {'default_scope': 'mmpose'}, "default_scope of the config must be one of .*, got 'mmpose'"),
        ({}, {'model.backbone.type': 'ResNet'}, "a backbone of swinv2_mm, got 'ResNet'"),
        ({}, {'model.backbone.window_size': 0}, 'window_size of stage 0 must be a number of at least 1'),
        ({}, {'optim_wrapper.optimizer.type': 'Lion'}, "the state of 'Lion' is not known; known are Adam, AdamW"),
    ],
)
def test_check_of_plan_memory_names_the_wrong_argument(plan, arguments, changes, text):
    cfg = read('seg/upernet_swinv2_demo.py')
    cfg.merge_from_dict(changes)
    args = argparse.Namespace(**dict(gpus=8, gpu_mem=40.0, shape=None) | arguments)
    with pytest.raises(ValueError, match=text):
        plan.check(args, cfg)


DEMO = [CONFIGS / 'video/swinv2_demo.py', '--gpus', '4', '--shape', '8', '64', '64']


def check_plan(printed):
    assert '8 x 1 3 8 64 64 on each of 4 GPUs of 40 GiB, bfloat16' in printed
    assert printed.count(' <\n') == 3


def test_plan_memory_prints_tables(tmp_path):
    check_plan(call(tmp_path, TOOL, *DEMO))


def test_plan_memory_refuses_a_config_in_one_line(tmp_path):
    assert 'the config has no fixed training size' in refuse(
        tmp_path, TOOL, CONFIGS / 'det/cascade_mask_rcnn_swinv2_t.py'
    )
    assert refuse(tmp_path, TOOL, 'no.py').startswith('error: config no.py does not ')


@pytest.mark.slow
def test_plan_memory_runs_in_any_folder(tmp_path):
    check_plan(run(tmp_path, TOOL, *DEMO))

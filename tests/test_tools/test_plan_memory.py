"""The tables and the command line of plan_memory, and the benchmark of memory."""

import argparse
import json
import math
from concurrent.futures import Future

import cv2
import pytest
import torch
from mmengine.config import Config
from tool_runs import BENCHMARKS, REPOSITORY, TOOLS, call, load_tool, refuse, run

from swinv2_mm.cli import memory_plan
from swinv2_mm.cli.memory import BackboneMemory
from swinv2_mm.models import SwinTransformerV2

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')
pytest.importorskip('mmaction')

TOOL, BENCHMARK = 'analysis_tools/plan_memory.py', BENCHMARKS / 'benchmark_memory.py'
CONFIGS = REPOSITORY / 'configs'
GIB = 2**30


@pytest.fixture(scope='module')
def plan():
    return load_tool(TOOLS / TOOL)


def read(name: str) -> Config:
    return Config.fromfile(CONFIGS / name)


def size(**changes):
    """Ten million parameters, eight million of them trained, in blocks of at most one million but for two."""
    sizes = dict(parameters=40e6, trained=32e6, largest_block=4e6, rest=8e6, ema=0, optimizer=64e6)
    return memory_plan.ModelSize(**sizes | changes)


def rows(peak: float) -> list:
    memory = BackboneMemory([int(peak)], 0, 0, [])
    return [
        memory_plan.Activations('none', memory, 0, False),
        memory_plan.Activations('checkpointing', memory, 0, True),
    ]


def test_report_adds_up_and_marks_what_fits_and_the_settings_of_the_config(plan, monkeypatch):
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
def test_check_names_the_wrong_argument(plan, arguments, changes, text):
    cfg = read('seg/upernet_swinv2_demo.py')
    cfg.merge_from_dict(changes)
    args = argparse.Namespace(**dict(gpus=8, gpu_mem=40.0, shape=None) | arguments)
    with pytest.raises(ValueError, match=text):
        plan.check(args, cfg)


DEMO = [CONFIGS / 'video/swinv2_demo.py', '--gpus', '4', '--shape', '8', '64', '64']


def check_plan(printed):
    assert '8 x 1 3 8 64 64 on each of 4 GPUs of 40 GiB, bfloat16' in printed
    assert printed.count(' <\n') == 3


def test_plan_memory_prints_its_tables(tmp_path):
    check_plan(call(tmp_path, TOOL, *DEMO))


def test_plan_memory_refuses_a_config_in_one_line(tmp_path):
    assert 'the config has no fixed training size' in refuse(
        tmp_path, TOOL, CONFIGS / 'det/cascade_mask_rcnn_swinv2_t.py'
    )
    assert refuse(tmp_path, TOOL, 'no.py').startswith('error: config no.py does not ')


@pytest.mark.slow
def test_plan_memory_runs_in_any_folder(tmp_path):
    check_plan(run(tmp_path, TOOL, *DEMO))


# ---------------------------------------------------------------- the benchmark of memory


@pytest.fixture(scope='module')
def benchmark():
    return load_tool(BENCHMARK)


def test_the_slope_is_the_power_of_the_pixels(benchmark):
    rows = [dict(task='training', side=side, seconds=side**2 / 7, bytes=3.0 * side**4) for side in (64, 96, 128)]
    rows.append(dict(task='inference', side=64, seconds=1.0, bytes=1.0))
    assert benchmark.slope(rows, 'training', 'seconds') == pytest.approx(1)
    assert benchmark.slope(rows, 'training', 'bytes') == pytest.approx(2)


TECHNIQUES = ('none', 'sequential', 'checkpointing', 'both', 'sdpa', 'sdpa + checkpointing')


@pytest.fixture(scope='module')
def forecasts(benchmark):
    """Peaks of a small backbone by technique, and a function that makes one."""

    def make(technique):
        return lambda: benchmark.build(dict(embed_dims=32, depths=(1, 2), num_heads=(1, 2)), 4, technique)

    return {
        technique: (benchmark.forecast(make(technique), 64, gpu=False), make(technique)) for technique in TECHNIQUES
    }


@pytest.mark.parametrize('technique', TECHNIQUES)
def test_the_forecast_of_the_benchmark_is_what_it_measures(benchmark, forecasts, technique):
    forecast, make = forecasts[technique]
    torch.manual_seed(0)
    for _ in range(2):  # the first one makes the indices of the windows, which stay for all models
        measured = benchmark.measured_peak(*benchmark.ready(make(), 64))
    assert measured == forecast


def test_each_technique_takes_less_memory_than_none(forecasts):
    peaks = {technique: peak for technique, (peak, _) in forecasts.items()}
    assert max(peaks, key=peaks.get) == 'none'
    assert len(set(peaks.values())) == len(peaks)


def test_a_part_is_the_block_of_swinv2_g(benchmark):
    """The stage's channels, heads and map, as the whole network has them."""
    with torch.device('meta'):
        whole = SwinTransformerV2('giant', window_size=32)
        for stage, name in ((0, 'block of stage 1'), (2, 'block of stage 3')):
            (block,) = benchmark.part(name, 'none').layers[0].blocks
            expected = whole.layers[stage].blocks[0]
            assert [(n, p.shape) for n, p in block.named_parameters()] == [
                (n, p.shape) for n, p in expected.named_parameters()
            ]
            assert benchmark.PARTS[name][1] == 4 * 2**stage


@pytest.mark.parametrize(
    ('changes', 'error', 'text'),
    [
        (dict(repeats=0), ValueError, '--repeats must be at least 1, got 0'),
        (dict(window=0), ValueError, '--window must be at least 1, got 0'),
        (dict(sizes=[64, 64]), ValueError, '--sizes must be at least two different positive numbers'),
        (dict(plot='a.png'), ValueError, '--plot draws the results of --task sizes, not of --task techniques'),
        (dict(task='full'), ValueError, '--task full needs a GPU'),
        (dict(techniques=['sdpa', 'triton']), ValueError, '--techniques triton needs a GPU'),
        (dict(resume=True), ValueError, '--resume needs --json'),
        (dict(json='/no/where/a.json'), FileNotFoundError, 'there is no folder /no/where for a.json'),
    ],
)
def test_wrong_arguments_of_the_benchmark_are_named(benchmark, monkeypatch, changes, error, text):
    monkeypatch.setattr(benchmark, 'DEVICE', 'cpu')
    args = dict(
        task='techniques', techniques=None, repeats=1, window=8, sizes=[64, 128], json=None, resume=False, plot=None
    )
    with pytest.raises(error, match=text):
        benchmark.check(argparse.Namespace(**args | changes))


def test_measure_techniques_skips_those_that_were_measured(benchmark, monkeypatch):
    class Here:
        """Runs in this process what else gets one of its own."""

        def __init__(self, *args, **kwargs):
            pass

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def submit(self, function, *args):
            measured.append(args[1])
            future = Future()
            future.set_result(function(*args))
            return future

    measured, kept = [], []
    monkeypatch.setattr(benchmark, 'DEVICE', 'cpu')
    monkeypatch.setattr(benchmark, 'G_SIZE', 64)
    monkeypatch.setattr(benchmark, 'ProcessPoolExecutor', Here)
    rows = [dict(part='nano', technique='sdpa', size=64, seconds=1.0)]
    benchmark.measure_techniques(
        benchmark.TASKS['nano'], ['sdpa', 'both'], 1, rows, lambda rows: kept.append(list(rows))
    )
    assert measured == ['both']
    assert [row['technique'] for row in rows] == ['sdpa', 'both']
    assert len(kept[0]) == 2
    assert rows[1]['tracked'] == rows[1]['forecast'] > 0
    assert rows[1]['seconds'] > 0


SIZES = ['--task', 'sizes', '--window', '8', '--repeats', '1', '--json', 'out.json', '--plot', 'out.png', '--sizes']


def check_sizes(folder, printed, *sides):
    rows = json.loads((folder / 'out.json').read_text())
    expected = [(task, side) for task in ('inference', 'training') for side in sides]
    assert [(row['task'], row['side']) for row in rows] == expected
    small, large = (row['bytes'] for row in rows[2:])
    power = math.log(large / small) / math.log(sides[1] ** 2 / sides[0] ** 2)
    assert 'training grows with: seconds' in printed
    assert f'bytes {power:.2f}' in printed
    assert cv2.imread(str(folder / 'out.png')).std() > 1
    return power


def test_time_and_memory_of_growing_inputs_are_printed_written_and_drawn(tmp_path):
    check_sizes(tmp_path, call(tmp_path, BENCHMARK, *SIZES, '32', '64'), 32, 64)


@pytest.mark.slow
def test_memory_of_training_grows_with_the_pixels(tmp_path):
    assert 0.8 < check_sizes(tmp_path, run(tmp_path, BENCHMARK, *SIZES, '256', '384'), 256, 384) < 1.1

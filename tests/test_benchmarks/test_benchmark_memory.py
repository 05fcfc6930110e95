"""The benchmark of memory: its forecast against what it measures, its parts, and its command line."""

import argparse
import json
import math
from concurrent.futures import Future

import cv2
import pytest
import torch
from tool_runs import BENCHMARKS, call, load_tool, run

from swinv2_mm.models import SwinTransformerV2

BENCHMARK = BENCHMARKS / 'benchmark_memory.py'


@pytest.fixture(scope='module')
def benchmark():
    return load_tool(BENCHMARK)


def test_slope_is_the_power_of_the_pixels(benchmark):
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
def test_forecast_is_the_measured_peak(benchmark, forecasts, technique):
    forecast, make = forecasts[technique]
    torch.manual_seed(0)
    for _ in range(2):  # the first one makes the indices of the windows, which stay for all models
        measured = benchmark.measured_peak(*benchmark.ready(make(), 64))
    assert measured == forecast


def test_forecast_each_technique_saves_memory(forecasts):
    peaks = {technique: peak for technique, (peak, _) in forecasts.items()}
    assert max(peaks, key=peaks.get) == 'none'
    assert len(set(peaks.values())) == len(peaks)


def test_part_is_a_block_of_swinv2_g(benchmark):
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
def test_check_names_wrong_arguments(benchmark, monkeypatch, changes, error, text):
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


def test_sizes_are_printed_written_and_drawn(tmp_path):
    check_sizes(tmp_path, call(tmp_path, BENCHMARK, *SIZES, '32', '64'), 32, 64)


@pytest.mark.slow
def test_sizes_memory_grows_with_the_pixels(tmp_path):
    assert 0.8 < check_sizes(tmp_path, run(tmp_path, BENCHMARK, *SIZES, '256', '384'), 256, 384) < 1.1

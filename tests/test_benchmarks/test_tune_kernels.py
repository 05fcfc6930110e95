"""The tool that finds the fastest blocks of the Triton kernels, in Triton's interpreter."""

import json

import pytest
import torch
import triton_interpreter
from tool_runs import BENCHMARKS, call, load_tool, run

from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import tiles
from swinv2_mm.ops.triton.launch import Launch, compile_launches, recorded
from swinv2_mm.ops.triton.tiles import TileConfig

TOOL = BENCHMARKS / 'tune_kernels.py'
tune_kernels = load_tool(TOOL)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU the tool is run as it is')


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """A faster interpreter."""
    triton_interpreter.patch(monkeypatch)


@pytest.fixture
def made_up_times(monkeypatch):
    """The more threads the better, and the fewer stages."""

    def time_kernel(problem, kernel):
        tile = triton_backend.choose_tiles(kernel)
        return 10.0 / tile.warps + tile.stages

    monkeypatch.setattr(tune_kernels, 'time_kernel', time_kernel)


OPTIONS = ['--windows', '4x4', '--dtypes', 'float32', '--head-dim', '16', '--candidates', '3', '--out', 'tiles.json']


def tile_of(kernel):
    """The tiles that a kernel would run with now."""
    return triton_backend.choose_tiles(kernel, 16, 16, torch.float32, torch.device('cpu'))


def spoil(monkeypatch, is_spoilt):
    """Let the kernels give NaN in the place of a result where `is_spoilt()`."""
    run = tune_kernels.Problem.run

    def spoilt(problem):
        results = run(problem)
        if is_spoilt():
            results['grad of v'][..., 0] = torch.nan
        return results

    monkeypatch.setattr(tune_kernels.Problem, 'run', spoilt)


@pytest.mark.usefixtures('made_up_times')
def test_the_fastest_right_tiles_are_kept(monkeypatch, tmp_path):
    """And a call goes on where another has stopped."""
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    kernel = problem.kernels()[0]
    options = [*OPTIONS, '--kernels', kernel, '--times', 'times.json']
    times = {tile: 10.0 / tile.warps + tile.stages for tile in tune_kernels.candidates(kernel, problem, 3)}
    fastest = min(times, key=times.get)
    spoil(monkeypatch, lambda: tile_of(kernel) == fastest)
    stored = {'another GPU': {'forward 64 32 torch.float16': [64, 64, 4, 2]}}
    (tmp_path / 'tiles.json').write_text(json.dumps(stored))
    printed = call(tmp_path, TOOL, *options)
    assert f'{kernel}: {fastest} is left out: gives another grad of v' in printed
    assert f'| 4x4 | float32 | {kernel} | 3 |' in printed
    del times[fastest]
    kept = json.loads((tmp_path / 'tiles.json').read_text())
    assert kept['another GPU'] == stored['another GPU']
    ((key, best),) = kept['interpreter'].items()
    assert key == f'{kernel} 16 16 torch.float32'
    best = tuple(best)
    assert times[best] == min(times.values())
    measured = json.loads((tmp_path / 'times.json').read_text())['interpreter'][key]
    assert measured['ms'] == {', '.join(map(str, tile)): time for tile, time in times.items()}
    assert '| 4x4 |' not in call(tmp_path, TOOL, *options)
    assert f'| 4x4 | float32 | {kernel} |' in call(tmp_path, TOOL, *options, '--again')


@pytest.mark.usefixtures('made_up_times')
def test_nothing_is_kept_where_no_result_is_right(monkeypatch, tmp_path):
    spoil(monkeypatch, lambda: True)
    monkeypatch.chdir(tmp_path)
    assert tune_kernels.main(OPTIONS) == 1
    assert not (tmp_path / 'tiles.json').exists()


class Kernel:
    """Stands in for one of Triton: it compiles to what it is given, or raises it."""

    __name__ = 'forward'

    def __init__(self, compiled):
        self.compiled = compiled

    def warmup(self, *args, grid, **constants):
        if isinstance(self.compiled, Exception):
            raise self.compiled
        return self.compiled


class Compiled:
    """Stands in for machine code that spills so many words, and fits or not."""

    def __init__(self, n_spills, error=None):
        self.n_spills, self.error = n_spills, error

    def _init_handles(self):
        if self.error:
            raise self.error


@pytest.mark.parametrize(
    ('compiled', 'reason'),
    [
        (Compiled(16), None),
        (Compiled(17), 'spills 68 bytes'),
        (Compiled(0, RuntimeError('out of resource: shared memory')), 'RuntimeError: out of resource: shared memory'),
        (AssertionError(), 'AssertionError: '),
        (ValueError('no layout\nfor this'), 'ValueError: no layout'),
    ],
)
def test_tiles_that_cannot_run_say_why(compiled, reason):
    arguments = (torch.empty(1),), {'num_warps': 4}
    results = compile_launches([Launch(Kernel(kernel), 1, *arguments) for kernel in (Compiled(0), compiled)])
    assert [tune_kernels.reject(result) for result in results] == [None, reason]


@pytest.mark.usefixtures('made_up_times')
def test_tiles_that_do_not_compile_are_not_run(monkeypatch, tmp_path):
    def launches(problem, kernel, run=False):
        found = former(problem, kernel, run)
        fails = tile_of(kernel).warps == 8
        return [Launch(Kernel(RuntimeError('PTXAS error')), *launch[1:]) if fails else launch for launch in found]

    former = tune_kernels.Problem.launches
    monkeypatch.setattr(tune_kernels.Problem, 'launches', launches)
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    monkeypatch.setattr(problem, 'wrong', lambda: [])
    kernel = problem.kernels()[0]
    tiles_tried = [TileConfig(16, 16, warps, 1) for warps in (4, 8)]
    assert list(tune_kernels.tune(problem, kernel, tiles_tried)) == tiles_tried[:1]


def test_only_the_launches_of_the_kernel_are_timed(monkeypatch):
    problem = tune_kernels.Problem((9, 8), 16, torch.float32)
    kernel, *others = problem.kernels()
    assert len(others) == 3
    timed = []
    monkeypatch.setattr(tune_kernels, 'launch', lambda kernel, *args, **constants: timed.append(kernel.__name__))
    assert tune_kernels.time_kernel(problem, kernel) >= 0
    assert set(timed) == {kernel}


def test_launches_that_are_recorded_run_if_that_is_asked():
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    with recorded(run=True) as launches:
        found = problem.run()
    assert launches
    assert torch.equal(found['out'], problem.run()['out'])


def test_what_was_measured_is_chosen_for_its_gpu_alone(monkeypatch, tmp_path):
    file = tmp_path / 'tiles.json'
    entries = {'forward 144 32 torch.bfloat16': [64, 32, 8, 3], 'forward 576 32 torch.bfloat16': [128, 64, 8, 2]}
    file.write_text(json.dumps({'a GPU': entries}))
    monkeypatch.setattr(tiles, 'TUNED', file)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'a{device.index or ""} GPU')
    tiles._tuned.cache_clear()

    def choose(tokens, device='cuda', dtype=torch.bfloat16, head_dim=32, kernel='forward'):
        return tiles.choose_tiles(kernel, tokens, head_dim, dtype, torch.device(device))

    assert choose(144) == choose(81) == (64, 32, 8, 3)
    assert choose(256) == choose(576) == choose(4096) == (128, 64, 8, 2)
    assert choose(144, head_dim=24) == (64, 32, 8, 3)  # the same tiles as 32
    for other in (dict(device='cuda:1'), dict(device='cpu'), dict(dtype=torch.float16), dict(kernel='bwd_dq')):
        chosen = choose(576, **other)
        assert chosen == tiles.default_tiles(other.get('kernel', 'forward'), 576, 32, other.get('dtype', torch.float16))
    tiles._tuned.cache_clear()


@pytest.mark.parametrize(
    ('window', 'dtype'), [((2, 3), torch.float32), ((2, 3), torch.bfloat16), ((9, 8), torch.bfloat16)]
)
def test_results_are_right_whose_errors_rounding_explains(monkeypatch, window, dtype):
    """And none of which a single number is missing, or off by a quarter of the largest."""
    problem = tune_kernels.Problem(window, 16, dtype)
    results = problem.run()
    assert problem.wrong() == []
    assert len(problem.expected) == 6
    for name, value in results.items():
        for wrong in (torch.nan, value.flatten()[0] + 0.25 * value.abs().max()):
            spoilt = value.clone()
            spoilt.view(-1)[0] = wrong
            monkeypatch.setattr(problem, 'run', lambda name=name, spoilt=spoilt: results | {name: spoilt})
            assert problem.wrong() == [name]


def test_it_stops_when_its_time_is_over(tmp_path):
    printed = call(tmp_path, TOOL, *OPTIONS, '--minutes', 0)
    assert ' of 4x4 and what follows: no time left of 0 minutes' in printed
    assert not (tmp_path / 'tiles.json').exists()


@pytest.mark.parametrize('window', ['0x4', '4x4x4x4', 'axb'])
def test_windows_that_are_none_are_named(window, capsys):
    with pytest.raises(SystemExit):
        tune_kernels.main(['--windows', window])
    assert f'{window!r} is no window of up to 3 axes; write it as in 24x24' in capsys.readouterr().err


def test_without_a_gpu_it_says_how_it_can_be_tried(monkeypatch, capsys):
    monkeypatch.delenv('TRITON_INTERPRET')
    with pytest.raises(SystemExit):
        tune_kernels.main([])
    assert 'there is no GPU to tune kernels for; TRITON_INTERPRET=1 tries' in capsys.readouterr().err


@pytest.mark.slow
def test_the_tool_can_be_tried_without_a_gpu(tmp_path):
    printed = run(tmp_path, TOOL, *OPTIONS, TRITON_INTERPRET='1')
    kernels = tune_kernels.Problem((4, 4), 16, torch.float32).kernels()
    assert all(f'| 4x4 | float32 | {kernel} | 4 |' in printed for kernel in kernels)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('tokens', [49, 64, 144, 576, 4096])
@pytest.mark.parametrize('kernel', tiles.KERNELS)
def test_candidates_are_tiles_that_differ(kernel, tokens, dtype):
    found = list(tiles.candidates(kernel, tokens, 32, dtype))
    assert 1 < len(found) == len(set(found))
    assert all(side & (side - 1) == 0 <= tiles.SMALLEST <= side for c in found for side in (c.block_m, c.block_n))

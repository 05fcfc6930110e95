"""The tuning of the tiles of the Triton kernels, in Triton's interpreter."""

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

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU the command itself is run')


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """A faster interpreter."""
    triton_interpreter.patch(monkeypatch)


@pytest.fixture
def made_up_times(monkeypatch):
    """Times that fall with the number of warps and rise with the number of stages."""

    def time_kernel(problem, kernel):
        tile = triton_backend.choose_tiles(kernel)
        return 10.0 / tile.warps + tile.stages

    monkeypatch.setattr(tune_kernels, 'time_kernel', time_kernel)


OPTIONS = ['--windows', '4x4', '--dtypes', 'float32', '--head-dim', '16', '--candidates', '3', '--out', 'tiles.json']


def tile_of(kernel):
    """The tiles that a kernel would run with."""
    return triton_backend.choose_tiles(kernel, 16, 16, torch.float32, torch.device('cpu'))


def corrupt(monkeypatch, is_corrupt):
    """Make the kernels return NaN in one result if `is_corrupt()`."""
    run = tune_kernels.Problem.run

    def corrupted(problem):
        results = run(problem)
        if is_corrupt():
            results['grad of v'][..., 0] = torch.nan
        return results

    monkeypatch.setattr(tune_kernels.Problem, 'run', corrupted)


@pytest.mark.usefixtures('made_up_times')
def test_main_stores_the_fastest_correct_tiles(monkeypatch, tmp_path):
    """Another call continues."""
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    kernel = problem.kernels()[0]
    options = [*OPTIONS, '--kernels', kernel, '--times', 'times.json']
    times = {tile: 10.0 / tile.warps + tile.stages for tile in tune_kernels.candidates(kernel, problem, 3)}
    fastest = min(times, key=times.get)
    corrupt(monkeypatch, lambda: tile_of(kernel) == fastest)
    stored = {'another GPU': {'forward 64 32 torch.float16': [64, 64, 4, 2]}}
    (tmp_path / 'tiles.json').write_text(json.dumps(stored))
    printed = call(tmp_path, TOOL, *options)
    assert f'{kernel}: {fastest} is rejected: wrong grad of v' in printed
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
def test_main_stores_nothing_if_all_results_are_wrong(monkeypatch, tmp_path):
    corrupt(monkeypatch, lambda: True)
    monkeypatch.chdir(tmp_path)
    assert tune_kernels.main(OPTIONS) == 1
    assert not (tmp_path / 'tiles.json').exists()


class Kernel:
    """A fake Triton kernel: its compilation returns `compiled`, or raises it."""

    __name__ = 'forward'

    def __init__(self, compiled):
        self.compiled = compiled

    def warmup(self, *args, grid, **constants):
        if isinstance(self.compiled, Exception):
            raise self.compiled
        return self.compiled


class Compiled:
    """Fake machine code that spills `n_spills` words; loading it may raise an error."""

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
def test_reject_gives_the_reason(compiled, reason):
    arguments = (torch.empty(1),), {'num_warps': 4}
    results = compile_launches([Launch(Kernel(kernel), 1, *arguments) for kernel in (Compiled(0), compiled)])
    assert [tune_kernels.reject(result) for result in results] == [None, reason]


@pytest.mark.usefixtures('made_up_times')
def test_tune_does_not_run_tiles_that_do_not_compile(monkeypatch, tmp_path):
    def launches(problem, kernel, run=False):
        found = original(problem, kernel, run)
        fails = tile_of(kernel).warps == 8
        return [Launch(Kernel(RuntimeError('PTXAS error')), *launch[1:]) if fails else launch for launch in found]

    original = tune_kernels.Problem.launches
    monkeypatch.setattr(tune_kernels.Problem, 'launches', launches)
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    monkeypatch.setattr(problem, 'wrong', lambda: [])
    kernel = problem.kernels()[0]
    tiles_tried = [TileConfig(16, 16, warps, 1) for warps in (4, 8)]
    assert list(tune_kernels.tune(problem, kernel, tiles_tried)) == tiles_tried[:1]


def test_time_kernel_times_only_the_launches_of_the_kernel(monkeypatch):
    problem = tune_kernels.Problem((9, 8), 16, torch.float32)
    kernel, *others = problem.kernels()
    assert len(others) == 3
    timed = []
    monkeypatch.setattr(tune_kernels, 'launch', lambda kernel, *args, **constants: timed.append(kernel.__name__))
    assert tune_kernels.time_kernel(problem, kernel) >= 0
    assert set(timed) == {kernel}


def test_recorded_launches_run_with_run():
    problem = tune_kernels.Problem((4, 4), 16, torch.float32)
    with recorded(run=True) as launches:
        found = problem.run()
    assert launches
    assert torch.equal(found['out'], problem.run()['out'])


def test_choose_tiles_uses_stored_tiles_only_for_their_gpu(monkeypatch, tmp_path):
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
def test_wrong_allows_rounding_errors(monkeypatch, window, dtype):
    """But not one element that is NaN, or off by a quarter of the largest value."""
    problem = tune_kernels.Problem(window, 16, dtype)
    results = problem.run()
    assert problem.wrong() == []
    assert len(problem.expected) == 6
    for name, value in results.items():
        for wrong in (torch.nan, value.flatten()[0] + 0.25 * value.abs().max()):
            corrupted = value.clone()
            corrupted.view(-1)[0] = wrong
            monkeypatch.setattr(problem, 'run', lambda name=name, value=corrupted: results | {name: value})
            assert problem.wrong() == [name]


def test_main_stops_after_the_minutes(tmp_path):
    printed = call(tmp_path, TOOL, *OPTIONS, '--minutes', 0)
    assert ' of 4x4 and all after it: not tuned: --minutes 0 is over' in printed
    assert not (tmp_path / 'tiles.json').exists()


@pytest.mark.parametrize('window', ['0x4', '4x4x4x4', 'axb'])
def test_check_names_a_wrong_window(window, capsys):
    with pytest.raises(SystemExit):
        tune_kernels.main(['--windows', window])
    assert f'{window!r} is not a window of up to 3 axes; write it as in 24x24' in capsys.readouterr().err


def test_check_names_the_interpreter_without_a_gpu(monkeypatch, capsys):
    monkeypatch.delenv('TRITON_INTERPRET')
    with pytest.raises(SystemExit):
        tune_kernels.main([])
    assert 'there is no GPU to tune kernels for; TRITON_INTERPRET=1 tries' in capsys.readouterr().err


@pytest.mark.slow
def test_command_runs_without_a_gpu(tmp_path):
    printed = run(tmp_path, TOOL, *OPTIONS, TRITON_INTERPRET='1')
    kernels = tune_kernels.Problem((4, 4), 16, torch.float32).kernels()
    assert all(f'| 4x4 | float32 | {kernel} | 4 |' in printed for kernel in kernels)


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('tokens', [49, 64, 144, 576, 4096])
@pytest.mark.parametrize('kernel', tiles.KERNELS)
def test_candidates_differ(kernel, tokens, dtype):
    found = list(tiles.candidates(kernel, tokens, 32, dtype))
    assert 1 < len(found) == len(set(found))
    assert all(side & (side - 1) == 0 <= tiles.SMALLEST <= side for c in found for side in (c.block_m, c.block_n))

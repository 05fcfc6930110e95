"""The tool that finds the fastest blocks of the Triton kernels, in Triton's interpreter."""

import json

import pytest
import torch
import triton_interpreter
from tool_runs import TOOLS, call, load_tool, run

from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import tiles
from swinv2_mm.ops.triton.tiles import TileConfig

TOOL = 'analysis_tools/tune_kernels.py'
tune_kernels = load_tool(TOOLS / TOOL)

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason='on a GPU the tool is run as it is')


@pytest.fixture(autouse=True)
def interpreter(monkeypatch):
    """Small problems in the interpreter."""
    triton_interpreter.mend(monkeypatch)
    monkeypatch.setattr(tune_kernels, 'HEADS', 1)
    monkeypatch.setattr(tune_kernels, 'INTERPRETED', 1)


def test_the_fastest_blocks_are_kept_and_then_chosen(monkeypatch, tmp_path):
    """Times are made up: the more threads the better, but for one that gives a wrong result."""
    wrong, kernel_attend = TileConfig(32, 32, 8, 1), triton_backend.attend

    def attend(*args):
        out, log_sums = kernel_attend(*args)
        return out + (
            triton_backend.choose_tiles() == wrong if hasattr(triton_backend.choose_tiles, 'return_value') else 0
        ), log_sums

    monkeypatch.setattr(triton_backend, 'attend', attend)
    monkeypatch.setattr(
        tune_kernels,
        'milliseconds',
        lambda call: call() and 10.0 / triton_backend.choose_tiles().warps + triton_backend.choose_tiles().stages,
    )
    file = tmp_path / 'tiles.json'
    file.write_text('{"another GPU": {"attend 64 32 torch.float16": [64, 64, 4, 2]}}')
    printed = call(tmp_path, TOOL, '--windows', '4x4', '--dtypes', 'float32', '--head-dim', 16, '--out', file)
    assert f'attend: {wrong} gives other results' in printed
    assert '| 4x4 | float32 | attend | 7 | 4.500 | 3.250 | 32, 32, 8, 2 |' in printed
    assert '| 4x4 | float32 | grad_all | 7 |' in printed
    kept = json.loads(file.read_text())
    assert kept == {
        'another GPU': {'attend 64 32 torch.float16': [64, 64, 4, 2]},
        'interpreter': {'attend 16 16 torch.float32': [32, 32, 8, 2], 'grad_all 16 16 torch.float32': [32, 32, 8, 1]},
    }


def test_what_was_measured_is_chosen_for_its_gpu_alone(monkeypatch, tmp_path):
    file = tmp_path / 'tiles.json'
    entries = {'attend 64 32 torch.bfloat16': [64, 32, 8, 3], 'attend 576 32 torch.bfloat16': [128, 64, 8, 2]}
    file.write_text(json.dumps({'a GPU': entries}))
    monkeypatch.setattr(tiles, 'TUNED', file)
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: f'a{device.index or ""} GPU')
    tiles._tuned.cache_clear()

    def choose(tokens, device='cuda', dtype=torch.bfloat16, head_dim=32, kernel='attend'):
        return tiles.choose_tiles(kernel, tokens, head_dim, dtype, torch.device(device))

    assert choose(64) == choose(49) == (64, 32, 8, 3)
    assert choose(16) == (16, 16, 8, 3)  # no larger than the window
    assert choose(144) == choose(576) == choose(4096) == (128, 64, 8, 2)
    assert choose(64, head_dim=24) == (64, 32, 8, 3)  # the same tiles as 32
    for other in (dict(device='cuda:1'), dict(device='cpu'), dict(dtype=torch.float16), dict(kernel='grad_keys')):
        chosen = choose(576, **other)
        assert chosen == tiles.default_tiles(other.get('kernel', 'attend'), 576, 32, other.get('dtype', torch.float16))
    tiles._tuned.cache_clear()


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
def test_blocks_are_right_whose_errors_rounding_explains(monkeypatch, dtype):
    """And none where a single number of any result is missing, or off by a quarter of the largest."""
    problem = tune_kernels.Problem((2, 3), 16, dtype)
    compared = set()
    for kernel, names in tune_kernels.RESULTS.items():
        assert problem.is_right(kernel), kernel
        results = [t.clone() for t in problem.run(kernel)]
        for place, name in enumerate(names):
            compared.add(name)
            for wrong in (torch.nan, results[place].flatten()[0] + 0.25 * results[place].abs().max()):
                spoilt = [t.clone() for t in results]
                spoilt[place].view(-1)[0] = wrong
                with monkeypatch.context() as patch:
                    patch.setattr(problem, 'run', lambda kernel, spoilt=spoilt: spoilt)
                    assert not problem.is_right(kernel), (name, wrong)
    assert compared == problem.expected.keys()


def test_blocks_that_write_nothing_are_not_right(monkeypatch):
    problem = tune_kernels.Problem((2,), 16, torch.float32)
    assert problem.is_right('grad_keys')
    monkeypatch.setattr(triton_backend, 'grad_keys', lambda *_: None)
    assert not problem.is_right('grad_keys')


def test_it_stops_when_its_time_is_over(tmp_path):
    printed = call(tmp_path, TOOL, '--windows', '4x4', '--minutes', 0, '--out', tmp_path / 'tiles.json')
    assert 'attend of 4x4 and what follows: no time left of 0 minutes' in printed
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
    options = '--windows 16 --kernels attend --dtypes float32 --head-dim 16 --out tiles.json'
    printed = run(tmp_path, TOOL, *options.split(), TRITON_INTERPRET='1')
    assert '| 16 | float32 | attend | 7 |' in printed
    assert list(json.loads((tmp_path / 'tiles.json').read_text())['interpreter']) == ['attend 16 16 torch.float32']


@pytest.mark.parametrize('tokens', [49, 64, 144, 576, 4096])
@pytest.mark.parametrize('kernel', tiles.KERNELS)
def test_candidates_can_run_a_window(kernel, tokens):
    found = list(tiles.candidates(kernel, tokens))
    assert len(found) == len(set(found))
    assert all(c.block & (c.block - 1) == 0 <= tiles.SMALLEST <= c.step for c in found)
    assert found or (kernel == 'grad_all' and tokens > 128)

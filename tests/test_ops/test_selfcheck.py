"""The self-check of `auto` before it takes `triton`, with other functions in place of the kernels.

`test_triton.py` runs it on the kernels.
"""

import itertools
import json
import logging
import os
import subprocess
import sys
import threading

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip('triton')
import triton

from swinv2_mm.ops import sdpa, window_attention
from swinv2_mm.ops import selfcheck as command
from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import post_norm, selfcheck
from swinv2_mm.ops.triton.launch import Launch, compile_launches, launch, recorded

module = sys.modules['swinv2_mm.ops.window_attention']  # the package shows the function under this name


class Kernels:
    """Results of `sdpa`; one may be wrong: 0 is the output, the others are the gradients of the inputs."""

    def __init__(self, wrong=None, error=0.0):
        self.wrong, self.error, self.calls = wrong, error, 0

    def __call__(self, *inputs, sequential=False):
        self.calls += 1
        if isinstance(self.error, Exception):
            raise self.error
        *inputs, window, shift = inputs
        inputs = [t.clone() for t in inputs]
        if self.wrong:
            inputs[self.wrong - 1].register_hook(self.spoil)
        out = sdpa.sdpa_window_attention(*inputs, window, shift)
        return self.spoil(out) if self.wrong == 0 else out

    def spoil(self, result):
        """Change a single number."""
        change = torch.zeros_like(result)
        change.view(-1)[-1] = self.error * result.abs().max()
        return result + change


@pytest.fixture
def use_kernels(monkeypatch, tmp_path):
    """A function that replaces the kernels, as in a process without verdicts."""
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path))
    monkeypatch.setattr(selfcheck, 'WINDOWS', {True: (2, 2), False: (3, 3)})
    # its output shows that `auto` has taken `triton`
    marker = module.Backend(lambda qkv, *_: qkv[..., 0, :, :].flatten(-2) * 0 + 7, lambda qkv: None)
    monkeypatch.setitem(module.BACKENDS, 'triton', marker)

    def put(kernels):
        monkeypatch.setattr(triton_backend, 'triton_window_attention', kernels)
        new_process(monkeypatch)
        return kernels

    return put


def new_process(monkeypatch):
    monkeypatch.setattr(selfcheck, '_verdicts', {})
    selfcheck._warn_once.cache_clear()
    selfcheck._warn_unchecked_once.cache_clear()


def auto_takes_triton(dtype=torch.float32, head_dim=16, attention=window_attention):
    qkv = torch.ones(1, 5, 6, 3, 1, head_dim, dtype=dtype)
    out = attention(qkv, torch.zeros(1, 1, 1), torch.zeros(1, 9), (2, 2), (1, 1))
    return bool((out == 7).all())


def warnings(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize('dtype', [torch.float32, torch.float16, torch.bfloat16])
def test_auto_takes_correct_kernels_and_checks_once(use_kernels, monkeypatch, caplog, dtype):
    kernels = use_kernels(Kernels())
    assert auto_takes_triton(dtype)
    assert auto_takes_triton(dtype)
    assert kernels.calls == 1
    new_process(monkeypatch)
    assert auto_takes_triton(dtype)
    assert kernels.calls == 1
    assert not warnings(caplog)


@pytest.mark.parametrize(('wrong', 'name'), list(enumerate(selfcheck.RESULTS)))
@pytest.mark.parametrize('error', [1e-3, float('nan')])
def test_auto_rejects_wrong_kernels_with_one_warning(use_kernels, monkeypatch, caplog, wrong, name, error):
    kernels = use_kernels(Kernels(wrong, error))
    assert not auto_takes_triton()
    assert not auto_takes_triton()
    assert kernels.calls == 1
    (warning,) = warnings(caplog)
    number = 'nan' if error != error else '1.0e-03'
    assert f'in windows of 3x3: {name} is off by {number} (allowed ' in warning
    # the verdict is cached, and each process logs its warning
    new_process(monkeypatch)
    assert not auto_takes_triton()
    assert kernels.calls == 1
    assert warnings(caplog) == [warning, warning]
    # without the file, as the warning suggests, they are checked again
    assert f'Delete {selfcheck.cache_file()}, or run `python -m swinv2_mm.ops.selfcheck`' in warning
    selfcheck.cache_file().unlink()
    use_kernels(Kernels())
    assert auto_takes_triton()


@pytest.mark.parametrize(('dtype', 'error'), [(torch.float16, 0.02), (torch.bfloat16, 0.1)])
def test_auto_rejects_wrong_kernels_in_half_precision(use_kernels, dtype, error):
    use_kernels(Kernels(1, error))
    assert not auto_takes_triton(dtype)


def test_auto_rejects_kernels_that_do_not_compile(use_kernels, caplog):
    use_kernels(Kernels(error=triton.TritonError('out of resource:\n  shared memory')))
    assert not auto_takes_triton()
    assert 'in windows of 3x3: TritonError: out of resource: shared memory, on ' in warnings(caplog)[0]


def test_out_of_memory_is_no_verdict(use_kernels, caplog):
    use_kernels(Kernels(error=torch.cuda.OutOfMemoryError('full')))
    assert not auto_takes_triton()
    assert not selfcheck.cache_file().exists()
    use_kernels(Kernels())  # in another process
    assert auto_takes_triton()
    (warning,) = warnings(caplog)
    assert 'in this process: its kernels could not be checked in windows of 3x3: OutOfMemoryError: full' in warning


def test_out_of_memory_decides_for_the_process(use_kernels):
    """Activation checkpointing must recompute with the kernels of the forward pass."""
    kernels = use_kernels(Kernels(error=torch.cuda.OutOfMemoryError('full')))
    assert not auto_takes_triton()
    kernels.error = 0.0
    assert not auto_takes_triton()


def test_nan_of_sdpa_allows_no_error(use_kernels, monkeypatch):
    monkeypatch.setattr(selfcheck, 'sdpa_window_attention', Kernels(0, float('nan')))
    use_kernels(Kernels(0, 1e-3))
    assert not auto_takes_triton()


def test_allowed_error_in_tf32(use_kernels, monkeypatch):
    """A verdict is valid for one setting of TF32."""
    kernels = use_kernels(Kernels(0, 1e-3))
    monkeypatch.setattr(triton_backend, '_is_tf32_allowed', lambda: True)
    assert auto_takes_triton()
    monkeypatch.setattr(triton_backend, '_is_tf32_allowed', lambda: False)
    assert not auto_takes_triton()
    kernels.error = 0.02
    monkeypatch.setattr(triton_backend, '_is_tf32_allowed', lambda: True)
    selfcheck.cache_file().unlink()
    new_process(monkeypatch)
    assert not auto_takes_triton()


def test_unwritable_cache_is_no_error(use_kernels, monkeypatch, caplog, tmp_path):
    (tmp_path / 'file').touch()
    monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'file'))
    kernels = use_kernels(Kernels())
    assert auto_takes_triton()
    assert auto_takes_triton()
    assert kernels.calls == 1
    assert not warnings(caplog)


@pytest.mark.parametrize('content', [b'{"a', b'\xff', b'[]', b'null', None])
def test_damaged_cache_is_replaced(use_kernels, monkeypatch, content):
    kernels = use_kernels(Kernels())
    assert auto_takes_triton()
    file = selfcheck.cache_file()
    expected = json.loads(file.read_text())
    file.write_bytes(json.dumps(dict.fromkeys(expected, 1)).encode() if content is None else content)
    new_process(monkeypatch)
    assert auto_takes_triton()
    assert kernels.calls == 2
    assert json.loads(file.read_text()) == expected
    assert os.listdir(file.parent) == [file.name]


@pytest.mark.parametrize(
    'change',
    [
        lambda patch: patch.setattr(torch, '__version__', '9.0'),
        lambda patch: patch.setattr(triton_backend, '_triton_version', lambda: '9.0'),
        lambda patch: patch.setattr(selfcheck, '_digest', lambda: 'of other kernels'),
    ],
)
def test_verdict_is_of_versions(use_kernels, monkeypatch, change):
    kernels = use_kernels(Kernels())
    assert auto_takes_triton()
    change(monkeypatch)
    new_process(monkeypatch)
    assert auto_takes_triton()
    assert kernels.calls == 2
    assert len(json.loads(selfcheck.cache_file().read_text())) == 2


def test_verdict_is_of_gpu_dtype_and_head_dim(use_kernels, monkeypatch):
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'A GPU')
    monkeypatch.setattr(torch.cuda, 'get_device_capability', lambda device: (9, 0))
    assert selfcheck.describe(torch.device('cuda:1'), torch.float32, 16).startswith('A GPU (9.0), torch ')
    kernels = use_kernels(Kernels())
    for checked, dtype, head_dim in [
        (1, torch.float32, 16),
        (2, torch.float32, 17),
        (2, torch.float32, 32),
        (3, torch.bfloat16, 32),
        (4, torch.float32, 128),
    ]:
        assert auto_takes_triton(dtype, head_dim)
        assert kernels.calls == checked


def test_check_is_isolated_from_active_modes(use_kernels):
    use_kernels(Kernels())
    former = torch.get_rng_state()
    hooks = torch.autograd.graph.saved_tensors_hooks(lambda t: 1 / 0, lambda t: t)
    with (
        FlopCounterMode(display=False) as counter,
        torch.inference_mode(),
        torch.autocast('cpu', torch.bfloat16),
        hooks,
    ):
        assert auto_takes_triton()
    assert counter.get_total_flops() == 0
    assert torch.equal(torch.get_rng_state(), former)


def test_no_check_in_backward_or_graph_capture(use_kernels, monkeypatch):
    kernels, found = use_kernels(Kernels()), []

    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            found.append(auto_takes_triton())
            return grad

    Recomputed.apply(torch.ones(1, requires_grad=True)).backward()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, 'is_initialized', lambda: True)
        patch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        found.append(auto_takes_triton())
    assert found == [False, False]
    assert kernels.calls == 0
    assert auto_takes_triton()


@pytest.mark.parametrize(
    ('size', 'window', 'is_compiled', 'expected'),
    [
        (16, 8, False, [(2, 2)]),
        (8, 12, False, [(2, 2)]),  # the feature map clips the window to one tile
        (9, 12, False, [(3, 3)]),
        (16, 8, True, [(2, 2)]),
        (16, 12, True, [(3, 3), (2, 2)]),  # one graph for feature maps of all sizes
    ],
)
def test_verdict_is_of_one_tile_or_several(use_kernels, size, window, is_compiled, expected):
    checked = []

    class Noted(Kernels):
        def __call__(self, *inputs, **options):
            checked.append(inputs[3])
            return super().__call__(*inputs, **options)

    use_kernels(Noted())
    attention = torch.compile(window_attention, backend='eager') if is_compiled else window_attention
    qkv, table = torch.ones(1, size, size, 3, 1, 16, dtype=torch.bfloat16), torch.zeros(1, (2 * window - 1) ** 2)
    assert (attention(qkv, torch.zeros(1, 1, 1), table, (window, window), (0, 0)) == 7).all()
    assert checked == expected
    assert len(json.loads(selfcheck.cache_file().read_text())) == len(expected)
    torch._dynamo.reset()


@pytest.mark.parametrize(
    ('window', 'dtype', 'number'),
    [((8, 8), torch.bfloat16, 6), ((16, 16), torch.bfloat16, 12), ((9, 9), torch.float32, 12)],
)
def test_examine_compiles_each_kernel_first(monkeypatch, window, dtype, number):
    def kinds(launches):
        arguments = [[(t.dtype, t.shape) if isinstance(t, torch.Tensor) else t for t in call.args] for call in launches]
        return {str((c.kernel.__name__, c.programs, c.constants, a)) for c, a in zip(launches, arguments, strict=True)}

    compiled = []
    monkeypatch.setattr(selfcheck, 'compile_launches', compiled.extend)
    with recorded() as launches:  # nothing runs: results are wrong
        selfcheck.examine(window, True, 32, dtype, torch.device('cpu'))
    assert kinds(compiled) == kinds(launches)
    assert len(compiled) == number


def test_compile_launches_in_threads_returns_errors(monkeypatch):
    """In a process with two CPUs."""
    monkeypatch.setattr(os, 'cpu_count', lambda: 2)
    both = threading.Barrier(2, timeout=600)

    class Kernel:
        def warmup(self, *args, grid, **constants):
            both.wait()
            if constants['n'] == 1:
                raise RuntimeError('PTXAS error')
            return args, grid, constants

    x = torch.empty(1)
    right, wrong = compile_launches(Launch(Kernel(), 5, (x,), {'n': n}) for n in range(2))
    assert right == ((x,), (5,), {'n': 0})
    assert str(wrong) == 'PTXAS error'


def test_recorded_is_local_to_its_thread():
    ran = []

    class Kernel:
        def __getitem__(self, grid):
            return lambda *args, **constants: ran.append(grid)

    with recorded() as launches:
        launch(Kernel(), 1, torch.empty(1))
        thread = threading.Thread(target=launch, args=(Kernel(), 2, torch.empty(1)))
        thread.start()
        thread.join()
    assert [call.programs for call in launches] == [1]
    assert ran == [(2,)]


@pytest.mark.parametrize('dynamic', [False, True])
@pytest.mark.parametrize('error', [0.0, 1.0])
def test_compile_has_the_choice_as_a_constant(use_kernels, error, dynamic):
    kernels = use_kernels(Kernels(0, error))
    torch._dynamo.reset()
    compiled = torch.compile(window_attention, fullgraph=True, backend='eager', dynamic=dynamic)
    for _ in range(2):
        assert auto_takes_triton(attention=compiled) == (error == 0)
    assert kernels.calls == 1
    torch._dynamo.reset()


# ---------------------------------------------------------------- python -m swinv2_mm.ops.selfcheck


@pytest.fixture
def use_in_command(use_kernels, monkeypatch):
    """`use_kernels` for the command in the interpreter, with the smallest windows."""
    monkeypatch.setenv('TRITON_INTERPRET', '1')
    monkeypatch.setattr(command, 'INTERPRETED', (('fp32', 'bf16'), (16,), ((2, 2), (1, 2, 2))))
    return use_kernels


def test_command_prints_errors_and_replaces_verdicts(use_in_command, monkeypatch, capsys):
    use_in_command(Kernels(0, 1.0))
    assert not auto_takes_triton()
    use_in_command(Kernels())
    assert command.main([]) == 0
    heading, _, *rows = (line.strip('| ').split(' | ') for line in capsys.readouterr().out.splitlines())
    assert heading == ['type', 'head size', 'window', 'shifted, padded', *selfcheck.RESULTS]
    *rows, _, _, float32, bfloat16 = rows  # the two before are of the post-norm
    cases = itertools.product(('fp32', 'bf16'), ('16',), ('2x2', '1x2x2'), ('yes', 'no'))
    assert [tuple(row[:4]) for row in rows] == list(cases)
    assert all(' (allowed ' in deviation for row in rows for deviation in row[4:])
    for dtype, (verdict,) in ('float32', float32), ('bfloat16', bfloat16):
        assert verdict.startswith("right on Triton's interpreter, torch ")
        tiles = 'one tile' if dtype == 'bfloat16' else 'several tiles'
        assert verdict.endswith(f', torch.{dtype}, heads of up to 16 channels, windows of {tiles}')
    new_process(monkeypatch)
    assert auto_takes_triton()


@pytest.mark.parametrize(
    ('error', 'printed'),
    [
        (1.0, 'out is off by 1.0e+00 (allowed '),
        (triton.TritonError('no such instruction'), 'TritonError: no such instruction'),
    ],
)
def test_command_fails_on_a_wrong_result(use_in_command, capsys, error, printed):
    use_in_command(Kernels(0, error))
    assert command.main([]) == 1
    verdict = capsys.readouterr().out.splitlines()[-1]
    assert 'wrong on ' in verdict
    assert f'in windows of 2x2: {printed}' in verdict
    assert f'in windows of 1x2x2: {printed}' in verdict
    use_in_command(Kernels())
    assert not auto_takes_triton()


def test_command_gives_no_verdict_without_a_check(use_in_command, monkeypatch, capsys):
    full = torch.cuda.OutOfMemoryError('full')
    use_in_command(Kernels(error=full))
    monkeypatch.setattr(post_norm, 'check', Kernels(error=full))
    assert command.main([]) == 0
    assert capsys.readouterr().out.endswith(
        '| bf16 | 16 | 1x2x2 | no | not checked in windows of 1x2x2: OutOfMemoryError: full |\n'
    )
    assert not selfcheck.cache_file().exists()


def test_command_resumes(use_in_command, monkeypatch, capsys, tmp_path):
    """It checks all cases again if the kernels have changed."""
    options = ['--resume', str(tmp_path / 'rows.json')]
    monkeypatch.setattr(post_norm, 'check', lambda device, dtype: {})
    kernels = use_in_command(Kernels())
    former = selfcheck.examine

    def examine(*args):
        if kernels.calls == 3:
            raise KeyboardInterrupt
        return former(*args)

    with monkeypatch.context() as patch:
        patch.setattr(selfcheck, 'examine', examine)
        with pytest.raises(KeyboardInterrupt):
            command.main(options)
    capsys.readouterr()
    kernels = use_in_command(Kernels())
    assert command.main(options) == 0
    assert kernels.calls == 8 - 3
    rows = [line for line in capsys.readouterr().out.splitlines() if line.startswith(('| fp32', '| bf16'))]
    assert len(rows) == 8
    assert all(row.count(' (allowed ') == 4 for row in rows)
    assert auto_takes_triton()
    assert kernels.calls == 8 - 3
    monkeypatch.setattr(selfcheck, '_digest', lambda: 'of other kernels')
    assert command.main(options) == 0
    assert kernels.calls == 2 * 8 - 3


def test_command_checks_its_output_first(use_in_command, capsys, tmp_path):
    kernels = use_in_command(Kernels())
    assert command.main(['--resume', str(tmp_path / 'no' / 'rows.json')]) == 2
    assert f'error: --resume {tmp_path}/no/rows.json cannot be read and written: ' in capsys.readouterr().err
    (tmp_path / 'rows.json').write_text('{"a')
    assert command.main(['--resume', str(tmp_path / 'rows.json')]) == 2
    assert kernels.calls == 0


@pytest.mark.skipif(torch.cuda.is_available(), reason='with a GPU it runs')
def test_command_without_a_gpu(monkeypatch, capsys):
    monkeypatch.delenv('TRITON_INTERPRET')
    assert command.main([]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert (
        line == 'error: the Triton kernels cannot run: there is no GPU; TRITON_INTERPRET=1 tries this out without one'
    )


@pytest.mark.slow
def test_command_in_the_interpreter(tmp_path):
    env = os.environ | dict(TRITON_INTERPRET='1', XDG_CACHE_HOME=str(tmp_path))
    result = subprocess.run(
        [sys.executable, '-m', 'swinv2_mm.ops.selfcheck'], env=env, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert '| fp32 | 16 | 9x9 | yes | ' in result.stdout
    assert not result.stderr


@pytest.mark.parametrize(
    ('error', 'fault'), [(0.05, ''), (0.2, 'in post-norm: out is off by 2.0e-01 (allowed 1.0e-01)')]
)
def test_verdict_of_the_post_norm(use_kernels, monkeypatch, caplog, error, fault):
    use_kernels(Kernels())
    monkeypatch.setattr(post_norm, 'check', lambda device, dtype: {'out': (error, 0.1)})
    branch = torch.ones(1, 4, 16)
    for _ in range(2):
        assert (selfcheck.why_not_post_norm(branch) is None) == (fault == '')
    assert len(warnings(caplog)) == bool(fault)
    assert all(fault in warning for warning in warnings(caplog))
    assert auto_takes_triton()
    assert sorted(json.loads(selfcheck.cache_file().read_text()).values()) == sorted(['', fault])

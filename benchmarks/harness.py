"""The harness of benchmark_backbone.py and benchmark_attention.py: checks and measures cases, and their command line.

An implementation is timed only after the correctness gate. The implementations of a family share their parameters, so
that all of a case fit into memory at once and are timed interleaved. Each module imports only those before it:

measure: time, memory and profile
shapes: backbones and input sizes, and their FLOP
cases: the data types of a comparison
ours, peers, implementations: what is compared, and how it is built
runners: implementations in memory, ready to take steps
correctness: the comparison with the reference in float64
results: tables, JSON and plot
"""

import argparse
import gc
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
import torch._dynamo
import torch._inductor.config
from cases import Case, Implementation, NotSupportedError
from correctness import CorrectnessGate, is_correct
from measure import DEVICE, device_peak, peak_memory, profile_operators, time_interleaved
from results import Row, plot, print_profile, print_table, write_json
from runners import MODES, CaseRunner
from shapes import DTYPES, SHAPES
from torch.utils.benchmark import Measurement

from swinv2_mm.cli.errors import check_outputs

DEFAULT_SHAPES = [name for name in SHAPES if name != 'nano' and (DEVICE == 'cuda' or name != 'g_block_1536_w32')]
WARM_UP = 2  # steps before the timed ones, after the one that is checked


# ---------------------------------------------------------------- a case


def measure(
    case: Case, modes: Sequence[str], dtype: torch.dtype, rounds: int, peak: float, profile: bool = False
) -> Iterator[list[Row]]:
    """Check and measure the implementations of a case, mode by mode, and print a table for each mode.

    Args:
        case: What they compute.
        modes: Of `MODES`.
        dtype: Autocast's type, or float32 for none.
        rounds: Timed steps of each implementation.
        peak: FLOP/s of the device.
        profile: Whether to print the time in operators too.

    Yields:
        The rows of each mode.
    """
    torch._dynamo.reset()  # it keeps the models of the previous case
    gc.collect()
    if DEVICE == 'cuda':
        torch.cuda.empty_cache()
    case_runner = CaseRunner(case, dtype)
    gate = CorrectnessGate(case_runner)
    for mode in modes:
        type_name = str(dtype).removeprefix('torch.')
        rows = [Row(case.name, mode, i.name, case.input_shape[0], type_name) for i in case.implementations]
        for implementation, row in zip(case.implementations, rows, strict=True):
            _check(gate, implementation, row, dtype)
        correct = [(case_runner.runners[row.implementation], row) for row in rows if not row.note]
        steps = [
            lambda runner=runner, mode=mode: case_runner.step(runner, mode, case_runner.grad_out)
            for runner, _ in correct
        ]
        time_interleaved(steps, WARM_UP)
        for (runner, row), step, times in zip(correct, steps, time_interleaved(steps, rounds), strict=True):
            _fill(row, times, case.flops, peak)
            if runner.compile_seconds:
                row.compile_seconds = max(0.0, runner.compile_seconds[mode != 'inference'] - row.seconds)
            runner.clear(case_runner.x)
            row.peak_bytes = peak_memory(step)
            row.operators = profile_operators(step) if profile else {}
        _compare(rows)
        print_table(rows)
        if profile:
            print_profile(rows)
        yield rows


def _check(gate: CorrectnessGate, implementation: Implementation, row: Row, dtype: torch.dtype) -> None:
    """Note the errors of an implementation, and why it is not timed if it is not."""
    try:
        row.errors = gate.errors(implementation, row.mode)
    except NotSupportedError as error:
        row.note = str(error)
    except torch.OutOfMemoryError:
        row.note = 'does not fit'
    except Exception as error:  # an implementation that fails is a result too
        row.note = f'failed: {type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'
    else:
        row.note = '' if is_correct(row.errors, dtype) else 'WRONG'


def _fill(row: Row, times: Measurement, flops: int, peak: float) -> None:
    row.seconds, row.iqr = times.median, times.iqr
    row.images_per_second = row.batch / row.seconds
    passes = 1 if row.mode == 'inference' else 3
    row.share_of_peak = passes * flops * row.batch / row.seconds / peak


def _compare(rows: list[Row]) -> None:
    """Set the speed relative to eager timm, or to the first timed row without it."""
    timed = [row for row in rows if row.seconds]
    base = next((row for row in timed if row.implementation == 'timm eager'), timed[0] if timed else None)
    for row in timed:
        row.relative = base.seconds / row.seconds


# ---------------------------------------------------------------- command line


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that both commands have."""
    gpu = DEVICE == 'cuda'
    parser.add_argument('--shapes', nargs='+', default=DEFAULT_SHAPES, help=f'any of {", ".join(SHAPES)}')
    parser.add_argument('--modes', nargs='+', choices=MODES, default=list(MODES), help='default: all')
    parser.add_argument(
        '--implementations', metavar='GLOB', nargs='+', default=['*'], help="such as '*eager' (default: all)"
    )
    parser.add_argument('--batch', type=int, help='images of a step (default: by shape and device)')
    parser.add_argument('--repeats', type=int, default=50 if gpu else 5, help='timed rounds (default: %(default)s)')
    parser.add_argument(
        '--dtype', choices=DTYPES, default='bfloat16' if gpu else 'float32', help='of autocast (default: %(default)s)'
    )
    parser.add_argument('--threads', type=int, help="CPU threads (default: torch's)")
    parser.add_argument('--profile', action='store_true', help='print the time in operators too')
    parser.add_argument('--json', metavar='OUT', help='write all rows to this file, in seconds and bytes')
    parser.add_argument(
        '--resume',
        type=Path,
        metavar='DIR',
        help='write a file for each case and mode into this folder, skip those that exist, and use the caches of '
        'compiled code, to continue a run that was stopped',
    )
    parser.add_argument('--plot', metavar='OUT', help='plot images per second relative to eager timm to this file')


def check_arguments(args: argparse.Namespace) -> None:
    """Check the arguments before anything is measured.

    Raises:
        OSError: Results cannot be written.
        ValueError: An argument is wrong.
    """
    unknown = [name for name in args.shapes if name not in SHAPES]
    if unknown:
        raise ValueError(f'--shapes {", ".join(unknown)} is not known; there are: {", ".join(SHAPES)}')
    for name in ('batch', 'repeats', 'threads'):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise ValueError(f'--{name} must be at least 1, got {value}')
    if DEVICE == 'cpu' and sys.platform != 'linux':
        raise ValueError('without a GPU, peak memory is read from /proc, which only Linux has')
    if args.resume and not args.resume.is_dir():
        raise FileNotFoundError(f'there is no folder {args.resume} for the results of --resume')
    check_outputs(args.json, args.plot, args.resume and args.resume / 'x.json')


def run(args: argparse.Namespace, cases: Iterable[Callable[[], Case]]) -> None:
    """Measure all cases and write the results."""
    if args.threads:
        torch.set_num_threads(args.threads)
    if not args.resume:  # cached kernels of an earlier run would make compilation look fast
        torch._inductor.config.force_disable_caches = True
    # beyond the limit, torch.compile would run eagerly without an error
    torch._dynamo.config.recompile_limit = 64
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    torch.backends.cudnn.allow_tf32 = False  # as torch's default for matrix products: float32 means float32 here
    dtype = DTYPES[args.dtype]
    peak = device_peak(dtype)
    results = []
    for case in (make() for make in cases):
        modes = [mode for mode in args.modes if not (args.resume and result_file(args.resume, case, mode).exists())]
        for rows in measure(case, modes, dtype, args.repeats, peak, args.profile):
            results += rows
            if args.resume:
                write_json(rows, peak, result_file(args.resume, case, rows[0].mode))
            if args.json:  # after each mode: a long run that is stopped keeps its results
                write_json(results, peak, args.json)
            if args.plot:
                plot(results, args.plot)


def result_file(folder: Path, case: Case, mode: str) -> Path:
    """File for the rows of a case and a mode."""
    return folder / f'{case.name.replace(" ", "_")}-{mode}.json'

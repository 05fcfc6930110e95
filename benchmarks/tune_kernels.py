"""Find the fastest tile sizes of the Triton kernels of window attention on this GPU, and store them.

python benchmarks/tune_kernels.py

It runs for up to `--minutes` and may be stopped at any time: results are written after each kernel, and another call
continues. The kernels read them from `swinv2_mm/ops/triton/tiles.json`, by the name of the GPU, and use default tiles
where there is no entry. The candidates of a kernel are compiled in parallel. A candidate is rejected, and not timed, if
it does not compile, does not fit, spills, or has larger errors against the reference in float64 than rounding explains.
With TRITON_INTERPRET=1 the command can be tried without a GPU; its times mean nothing then.
"""

import argparse
import contextlib
import functools
import itertools
import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from measure import milliseconds
from torch import Tensor

from swinv2_mm.cli.errors import check_outputs, one_line_errors
from swinv2_mm.ops.files import write_whole
from swinv2_mm.ops.reference import reference_window_attention
from swinv2_mm.ops.sdpa import sdpa_window_attention
from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import tiles
from swinv2_mm.ops.triton.launch import Launch, compile_launches, launch, recorded
from swinv2_mm.ops.triton.selfcheck import allowed_error
from swinv2_mm.ops.triton.tiles import TileConfig

DTYPES = {'bfloat16': torch.bfloat16, 'float16': torch.float16, 'float32': torch.float32}
# windows of the released models and the paper's systems, the most useful first
WINDOWS = ('24x24', '16x16', '8x8', '32x32', '8x20x20', '8x7x7', '12x12', '7x7')
LOGITS = 2**28  # of a measurement: some milliseconds on a large GPU
TOKENS = 2**17  # at most
HEADS = 8
MAX_SPILLED = 64  # bytes of a thread


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', nargs='+', default=WINDOWS, help='tokens along each axis, as in 24x24')
    parser.add_argument('--kernels', nargs='+', default=tiles.KERNELS, choices=tiles.KERNELS)
    parser.add_argument('--dtypes', nargs='+', default=list(DTYPES), choices=DTYPES)
    parser.add_argument('--head-dim', type=int, default=32)
    parser.add_argument('--minutes', type=float, default=9, help='start no kernel after this time (default: 9)')
    parser.add_argument(
        '--candidates', type=int, default=12, help='tiles to try, in addition to the default (default: 12)'
    )
    parser.add_argument('--again', action='store_true', help='measure kernels with a stored result, too')
    parser.add_argument('--out', type=Path, default=tiles.TUNED)
    parser.add_argument('--times', type=Path, help='also write the milliseconds of all candidates to this JSON file')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- attention, and its expected results


class Problem:
    """Attention of shifted windows on a feature map, forward and backward.

    Args:
        window: Tokens along each axis; the feature map has twice as many.
        head_dim: Channels of a head.
        dtype: Type of `qkv`.
    """

    def __init__(self, window: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> None:
        # the interpreter takes seconds for a window and head
        device, heads, largest = ('cuda', HEADS, LOGITS) if torch.cuda.is_available() else ('cpu', 1, 1)
        self.tokens, self.head_dim, self.dtype = math.prod(window), head_dim, dtype
        num_tokens = 2 ** len(window) * self.tokens
        batch = max(1, min(TOKENS, largest // (heads * self.tokens)) // num_tokens)
        size, self.sizes = [2 * w for w in window], (window, tuple(w // 2 for w in window))
        generator = torch.Generator(device).manual_seed(0)
        qkv = torch.randn(batch, *size, 3, heads, head_dim, device=device, dtype=dtype, generator=generator)
        scale = torch.full((heads, 1, 1), math.log(10), device=device)
        table = 16 * torch.rand(heads, math.prod(2 * w - 1 for w in window), device=device, generator=generator)
        self.inputs = qkv, scale, table
        self.grad_out = torch.randn(batch, *size, heads * head_dim, device=device, dtype=dtype, generator=generator)

    def run(self) -> dict[str, Tensor]:
        """All results of the kernels: the output, and the gradients of all inputs."""
        return self._results(triton_backend.triton_window_attention, self.inputs, self.grad_out)

    def _results(
        self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad_out: Tensor
    ) -> dict[str, Tensor]:
        qkv, scale, table = (t.detach().requires_grad_() for t in inputs)
        out = attention(qkv, scale, table, *self.sizes)
        out.backward(grad_out)
        q, k, v = qkv.grad.unbind(-3)
        gradients = {f'grad of {name}': grad for name, grad in zip('qkv', (q, k, v), strict=True)}
        gradients |= {'grad of logit_scale': scale.grad, 'grad of bias_table': table.grad}
        return {'out': out.detach(), **gradients}

    @functools.cached_property
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Each result in float64, and its largest allowed error.

        As in the self-check, but with separate queries, keys and values.
        """
        reference = functools.partial(reference_window_attention, sequential=True)
        exact = self._results(reference, [t.double() for t in self.inputs], self.grad_out.double())
        peer = self._results(sdpa_window_attention, self.inputs, self.grad_out)
        largest = {name: float(value.abs().max()) for name, value in exact.items()}
        errors = {name: _distance(peer[name], value) / largest[name] for name, value in exact.items()}
        return {
            name: (value, allowed_error(name, errors[name], self.dtype) * largest[name])
            for name, value in exact.items()
        }

    def wrong(self) -> list[str]:
        """Names of the results of the kernels whose errors are too large."""
        results = self.run()
        # also True for NaN
        return [name for name, (value, limit) in self.expected.items() if not _distance(results[name], value) <= limit]

    def launches(self, kernel: str, run: bool = False) -> list[Launch]:
        """Launches of a kernel in a forward and a backward pass; with `run` they run too."""
        with recorded(run) as launches:
            out, lse = triton_backend.triton_forward(*self.inputs, *self.sizes)
            triton_backend.triton_backward(self.grad_out, *self.inputs, out, lse, *self.sizes)
        return [launch for launch in launches if launch.kernel.__name__ == kernel]

    def kernels(self) -> list[str]:
        """Kernels with tiles that run for such windows."""
        return [kernel for kernel in tiles.KERNELS if self.launches(kernel)]


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


# ---------------------------------------------------------------- candidates


@contextlib.contextmanager
def using(kernel: str, chosen: TileConfig) -> Iterator[None]:
    """Run a kernel with these tiles inside."""

    def choose(name: str, *args) -> TileConfig:
        return chosen if name == kernel else tiles.choose_tiles(name, *args)

    with mock.patch.object(triton_backend, 'choose_tiles', choose):
        yield


def candidates(kernel: str, problem: Problem, count: int) -> list[TileConfig]:
    """The default tiles, and `count` others that are worth measuring, the closest to the default first."""
    default = tiles.default_tiles(kernel, problem.tokens, problem.head_dim, problem.dtype)

    def steps(other: TileConfig) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(default, other, strict=True))

    others = set(tiles.candidates(kernel, problem.tokens, problem.head_dim, problem.dtype)) - {default}
    return [default, *sorted(others, key=lambda c: (steps(c), c))[:count]]


def compile_all(problem: Problem, kernel: str, chosen: Sequence[TileConfig]) -> dict[TileConfig, str | None]:
    """Compile a kernel with all of these tiles in parallel; returns why each is rejected, or None."""
    found: dict[TileConfig, str | None] = {}
    launches: list[tuple[TileConfig, Launch]] = []
    for tile in chosen:
        found[tile] = None
        with using(kernel, tile):
            try:
                launches += [(tile, launch) for launch in problem.launches(kernel)]
            except Exception as error:  # the host code rejects these tiles too
                found[tile] = first_line(error)
    compiled = compile_launches(launch for _, launch in launches)
    for (tile, _), result in zip(launches, compiled, strict=True):
        found[tile] = found[tile] or reject(result)
    return found


def reject(compiled: Any) -> str | None:
    """Why a compiled kernel should not be launched, or None: a compilation error, too large, or spills."""
    if compiled is None:  # the interpreter compiles nothing
        return None
    if isinstance(compiled, Exception):
        return first_line(compiled)
    try:
        compiled._init_handles()  # loads it, which fails if it is too large, and sets `n_spills`
    except Exception as error:  # of the driver
        return first_line(error)
    spilled = 4 * compiled.n_spills
    return f'spills {spilled} bytes' if spilled > MAX_SPILLED else None


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def time_kernel(problem: Problem, kernel: str) -> float:
    """Milliseconds of the launches of a kernel in a forward and a backward pass."""
    launches = problem.launches(kernel, run=True)

    def call() -> None:
        for kernel, programs, args, constants in launches:
            launch(kernel, programs, *args, **constants)

    return milliseconds(call)


def tune(problem: Problem, kernel: str, chosen: Sequence[TileConfig]) -> dict[TileConfig, float]:
    """Time of a kernel with each of the tiles that work; prints why the others are rejected."""
    times = {}
    for tile, reason in compile_all(problem, kernel, chosen).items():
        with using(kernel, tile):
            try:
                if reason is None and (wrong := problem.wrong()):
                    reason = f'wrong {", ".join(wrong)}'
                if reason is None:
                    times[tile] = time_kernel(problem, kernel)
            except Exception as error:  # of the driver
                reason = first_line(error)
        if reason is not None:
            print(f'  {kernel}: {tile} is rejected: {reason}', flush=True)
    return times


# ---------------------------------------------------------------- results


def store(path: Path, device: str, results: dict[str, TileConfig | dict]) -> None:
    """Add results to a file, atomically."""
    stored = json.loads(path.read_text()) if path.exists() else {}
    stored.setdefault(device, {}).update(results)
    text = ',\n'.join(
        f'  {json.dumps(name)}: {{\n'
        + ',\n'.join(f'    {json.dumps(key)}: {json.dumps(value)}' for key, value in sorted(entries.items()))
        + '\n  }'
        for name, entries in stored.items()
    )
    write_whole(path, f'{{\n{text}\n}}\n')


def check(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Check the arguments, and parse the windows.

    Raises:
        OSError: A file for results cannot be written.
        ValueError: A number or a window is wrong, or there is no GPU.
    """
    if not triton_backend.HAS_TRITON:
        raise ValueError('the package triton is not installed: pip install triton')
    if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError('there is no GPU to tune kernels for; TRITON_INTERPRET=1 tries the command without one')
    if args.candidates < 0:
        raise ValueError(f'--candidates must be at least 0, got {args.candidates}')
    check_outputs(args.out, args.times)
    windows = []
    for text in args.windows:
        sides = text.split('x')
        if len(sides) > triton_backend.MAX_AXES or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(
                f'--windows: {text!r} is not a window of up to {triton_backend.MAX_AXES} axes; write it as in 24x24'
            )
        windows.append(tuple(map(int, sides)))
    return windows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns 1 if no tiles work for a kernel."""
    args = parse_args(argv)
    with one_line_errors(OSError, ValueError):
        windows = check(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'interpreter'
    stored = json.loads(args.out.read_text()).get(device, {}) if args.out.exists() and not args.again else {}
    end = time.monotonic() + 60 * args.minutes
    status = 0
    print('| window | type | kernel | tiles timed | default, ms | best, ms | block_m, block_n, warps, stages |')
    print('|---|---|---|---|---|---|---|')
    for dtype, window in itertools.product(args.dtypes, windows):
        problem, name = Problem(window, args.head_dim, DTYPES[dtype]), 'x'.join(map(str, window))
        for kernel in (k for k in problem.kernels() if k in args.kernels):
            key = f'{kernel} {problem.tokens} {tiles.next_power_of_2(args.head_dim)} {DTYPES[dtype]}'
            if key in stored:
                continue
            if time.monotonic() > end:
                print(f'{kernel} of {name} and all after it: not tuned: --minutes {args.minutes:g} is over')
                return status
            default, *others = candidates(kernel, problem, args.candidates)
            times = tune(problem, kernel, [default, *others])
            if not times:
                print(f'{kernel} of {name} in {dtype}: no tiles work', flush=True)
                status = 1
                continue
            best = min(times, key=times.get)
            default_ms = f'{times[default]:.3f}' if default in times else 'rejected'
            print(
                f'| {name} | {dtype} | {kernel} | {len(times)} | {default_ms} | {times[best]:.3f} '
                f'| {", ".join(map(str, best))} |',
                flush=True,
            )
            store(args.out, device, {key: best})
            if args.times:
                ms = {', '.join(map(str, tile)): time for tile, time in times.items()}
                store(args.times, device, {key: dict(default=', '.join(map(str, default)), ms=ms)})
    return status


if __name__ == '__main__':
    sys.exit(main())

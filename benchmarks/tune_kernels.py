"""Find the tile sizes with which the Triton kernels of window attention are fastest on this GPU, and keep them.

python benchmarks/tune_kernels.py

It takes up to `--minutes`, and may be stopped at any time: what was found is written after each kernel, and another
call goes on from there. The kernels read it from `swinv2_mm/ops/triton/tiles.json`, by the name of the GPU; what is not
there goes by rule. The candidates of a kernel are compiled in parallel. Those that do not compile, do not fit, spill,
or whose results are further from the reference in float64 than rounding explains are left out, and get no times. With
TRITON_INTERPRET=1 the tool can be tried without a GPU; its times mean nothing then.
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
# windows of the released models and the paper's systems, the most valuable first
WINDOWS = ('24x24', '16x16', '8x8', '32x32', '8x20x20', '8x7x7', '12x12', '7x7')
LOGITS = 2**28  # of a measurement: some milliseconds of a large GPU
TOKENS = 2**17  # at most
HEADS = 8
SPILLED = 64  # bytes of a thread that are accepted


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', nargs='+', default=WINDOWS, help='tokens along each axis, as in 24x24')
    parser.add_argument('--kernels', nargs='+', default=tiles.KERNELS, choices=tiles.KERNELS)
    parser.add_argument('--dtypes', nargs='+', default=list(DTYPES), choices=DTYPES)
    parser.add_argument('--head-dim', type=int, default=32)
    parser.add_argument('--minutes', type=float, default=9, help='begin no kernel after so long (default: 9)')
    parser.add_argument('--candidates', type=int, default=12, help='tiles to try, next to those by rule (default: 12)')
    parser.add_argument('--again', action='store_true', help='measure what is stored already, too')
    parser.add_argument('--out', type=Path, default=tiles.TUNED)
    parser.add_argument('--times', type=Path, help='also write the milliseconds of all candidates to this JSON file')
    return parser.parse_args(argv)


# ---------------------------------------------------------------- attention, and what is expected of it


class Problem:
    """Attention of shifted windows on a feature map, forward and backward.

    Args:
        window: Tokens along each axis; the map has twice as many.
        head_dim: Channels of a head.
        dtype: Type of the map.
    """

    def __init__(self, window: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> None:
        # the interpreter takes seconds for a window and head
        device, heads, largest = ('cuda', HEADS, LOGITS) if torch.cuda.is_available() else ('cpu', 1, 1)
        self.tokens, self.head_dim, self.dtype = math.prod(window), head_dim, dtype
        map_tokens = 2 ** len(window) * self.tokens
        batch = max(1, min(TOKENS, largest // (heads * self.tokens)) // map_tokens)
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

    def _results(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> dict[str, Tensor]:
        qkv, scale, table = (t.detach().requires_grad_() for t in inputs)
        out = attention(qkv, scale, table, *self.sizes)
        out.backward(grad)
        q, k, v = qkv.grad.unbind(-3)
        gradients = {f'grad of {name}': grad for name, grad in zip('qkv', (q, k, v), strict=True)}
        gradients |= {'grad of logit_scale': scale.grad, 'grad of bias_table': table.grad}
        return {'out': out.detach(), **gradients}

    @functools.cached_property
    def expected(self) -> dict[str, tuple[Tensor, float]]:
        """Each result in float64, and how far from it one may be.

        As of the self-check, but queries, keys and values by themselves.
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
        """Names of the results of the kernels that are not as exact as can be expected."""
        results = self.run()
        # NaN is no small error
        return [name for name, (value, limit) in self.expected.items() if not _distance(results[name], value) <= limit]

    def launches(self, kernel: str, run: bool = False) -> list[Launch]:
        """What a forward and a backward pass launch of a kernel; `run` says whether it runs."""
        with recorded(run) as launches:
            out, lse = triton_backend.triton_forward(*self.inputs, *self.sizes)
            triton_backend.triton_backward(self.grad_out, *self.inputs, out, lse, *self.sizes)
        return [launch for launch in launches if launch.kernel.__name__ == kernel]

    def kernels(self) -> list[str]:
        """Kernels with tiles that such windows run."""
        return [kernel for kernel in tiles.KERNELS if self.launches(kernel)]


def _distance(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max())


# ---------------------------------------------------------------- candidates


@contextlib.contextmanager
def using(kernel: str, chosen: TileConfig) -> Iterator[None]:
    """Let a kernel run with these tiles."""

    def choose(name: str, *args) -> TileConfig:
        return chosen if name == kernel else tiles.choose_tiles(name, *args)

    with mock.patch.object(triton_backend, 'choose_tiles', choose):
        yield


def candidates(kernel: str, problem: Problem, count: int) -> list[TileConfig]:
    """The tiles by rule, and then so many of those that are worth measuring, the closest to them first."""
    rule = tiles.default_tiles(kernel, problem.tokens, problem.head_dim, problem.dtype)

    def steps(other: TileConfig) -> float:
        return sum(abs(math.log2(a / b)) for a, b in zip(rule, other, strict=True))

    others = set(tiles.candidates(kernel, problem.tokens, problem.head_dim, problem.dtype)) - {rule}
    return [rule, *sorted(others, key=lambda c: (steps(c), c))[:count]]


def compile_all(problem: Problem, kernel: str, chosen: Sequence[TileConfig]) -> dict[TileConfig, str | None]:
    """Compile a kernel with all of these tiles in parallel; gives what is wrong with each, or None."""
    found: dict[TileConfig, str | None] = {}
    launches: list[tuple[TileConfig, Launch]] = []
    for tile in chosen:
        found[tile] = None
        with using(kernel, tile):
            try:
                launches += [(tile, launch) for launch in problem.launches(kernel)]
            except Exception as error:  # tiles that the host code cannot take either
                found[tile] = first_line(error)
    compiled = compile_launches(launch for _, launch in launches)
    for (tile, _), result in zip(launches, compiled, strict=True):
        found[tile] = found[tile] or reject(result)
    return found


def reject(compiled: Any) -> str | None:
    """Tell why a kernel that was compiled should not be launched: an error instead of it, too large, or spills."""
    if compiled is None:  # the interpreter compiles nothing
        return None
    if isinstance(compiled, Exception):
        return first_line(compiled)
    try:
        compiled._init_handles()  # loads it: registers and shared memory are known then
    except Exception as error:  # of the driver
        return first_line(error)
    spilled = 4 * compiled.n_spills
    return f'spills {spilled} bytes' if spilled > SPILLED else None


def first_line(error: Exception) -> str:
    """Type and first line of an error."""
    return f'{type(error).__name__}: {(str(error).strip().splitlines() or [""])[0]}'


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call on the GPU; without one, of a single call."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(call, warmup=20, rep=100, return_mode='median')
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def time_kernel(problem: Problem, kernel: str) -> float:
    """Milliseconds of what a forward and a backward pass launch of a kernel."""
    launches = problem.launches(kernel, run=True)

    def call() -> None:
        for kernel, programs, args, constants in launches:
            launch(kernel, programs, *args, **constants)

    return milliseconds(call)


def tune(problem: Problem, kernel: str, chosen: Sequence[TileConfig]) -> dict[TileConfig, float]:
    """Time of a kernel with each of the tiles that work; prints why the others do not."""
    times = {}
    for tile, reason in compile_all(problem, kernel, chosen).items():
        with using(kernel, tile):
            try:
                if reason is None and (wrong := problem.wrong()):
                    reason = f'gives another {", ".join(wrong)}'
                if reason is None:
                    times[tile] = time_kernel(problem, kernel)
            except Exception as error:  # of the driver
                reason = first_line(error)
        if reason is not None:
            print(f'  {kernel}: {tile} is left out: {reason}', flush=True)
    return times


# ---------------------------------------------------------------- results


def keep(path: Path, device: str, found: dict[str, TileConfig | dict]) -> None:
    """Add what was found to a file, whole or not at all."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(device, {}).update(found)
    text = ',\n'.join(
        f'  {json.dumps(name)}: {{\n'
        + ',\n'.join(f'    {json.dumps(key)}: {json.dumps(value)}' for key, value in sorted(entries.items()))
        + '\n  }'
        for name, entries in known.items()
    )
    write_whole(path, f'{{\n{text}\n}}\n')


def check(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Windows that were asked for.

    Raises:
        OSError: A file for results cannot be written.
        ValueError: A number or a window cannot be, or there is nothing to run the kernels on.
    """
    if not triton_backend.HAS_TRITON:
        raise ValueError('the package triton is not installed: pip install triton')
    if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError('there is no GPU to tune kernels for; TRITON_INTERPRET=1 tries the tool out without one')
    if args.candidates < 0:
        raise ValueError(f'--candidates must be at least 0, got {args.candidates}')
    check_outputs(args.out, args.times)
    windows = []
    for text in args.windows:
        sides = text.split('x')
        if len(sides) > triton_backend.MAX_AXES or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(
                f'--windows: {text!r} is no window of up to {triton_backend.MAX_AXES} axes; write it as in 24x24'
            )
        windows.append(tuple(map(int, sides)))
    return windows


def main(argv: Sequence[str] | None = None) -> int:
    """Run the script; returns 1 if a kernel has no tiles that work."""
    args = parse_args(argv)
    with one_line_errors(OSError, ValueError):
        windows = check(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'interpreter'
    stored = json.loads(args.out.read_text()).get(device, {}) if args.out.exists() and not args.again else {}
    end = time.monotonic() + 60 * args.minutes
    status = 0
    print('| window | type | kernel | tiles tried | by rule, ms | best, ms | block_m, block_n, warps, stages |')
    print('|---|---|---|---|---|---|---|')
    for dtype, window in itertools.product(args.dtypes, windows):
        problem, name = Problem(window, args.head_dim, DTYPES[dtype]), 'x'.join(map(str, window))
        for kernel in (k for k in problem.kernels() if k in args.kernels):
            key = f'{kernel} {problem.tokens} {tiles.next_power_of_2(args.head_dim)} {DTYPES[dtype]}'
            if key in stored:
                continue
            if time.monotonic() > end:
                print(f'{kernel} of {name} and what follows: no time left of {args.minutes:g} minutes')
                return status
            rule, *others = candidates(kernel, problem, args.candidates)
            times = tune(problem, kernel, [rule, *others])
            if not times:
                print(f'{kernel} of {name} in {dtype}: none of the tiles works', flush=True)
                status = 1
                continue
            best = min(times, key=times.get)
            by_rule = f'{times[rule]:.3f}' if rule in times else 'left out'
            print(
                f'| {name} | {dtype} | {kernel} | {len(times)} | {by_rule} | {times[best]:.3f} '
                f'| {", ".join(map(str, best))} |',
                flush=True,
            )
            keep(args.out, device, {key: best})
            if args.times:
                ms = {', '.join(map(str, tile)): time for tile, time in times.items()}
                keep(args.times, device, {key: dict(rule=', '.join(map(str, rule)), ms=ms)})
    return status


if __name__ == '__main__':
    sys.exit(main())

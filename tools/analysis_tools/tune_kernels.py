"""Find the blocks with which the Triton kernels of window attention are fastest on this GPU, and keep them.

python tools/analysis_tools/tune_kernels.py

It takes up to `--minutes`, and may be stopped at any time: what was found is written after each kernel. Kernels look
for it in `swinv2_mm/ops/triton/tiles.json`, by the name of the GPU; what is not there goes by rule. Tiles whose results
are further from the reference in float64 than rounding explains are left out. With TRITON_INTERPRET=1 the tool can be
tried without a GPU; its times mean nothing then.
"""

import argparse
import functools
import json
import math
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor

from swinv2_mm.engine import launch
from swinv2_mm.ops.reference import reference_window_attention
from swinv2_mm.ops.sdpa import sdpa_window_attention
from swinv2_mm.ops.triton import attention as triton_backend
from swinv2_mm.ops.triton import tiles
from swinv2_mm.ops.triton.tiles import TileConfig

DTYPES = {'float32': torch.float32, 'bfloat16': torch.bfloat16, 'float16': torch.float16}
# windows of the released models and the paper's systems, the most used ones first
WINDOWS = ('24x24', '16x16', '8x8', '32x32', '12x12', '8x7x7', '7x7', '56x56')
LOGITS = 2**28  # of a measurement: some milliseconds of a large GPU
INTERPRETED = 2**12
HEADS = 8
# results of each kernel, as `Problem.run` gives them; those of gradients have the names of what they belong to
RESULTS = {
    'attend': ('out', 'log_sums'),
    'grad_queries': ('scale', 'common', 'queries'),
    'grad_keys': ('keys and values',),
    'grad_bias': ('table',),
    'grad_all': ('scale', 'table', 'queries', 'keys and values'),
}


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', nargs='+', default=WINDOWS, help='tokens along each axis, as in 24x24')
    parser.add_argument('--kernels', nargs='+', default=tiles.KERNELS, choices=tiles.KERNELS)
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16'], choices=DTYPES)
    parser.add_argument('--head-dim', type=int, default=32)
    parser.add_argument('--minutes', type=float, default=9, help='begin no kernel after so long')
    parser.add_argument('--out', type=Path, default=tiles.TUNED)
    return parser.parse_args(argv)


class Problem:
    """Attention of shifted windows on a map, and a call of each kernel on it alone."""

    def __init__(self, window: tuple[int, ...], head_dim: int, dtype: torch.dtype) -> None:
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        logits = LOGITS if device == 'cuda' else INTERPRETED
        batch = max(1, logits // (HEADS * 2 ** len(window) * math.prod(window) ** 2))
        size, self.sizes = [2 * w for w in window], (window, tuple(w // 2 for w in window))
        torch.manual_seed(0)
        qkv = torch.randn(batch, *size, 3, HEADS, head_dim, device=device, dtype=dtype)
        scale = torch.full((HEADS, 1, 1), math.log(10), device=device)
        table = 16 * torch.rand(HEADS, math.prod(2 * w - 1 for w in window), device=device)
        self.inputs, self.grad_qkv = (qkv, scale, table), torch.zeros_like(qkv)
        out, log_sums = triton_backend.attend(*self.inputs, *self.sizes)
        self.given = [torch.randn_like(out), *self.inputs, out, log_sums]
        self.geometry = triton_backend.Geometry(qkv, *self.sizes)
        scale, self.common = triton_backend.grad_queries(self.geometry, self.given, self.grad_qkv)
        triton_backend.grad_keys(self.geometry, self.given, self.common, self.grad_qkv)
        table = triton_backend.grad_bias(self.geometry, self.given, self.common)
        gradients = scale, table, self.grad_qkv
        self.expected = self._expect(_named(out, gradients), dict(log_sums=log_sums, common=self.common))

    def _expect(self, ours: dict[str, Tensor], known: dict[str, Tensor]) -> dict[str, tuple[Tensor, float]]:
        """Each result in float64, and how far from it one may be.

        That is three times the error of the backend 'sdpa' or of `ours`, by the blocks in use, whichever is larger, and
        rounding on top of it, in case these errors happen to be small. `known` are results that other backends do not
        have: blocks change nothing but the order of their sums.
        """
        dtype, grad = self.grad_qkv.dtype, self.given[0]
        rounding = (16 if dtype == torch.float32 else 2) * torch.finfo(dtype).eps
        reference = functools.partial(reference_window_attention, sequential=True)
        exact = self._results(reference, [t.double() for t in self.inputs], grad.double())
        peer = self._results(sdpa_window_attention, self.inputs, grad)
        expected = {name: (value, rounding * _largest(value)) for name, value in known.items()}
        for name, value in exact.items():
            error = max(_distance(found[name], value) for found in (peer, ours))
            # the gradient of the scale is a sum over tokens of what cancels for the most part
            explained = 1e-4 if name == 'scale' else rounding
            expected[name] = value, 3 * error + explained * _largest(value)
        return expected

    def _results(self, attention: Callable[..., Tensor], inputs: Sequence[Tensor], grad: Tensor) -> dict[str, Tensor]:
        """Results of a backend by their names."""
        qkv, scale, table = (t.detach().clone().requires_grad_() for t in inputs)
        out = attention(qkv, scale, table, *self.sizes)
        out.backward(grad)
        return _named(out.detach(), (scale.grad, table.grad, qkv.grad))

    def run(self, kernel: str) -> list[Tensor]:
        """Call a kernel, and return what it writes: `RESULTS`."""
        if kernel == 'attend':
            return list(triton_backend.attend(*self.inputs, *self.sizes))
        if kernel == 'grad_bias':
            return [triton_backend.grad_bias(self.geometry, self.given, self.common)]
        queries, keys_and_values = _parts(self.grad_qkv).values()
        if kernel == 'grad_keys':
            triton_backend.grad_keys(self.geometry, self.given, self.common, self.grad_qkv)
            return [keys_and_values]
        if kernel == 'grad_queries':
            return [*triton_backend.grad_queries(self.geometry, self.given, self.grad_qkv), queries]
        return [*triton_backend.grad_all(self.geometry, self.given, self.grad_qkv), queries, keys_and_values]

    def is_right(self, kernel: str) -> bool:
        """Whether all that a kernel writes is as exact as can be expected."""
        self.grad_qkv.fill_(math.nan)
        results = zip(RESULTS[kernel], self.run(kernel), strict=True)
        return all(self._is_near(name, found) for name, found in results)

    def _is_near(self, name: str, found: Tensor) -> bool:
        value, limit = self.expected[name]
        return _distance(found, value) <= limit  # NaN is no small error


def _named(out: Tensor, gradients: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """Result and gradients of attention by the names of `RESULTS`."""
    scale, table, qkv = gradients
    return {'out': out, 'scale': scale, 'table': table, **_parts(qkv)}


def _parts(grad_qkv: Tensor) -> dict[str, Tensor]:
    return {'queries': grad_qkv[..., :1, :, :], 'keys and values': grad_qkv[..., 1:, :, :]}


def _distance(found: Tensor, exact: Tensor) -> float:
    return _largest(found.double().view_as(exact) - exact)


def _largest(tensor: Tensor) -> float:
    return float(tensor.abs().max())


def milliseconds(call: Callable[[], object]) -> float:
    """Median time of a call."""
    if torch.cuda.is_available():
        from triton.testing import do_bench

        return do_bench(call, warmup=20, rep=100, return_mode='median')
    start = time.perf_counter()
    call()
    return 1000 * (time.perf_counter() - start)


def measure(problem: Problem, kernel: str, chosen: TileConfig) -> float:
    """Time of a kernel with these blocks, or infinity where they do not work."""
    from triton import TritonError

    with mock.patch.object(triton_backend, 'choose_tiles', return_value=chosen):
        try:
            is_right = problem.is_right(kernel)
        except TritonError:  # more shared memory or registers than there are
            return math.inf
        if not is_right:
            print(f'  {kernel}: {chosen} gives other results and is left out')
            return math.inf
        return milliseconds(functools.partial(problem.run, kernel))


def tune(problem: Problem, kernel: str) -> tuple[float, dict[TileConfig, float]]:
    """Time of a kernel with the blocks by rule, and with each of the candidates."""
    geometry = problem.geometry
    rule = tiles.default_tiles(kernel, geometry.tokens, geometry.head_dim, geometry.dtype)
    times = {c: measure(problem, kernel, c) for c in {rule, *tiles.candidates(kernel, geometry.tokens)}}
    return times[rule], times


def keep(path: Path, device: str, found: dict[str, TileConfig]) -> None:
    """Add what was found to the file, whole or not at all."""
    known = json.loads(path.read_text()) if path.exists() else {}
    known.setdefault(device, {}).update(found)
    text = ',\n'.join(
        f'  {json.dumps(name)}: {{\n'
        + ',\n'.join(f'    {json.dumps(key)}: {json.dumps(value)}' for key, value in sorted(entries.items()))
        + '\n  }'
        for name, entries in known.items()
    )
    part = path.with_suffix('.part')
    part.write_text(f'{{\n{text}\n}}\n')
    part.replace(path)


def check(args: argparse.Namespace) -> list[tuple[int, ...]]:
    """Windows that were asked for.

    Raises:
        ValueError: One is no window, or there is nothing to run the kernels on.
    """
    if not triton_backend.HAS_TRITON:
        raise ValueError('the package triton is not installed: pip install triton')
    if not torch.cuda.is_available() and os.environ.get('TRITON_INTERPRET') != '1':
        raise ValueError('there is no GPU to tune kernels for; TRITON_INTERPRET=1 tries the tool out without one')
    windows = []
    for text in args.windows:
        sides = text.split('x')
        if len(sides) > triton_backend.MAX_AXES or not all(side.isdecimal() and int(side) > 0 for side in sides):
            raise ValueError(
                f'--windows: {text!r} is no window of up to {triton_backend.MAX_AXES} axes; write it as in 24x24'
            )
        windows.append(tuple(map(int, sides)))
    return windows


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(ValueError):
        windows = check(args)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else 'interpreter'
    end = time.monotonic() + 60 * args.minutes
    print('| window | type | kernel | blocks tried | by rule, ms | best, ms | block, step, warps, stages |')
    print('|---|---|---|---|---|---|---|')
    for window in windows:
        for dtype in args.dtypes:
            problem = Problem(window, args.head_dim, DTYPES[dtype])
            tokens = problem.geometry.tokens
            for kernel in (k for k in problem.geometry.kernels() if k in args.kernels):
                name = 'x'.join(map(str, window))
                if time.monotonic() > end:
                    print(f'{kernel} of {name} and what follows: no time left of {args.minutes:g} minutes')
                    return
                by_rule, times = tune(problem, kernel)
                best = min(times, key=times.get)
                print(
                    f'| {name} | {dtype} | {kernel} | {len(times)} | {by_rule:.3f} | {times[best]:.3f} '
                    f'| {", ".join(map(str, best))} |',
                    flush=True,
                )
                head_dim = tiles.next_power_of_2(args.head_dim)
                keep(args.out, device, {f'{kernel} {tokens} {head_dim} {DTYPES[dtype]}': best})


if __name__ == '__main__':
    main()

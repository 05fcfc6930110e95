"""Time of the attention operator without projections, with every backend.

python benchmarks/benchmark_operator.py --json operator.json

The shapes are those for which flash-window-attention-v2 (github.com/emiledgl/flash-window-attention-v2), Triton kernels
for windows that are partitioned already, publishes times of an H100: 16 feature maps of 4 windows, 6 heads of 32
channels, in float16. Ours also shifts, pads and reverses the window partition. The times are the median milliseconds of
the forward pass (without gradients), and of the forward and backward pass.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from measure import DEVICE, MIB, milliseconds, peak_memory
from results import machine
from torch import Tensor

from swinv2_mm.cli.errors import check_outputs, one_line_errors
from swinv2_mm.ops.files import write_whole
from swinv2_mm.ops.window_attention import BACKENDS, window_attention

BATCH, HEADS, HEAD_DIM = 16, 6, 32
WINDOWS = 8, 16, 24


def inputs(window: int, dtype: torch.dtype) -> list[Tensor]:
    """`qkv` of 2 x 2 windows, `logit_scale` and `bias_table`."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(BATCH, 2 * window, 2 * window, 3, HEADS, HEAD_DIM, generator=generator).to(dtype)
    table = 16 * torch.rand(HEADS, (2 * window - 1) ** 2, generator=generator)
    tensors = qkv, torch.full((HEADS, 1, 1), math.log(10)), table
    return [t.to(DEVICE).requires_grad_() for t in tensors]


def passes(backend: str, window: int, dtype: torch.dtype) -> dict[str, Callable[[], object]]:
    """Calls of the forward pass, and of the forward and backward pass, of a backend."""
    qkv, scale, table = inputs(window, dtype)
    sizes = (window, window), (window // 2, window // 2)
    grad_out = torch.ones(*qkv.shape[:-3], HEADS * HEAD_DIM, device=DEVICE, dtype=dtype)

    def forward() -> Tensor:
        return window_attention(qkv, scale, table, *sizes, backend)

    return {
        'forward': torch.no_grad()(forward),
        'forward_backward': lambda: torch.autograd.grad(forward(), (qkv, scale, table), grad_out),
    }


def measure(backend: str, window: int, dtype: torch.dtype) -> dict:
    """Milliseconds and peak memory of a backend, or why it cannot run."""
    row = dict(backend=backend, tokens=window**2, dtype=str(dtype).removeprefix('torch.'))
    reason = BACKENDS[backend].can_run(torch.empty(1, 1, 1, 3, 1, HEAD_DIM, device=DEVICE, dtype=dtype))
    if reason:
        return row | dict(note=f'not supported: {reason}')
    for name, step in passes(backend, window, dtype).items():
        row[name] = milliseconds(step)
        row[f'{name}_mib'] = peak_memory(step) / MIB
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--windows', type=int, nargs='+', default=WINDOWS, help='default: %(default)s')
    parser.add_argument('--json', type=Path, metavar='OUT', help='write the rows to this file')
    args = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        if min(args.windows) < 1:
            raise ValueError(f'--windows must be at least 1, got {args.windows}')
        check_outputs(args.json)
    dtype = torch.float16 if DEVICE == 'cuda' else torch.float32
    rows = []
    print('| tokens | backend | forward, ms | forward and backward, ms |\n|---|---|---|---|')
    for window in args.windows:
        for backend in BACKENDS:
            rows.append(measure(backend, window, dtype))
            figures = [rows[-1].get(name) for name in ('forward', 'forward_backward')]
            cells = [rows[-1]['note'], '-'] if 'note' in rows[-1] else [f'{ms:.3f}' for ms in figures]
            print(f'| {window**2} | {backend} | {" | ".join(cells)} |', flush=True)
    if args.json:
        write_whole(args.json, json.dumps(dict(machine=machine(), rows=rows), indent=1) + '\n')


if __name__ == '__main__':
    main()

"""Compile the Triton kernels of whole models without a GPU, and count their machine instructions.

python benchmarks/kernel_report.py                                # bf16 on sm_90, all shapes
python benchmarks/kernel_report.py --shapes b_w24_384 --dtypes float32 --archs sm_80 sm_100 --json out.json

The host code runs on meta tensors, stage by stage, with shifted windows in every second block and with the batch size
of the benchmarks. Each launch is compiled as Triton's JIT would compile it. A row of the first table is one compiled
kernel with all its launches in a model:

- registers, stack in bytes (spilled registers), shared memory, and resident programs per SM (occupancy);
- executed instructions per thread and logit of attention, by kind: those of the main loop (see `sass.split`) once per
  tile of logits, all others once per program. Branches inside the main loop count as taken. If warps compute the same
  tile twice, or the compiler unrolled the loop, `exp` is near 2. `loop` is the main loop only, per logit of its tile:
  the part of tiles outside of a window, and the code that runs once per program, count only in `total`;
- microseconds per image that each pipe of an H100 (SXM) is busy, whatever GPU the code is for, and the busiest pipe.
  It assumes that memory never stalls and that no two threads of a warp load the same address, which makes `lsu` too
  large in float32. The matrix products of sm_100 have no size in their names: `tensor` is 0 there. For kernels without
  matrix products only the bytes that they move count.

The second table sums the busiest pipes over a model, and gives lower bounds (floors) per image for any kernel:

- exp: logits / 16 per cycle and SM, once in the forward and once in the backward pass;
- tensor: 2 products of 2 * head_dim FLOP per logit forward and 5 backward, at 4096 FLOP per cycle and SM; in float32,
  without TF32 as is PyTorch's default, at the 256 of the FMA pipe;
- bytes: qkv read and out written forward; qkv, out and grad_out read and grad_qkv written backward; at 3.35 TB/s.
"""

import argparse
import itertools
import json
import math
import os
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import sass
import torch
from aot_compile import ARCHS, PARTITIONS, Job, Kernel, compile_all, job_of, programs_per_sm
from shapes import DTYPES, SHAPES, Shape, default_batch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from swinv2_mm.cli.errors import check_outputs, one_line_errors
from swinv2_mm.ops.files import write_whole
from swinv2_mm.ops.triton import attention
from swinv2_mm.ops.triton.launch import Launch, recorded

DEFAULT_SHAPES = (
    'b_w8_256',
    'b_w16_256',
    'b_w24_384',
    'l_w24_384',
    'b_w32_1024',
    'video_t_224x224x8',
    'video_t_320x320x8',
    'g_block_1536_w32',
)
SMS, CLOCK, BANDWIDTH = 132, 1.75e9, 3.35e12  # of an H100 SXM, per second
EXP_PER_CYCLE, FLOP_PER_CYCLE, FP32_PER_CYCLE = 16, 4096, 256  # of an SM


# ---------------------------------------------------------------- launches of a model


class Use(NamedTuple):
    """A launch in a model."""

    shape: str
    dtype: torch.dtype
    stage: int
    shifted: bool
    is_backward: bool
    launch: Launch
    per_image: float  # launches per image
    tokens: int  # of a window


class _HostCode(TorchDispatchMode):
    """Run the host code of this package's operators on meta tensors, instead of their fake implementations."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'swinv2_mm':
            return func.redispatch(torch._C.DispatchKeySet(torch._C.DispatchKey.CPU), *args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def launches_of(
    qkv: Tensor, table_size: int, window: Sequence[int], shift: Sequence[int]
) -> tuple[list[Launch], list[Launch]]:
    """Launches of the forward and of the backward pass of attention on meta tensors."""
    heads = qkv.shape[-2]
    scale, table = (torch.empty(shape, device='meta') for shape in ((heads, 1, 1), (heads, table_size)))
    inputs = [t.requires_grad_() for t in (qkv, scale, table)]
    with _HostCode(), recorded() as launches:
        out = attention.triton_window_attention(*inputs, tuple(window), tuple(shift))
        forward = len(launches)
        out.backward(torch.empty_like(out))
    return launches[:forward], launches[forward:]


def uses(name: str, shape: Shape, dtype: torch.dtype) -> list[Use]:
    """All launches of a model: each stage, without and with shifted windows."""
    batch, found = default_batch(shape, 'cuda'), []
    table_size = math.prod(2 * w - 1 for w in shape.window)
    for stage, depth in enumerate(shape.depths):
        heads, tokens = shape.arch['num_heads'][stage], math.prod(shape.effective_window(stage))
        qkv = torch.empty(
            batch, *shape.spatial_shape(stage), 3, heads, shape.dim(stage) // heads, dtype=dtype, device='meta'
        )
        shifted_blocks = depth // 2 if shape.spatial_shape(stage) != shape.effective_window(stage) else 0
        for shifted, blocks in ((False, depth - shifted_blocks), (True, shifted_blocks)):
            shift = [w // 2 if shifted else 0 for w in shape.window]
            passes = launches_of(qkv.detach(), table_size, shape.window, shift) if blocks else ([], [])
            found += [
                Use(name, dtype, stage, shifted, bool(i), launch, blocks / batch, tokens)
                for i, launches in enumerate(passes)
                for launch in launches
            ]
    return found


# ---------------------------------------------------------------- execution counts


def arguments_of(launch: Launch) -> dict[str, Any]:
    """Arguments of a launch by name, without constants."""
    names = [name for name in launch.kernel.arg_names if name not in launch.constants]
    return dict(zip(names, launch.args, strict=True))


def tile_of(launch: Launch) -> tuple[int, int]:
    """Queries and keys of an iteration of the main loop."""
    block_m = launch.constants['BLOCK_M']
    return block_m, launch.constants.get('BLOCK_N', block_m)


def logits_per_iteration(launch: Launch) -> int:
    """Logits of an iteration of the main loop."""
    return math.prod(tile_of(launch))


def windows_of(launch: Launch) -> int:
    """Pairs of a window and a head in a launch."""
    arguments = arguments_of(launch)
    if 'windows' in arguments:  # its programs loop over them
        return arguments['windows'] * arguments['heads']
    return launch.programs // -(-launch.constants['KEYS'] // launch.constants['BLOCK_M'])


def tiles_of(launch: Launch) -> int:
    """Tiles of logits that a launch computes."""
    if 'pairs' in launch.kernel.arg_names:  # of boxes of a window
        return windows_of(launch) * len(arguments_of(launch)['pairs'])
    if 'KEYS' not in launch.constants:
        return windows_of(launch)
    return launch.programs * (launch.constants['KEYS'] // launch.constants['BLOCK_N'])


def executed(use: Use, kernel: Kernel) -> Counter:
    """Instructions by kind and cycles by pipe as in `sass.count`, of all warps, per image."""
    programs = use.launch.programs
    runs = (kernel.once, programs), (kernel.around, programs), (kernel.loop, tiles_of(use.launch))
    total = Counter()
    for found, times in runs:
        for key, number in found.items():
            total[key] += number * times * kernel.warps * use.per_image
    return total


# ---------------------------------------------------------------- times


def microseconds(cycles: float) -> float:
    """Time of cycles that are spread over all partitions of the GPU."""
    return 1e6 * cycles / (PARTITIONS * SMS * CLOCK)


def bytes_of(launch: Launch, kernel: Kernel) -> int:
    """Memory traffic of a launch without loops: of its loads and stores, or the size of its tensors if that is less."""
    by_code = kernel.once['bytes'] * kernel.warps * launch.programs
    return min(by_code, sum(arg.nbytes for arg in launch.args if isinstance(arg, Tensor)))


def pipes_of(executions: Counter) -> dict[str, float]:
    """Microseconds of each pipe."""
    cycles = {**executions, 'fma': sass.fma_cycles(executions)}
    return {pipe: microseconds(cycles.get(pipe, 0)) for pipe in sass.PIPES}


def row(kernel: Kernel, arch: str, members: Sequence[Use]) -> dict[str, Any]:
    """The row of a compiled kernel with its launches in a model."""
    first = members[0]
    found = dict(
        shape=first.shape,
        kernel=first.launch.kernel.__name__,
        stages=' '.join(dict.fromkeys(f'{use.stage + 1}{"s" * use.shifted}' for use in members)),
        arch=arch,
        dtype=str(first.dtype).removeprefix('torch.'),
        is_backward=first.is_backward,
        warps=kernel.warps,
        registers=kernel.registers,
        stack=kernel.stack,
        shared=kernel.shared,
        programs_per_sm=programs_per_sm(arch, kernel.registers, kernel.shared, kernel.warps),
    )
    if not kernel.has_products:
        time = 1e6 * sum(bytes_of(use.launch, kernel) * use.per_image for use in members) / BANDWIDTH
        return dict(found, instructions={}, loop=None, microseconds={'bytes': time}, binds='bytes')
    executions = sum((executed(use, kernel) for use in members), Counter())
    logits = sum(windows_of(use.launch) * use.tokens**2 * use.per_image for use in members)
    kinds = {kind: 32 * executions[kind] / logits for kind in sass.KINDS}
    pipes = pipes_of(executions)
    return dict(
        found,
        instructions=dict(kinds, total=sum(kinds.values())),
        loop=32 * kernel.warps * kernel.loop['issue'] / logits_per_iteration(first.launch) or None,
        microseconds=pipes,
        binds=max(pipes, key=pipes.get),
    )


def floors(shape: Shape, dtype: torch.dtype) -> dict[str, tuple[float, float]]:
    """Lower bounds in microseconds per image, forward and backward; see the formulas at the top."""
    stages = list(enumerate(shape.depths))
    logits = sum(depth * shape.logits(i) for i, depth in stages)
    head_dim = shape.dim(0) // shape.arch['num_heads'][0]
    values = sum(depth * math.prod(shape.spatial_shape(i)) * shape.dim(i) for i, depth in stages)
    flop = FP32_PER_CYCLE if dtype == torch.float32 else FLOP_PER_CYCLE
    exponentials = logits / EXP_PER_CYCLE
    products = 2 * head_dim * logits / flop
    clock = 1e6 / (SMS * CLOCK)
    return {
        'exp': (exponentials * clock, exponentials * clock),
        'tensor': (2 * products * clock, 5 * products * clock),
        'bytes': tuple(1e6 * n * values * dtype.itemsize / BANDWIDTH for n in (4, 8)),
    }


def report(names: Sequence[str], dtypes: Sequence[str], archs: Sequence[str], jobs: int) -> tuple[list, list]:
    """The rows of the kernels, and of the models."""
    models = [(name, DTYPES[dtype]) for name in names for dtype in dtypes]
    found = {model: uses(model[0], SHAPES[model[0]], model[1]) for model in models}
    keys = {(model, arch): [job_of(use.launch, arch) for use in found[model]] for model in models for arch in archs}
    compiled = compile_all(itertools.chain(*keys.values()), jobs)
    kernels, totals = [], []
    for (model, arch), of_uses in keys.items():
        groups: dict[Job, list[Use]] = {}
        for use, job in zip(found[model], of_uses, strict=True):
            groups.setdefault(job, []).append(use)
        rows = [row(compiled[job], arch, members) for job, members in groups.items()]
        kernels += rows
        totals.append(summary(model, arch, rows))
    return kernels, totals


def summary(model: tuple[str, torch.dtype], arch: str, rows: Sequence[dict]) -> dict[str, Any]:
    """Time, lower bounds, and instructions per logit of each pass of a model."""
    name, dtype = model
    shape = SHAPES[name]
    logits = sum(depth * shape.logits(i) for i, depth in enumerate(shape.depths))
    found = dict(shape=name, arch=arch, dtype=str(dtype).removeprefix('torch.'))
    for i, key in enumerate(('forward', 'backward')):
        of_pass = [r for r in rows if r['is_backward'] == bool(i)]
        issued = sum(r['microseconds'].get('issue', 0) for r in of_pass) / microseconds(1)
        found[key] = dict(
            instructions=32 * issued / logits,
            microseconds=sum(r['microseconds'][r['binds']] for r in of_pass),
            floors={bound: pair[i] for bound, pair in floors(shape, dtype).items()},
        )
    return found


# ---------------------------------------------------------------- command line


def table(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ['---'] * len(header), *rows]
    return '\n'.join(f'| {" | ".join(map(text_of, line))} |' for line in lines)


def text_of(value: Any) -> str:
    """A number with three digits, or text."""
    if not isinstance(value, float):
        return '-' if value is None else str(value)
    return f'{value:.0f}' if value >= 100 else f'{value:.3g}'


def print_kernels(rows: Sequence[dict]) -> None:
    """Print a line for each kernel."""
    known = ('shape', 'arch', 'dtype', 'kernel', 'stages', 'warps', 'registers', 'stack', 'shared', 'programs_per_sm')
    names = ('shape', 'arch', 'type', 'kernel', 'stages (s: shifted)', 'warps', 'regs', 'stack', 'shared', 'per SM')
    header = (*names, *sass.KINDS, 'total', 'loop', *(f'{pipe} us' for pipe in sass.PIPES), 'binds')
    lines = [
        [
            *(r[name] for name in known),
            *(r['instructions'].get(kind) for kind in (*sass.KINDS, 'total')),
            r['loop'],
            *(r['microseconds'].get(pipe) for pipe in sass.PIPES),
            f'{r["binds"]} {text_of(r["microseconds"][r["binds"]])}',
        ]
        for r in rows
    ]
    print(table(header, lines))


def print_models(rows: Sequence[dict]) -> None:
    """Print a line for each model."""
    bounds = ('exp', 'tensor', 'bytes')
    header = ['shape', 'arch', 'type']
    for key in ('forward', 'backward'):
        header += [f'{key}: instructions', 'us', *(f'floor: {bound}' for bound in bounds)]
    lines = [
        [r['shape'], r['arch'], r['dtype']]
        + [
            x
            for key in ('forward', 'backward')
            for x in (r[key]['instructions'], r[key]['microseconds'], *r[key]['floors'].values())
        ]
        for r in rows
    ]
    print(table(header, lines))


def rounded(value: Any) -> Any:
    """The same with floats rounded to four digits."""
    if isinstance(value, dict):
        return {key: rounded(v) for key, v in value.items()}
    return float(f'{value:.4g}') if isinstance(value, float) else value


def write_json(path: str, parts: dict[str, Sequence[dict]]) -> None:
    """Write lists of rows, one row per line."""
    lists = [
        f'"{name}": [\n' + ',\n'.join(json.dumps(rounded(r)) for r in rows) + '\n]' for name, rows in parts.items()
    ]
    write_whole(path, '{\n' + ',\n'.join(lists) + '\n}\n')


def check(args: argparse.Namespace) -> None:
    """Check the arguments before anything is compiled.

    Raises:
        OSError: The file for results cannot be written.
        ValueError: An argument is wrong, or Triton cannot compile here.
    """
    if args.jobs < 1:
        raise ValueError(f'--jobs must be at least 1, got {args.jobs}')
    check_outputs(args.json)
    if not attention.HAS_TRITON:
        raise ValueError('the package triton is not installed: pip install triton')
    if os.environ.get('TRITON_INTERPRET') == '1':
        raise ValueError('TRITON_INTERPRET=1 interprets kernels instead of compiling them: unset it')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--shapes', nargs='+', default=DEFAULT_SHAPES, choices=SHAPES, metavar='SHAPE')
    parser.add_argument('--dtypes', nargs='+', default=['bfloat16'], choices=DTYPES)
    parser.add_argument('--archs', nargs='+', default=['sm_90'], choices=ARCHS)
    parser.add_argument('--jobs', type=int, default=os.cpu_count(), help='processes (default: %(default)s)')
    parser.add_argument('--json', metavar='OUT', help='write all rows to this file')
    args = parser.parse_args(argv)
    with one_line_errors(OSError, ValueError):
        check(args)
    kernels, models = report(args.shapes, args.dtypes, args.archs, args.jobs)
    print_kernels(kernels)
    print()
    print_models(models)
    if args.json:
        import triton

        machine = [dict(triton=triton.__version__, torch=torch.__version__, command=' '.join(sys.argv))]
        write_json(args.json, dict(made_with=machine, models=models, kernels=kernels))


if __name__ == '__main__':
    main()

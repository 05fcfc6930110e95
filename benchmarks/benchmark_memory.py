"""Memory and time of Swin V2 training: the effect of each memory-saving technique, and growth with the input.

python benchmarks/benchmark_memory.py --task techniques
python benchmarks/benchmark_memory.py --task sizes --plot sizes.png
python benchmarks/benchmark_memory.py --task full

`techniques` measures blocks and the first two stages of SwinV2-G with window 32. First with the attention backend
'reference', which keeps the attention weights of all windows for the backward pass: without any technique, with
sequential attention, with activation checkpointing, and with both. Then with the backend 'sdpa', which recomputes the
weights of a few windows at a time, and on a GPU with 'triton', which never stores them: with and without activation
checkpointing. `sizes` measures a whole backbone at inputs of growing size, in inference and in training. `full` is
SwinV2-G at 1536x1536, for a large GPU; choose its `--techniques`. `nano` is for trying the command out.

Memory is that of a step without parameters and their gradients: on a GPU, with autocast to bfloat16,
torch.cuda.max_memory_allocated; on a CPU, in float32, the bytes of all live tensors (`swinv2_mm.cli.memory`) and
the growth of the process's peak RSS. The "forecast" columns come from fake tensors, which have shapes but no memory.
"""

import argparse
import contextlib
import functools
import json
import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from measure import DEVICE, time_interleaved
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from swinv2_mm.cli.errors import check_outputs, one_line_errors
from swinv2_mm.cli.memory import (
    MemoryTracker,
    ZeroLoss,
    cuda_chunks,
    make_fake,
    make_gradients,
    measure_backbone,
    resident,
)
from swinv2_mm.models import SwinTransformerV2
from swinv2_mm.models.sizes import ARCHS
from swinv2_mm.ops.files import write_whole

GIB = 2**30
G_SIZE, G_WINDOW = 1536, 32  # SwinV2-G on COCO (A2.2)

# Parts of SwinV2-G: a block is a network of one block, with patches as large as the tokens of its stage. The last
# number is the image size for a CPU with 16 GiB.
PARTS = {
    'block of stage 1': (dict(embed_dims=512, depths=(1,), num_heads=(16,)), 4, 256),
    'block of stage 3': (dict(embed_dims=2048, depths=(1,), num_heads=(64,)), 16, 768),
    'stages 1 and 2': (dict(embed_dims=512, depths=(2, 2), num_heads=(16, 32)), 4, 256),
}
TASKS = {
    'techniques': PARTS,
    'full': {'SwinV2-G': (ARCHS['giant'], 4, G_SIZE)},
    'nano': {'nano': (dict(embed_dims=32, depths=(1, 1), num_heads=(1, 2)), 4, 64)},
}
TECHNIQUES = {  # attention backend, activation checkpointing, sequential attention
    'none': ('reference', False, False),
    'sequential': ('reference', False, True),
    'checkpointing': ('reference', True, False),
    'both': ('reference', True, True),
    'sdpa': ('sdpa', False, False),
    'sdpa + checkpointing': ('sdpa', True, False),
    'triton': ('triton', False, False),
    'triton + checkpointing': ('triton', True, False),
}


# ---------------------------------------------------------------- what is measured


def build(arch: dict | str, window: int, technique: str = 'none', patch: int = 4) -> SwinTransformerV2:
    """Build a backbone that uses a technique of `TECHNIQUES` in all stages."""
    backend, with_cp, sequential = TECHNIQUES[technique]
    stages = tuple(range(len((arch if isinstance(arch, dict) else ARCHS[arch])['depths'])))
    return SwinTransformerV2(
        arch,
        window_size=window,
        patch_size=patch,
        out_indices=stages,
        drop_path_rate=0.0,  # the time would be random
        with_cp=with_cp,
        attention_backend=backend,
        sequential_stages=stages if sequential else (),
    )


def part(name: str, technique: str) -> SwinTransformerV2:
    """Build a part of SwinV2-G."""
    arch, patch, _ = next(parts[name] for parts in TASKS.values() if name in parts)
    return build(arch, G_WINDOW, technique, patch)


def step(backbone: SwinTransformerV2, x: Tensor) -> None:
    """One forward and backward pass in training, or a forward pass in inference."""
    with torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda), torch.set_grad_enabled(backbone.training):
        loss = ZeroLoss.apply(*backbone(x))
    if backbone.training:
        loss.backward()


def forecast(make: Callable[[], SwinTransformerV2], size: int, gpu: bool) -> int:
    """Peak of a training step in bytes from fake tensors: as on a GPU in bfloat16, or a CPU in float32."""
    with torch.device('meta'):
        backbone = make().train()
    with FakeTensorMode(), cuda_chunks() if gpu else contextlib.nullcontext():
        memory = measure_backbone(make_fake(backbone), torch.empty(1, 3, size, size), bfloat16=gpu)
    return max(memory.forward_peak, memory.backward_peak)


def measured_peak(backbone: SwinTransformerV2, x: Tensor) -> int:
    """Peak memory of the tensors of a step in bytes, with the input."""
    if x.is_cuda:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated() - x.nbytes
        step(backbone, x)
        return torch.cuda.max_memory_allocated() - before
    with MemoryTracker() as tracker:
        tracker.watch([x])
        step(backbone, x)
    return tracker.peak


def ready(backbone: SwinTransformerV2, size: int, training: bool = True) -> tuple[SwinTransformerV2, Tensor]:
    """Move a backbone to the device, allocate its gradients for training, and make an input of `size`."""
    backbone = backbone.to(DEVICE).train(training)
    if training:
        make_gradients(backbone)
    return backbone, torch.rand(1, 3, size, size, device=DEVICE)


def measure_part(name: str, technique: str, size: int, repeats: int) -> dict[str, float]:
    """Peak memory of a training step of a part, and on a GPU its seconds.

    Call it in a new process: the peak RSS is that of the process, and its end frees the GPU.
    """
    if DEVICE == 'cuda':
        try:
            with torch.device(DEVICE):  # a CPU takes minutes to draw the weights of SwinV2-G
                backbone, x = ready(part(name, technique), size)
            return dict(allocated=measured_peak(backbone, x), seconds=fastest([lambda: step(backbone, x)], repeats)[0])
        except torch.cuda.OutOfMemoryError:
            return dict(allocated=math.nan, seconds=math.nan)
    backbone, x = ready(part(name, technique), size)
    before = resident('VmRSS')
    tracked = measured_peak(backbone, x)
    return dict(tracked=tracked, rss=resident('VmHWM') - before)


def fastest(steps: list[Callable[[], None]], repeats: int) -> list[float]:
    """Fastest seconds of each step, timed interleaved."""
    return [min(measured.times) for measured in time_interleaved(steps, repeats)]


# ---------------------------------------------------------------- tasks


def measure_techniques(
    parts: dict, names: Sequence[str], repeats: int, rows: list[dict], save: Callable[[list], None]
) -> None:
    """Measure each part with each technique, and append the rows that are missing: bytes and seconds, a dict for each.

    Args:
        parts: One of `TASKS`.
        names: Of `TECHNIQUES`.
        repeats: Timed steps.
        rows: Rows of this call, and of an earlier one that was stopped.
        save: Called with `rows` after each measurement.
    """
    for name, (_, _, cpu_size) in parts.items():
        size = G_SIZE if DEVICE == 'cuda' else cpu_size
        known = {row['technique'] for row in rows if row['part'] == name}
        added = []
        for technique in (technique for technique in names if technique not in known):
            row = dict(part=name, technique=technique, size=size)
            if TECHNIQUES[technique][0] != 'triton':  # fake tensors are on a CPU
                make = functools.partial(part, name, technique)
                row[f'forecast {G_SIZE}'] = forecast(make, G_SIZE, gpu=True)
                if DEVICE == 'cpu':
                    row['forecast'] = forecast(make, size, gpu=False)
            context = multiprocessing.get_context('spawn')
            with ProcessPoolExecutor(1, mp_context=context) as process:
                row |= process.submit(measure_part, name, technique, size, repeats).result()
            added.append(row)
            rows.append(row)
            save(rows)
        if DEVICE == 'cpu':
            models = [ready(part(name, row['technique']), size) for row in added]
            for row, seconds in zip(added, fastest([lambda m=m: step(*m) for m in models], repeats), strict=True):
                row['seconds'] = seconds
            save(rows)
        print_techniques([row for row in rows if row['part'] == name])


def print_techniques(group: list[dict]) -> None:
    """Print the rows of a part."""
    first = group[0]
    kinds = list(
        dict.fromkeys(key for row in group for key in row if key not in ('part', 'technique', 'size', 'seconds'))
    )
    name = f'{first["part"]} of SwinV2-G' if first['part'] in PARTS else first['part']
    print(f'\n{name}, window {G_WINDOW}, measured at {first["size"]}x{first["size"]} on the {DEVICE}')
    print(f'{"GiB":<22}' + ''.join(f'{kind:>15}' for kind in kinds) + f'{"seconds":>10}{"x first":>8}')
    for row in group:
        cells = ''.join(f'{row.get(kind, math.nan) / GIB:>15.3f}' for kind in kinds)
        seconds, base = row.get('seconds', math.nan), first.get('seconds', math.nan)
        print(f'{row["technique"]:<22}{cells}{seconds:>10.2f}{seconds / base:>8.2f}', flush=True)


def measure_sizes(arch: str, window: int, sides: list[int], repeats: int) -> list[dict]:
    """Memory and time of a backbone at square inputs: a dict for each size, in inference and in training."""
    rows = []
    print(f'{arch}, window {window}, 1 image, on the {DEVICE}; training with activation checkpointing')
    print(f'{"":<10}{"side":>6}{"seconds":>10}{"GiB":>9}{"us/pixel":>10}{"bytes/pixel":>12}')
    for training in (False, True):
        task = 'training' if training else 'inference'
        for side in sides:
            model = ready(build(arch, window, 'sdpa + checkpointing'), side, training)
            memory = measured_peak(*model)  # and warms up
            (seconds,) = fastest([lambda m=model: step(*m)], repeats)
            rows.append(dict(task=task, side=side, seconds=seconds, bytes=memory))
            print(
                f'{task:<10}{side:>6}{seconds:>10.2f}{memory / GIB:>9.3f}'
                f'{1e6 * seconds / side**2:>10.2f}{memory / side**2:>12.0f}',
                flush=True,
            )
    for task in ('inference', 'training'):
        slopes = ', '.join(f'{key} {slope(rows, task, key):.2f}' for key in ('seconds', 'bytes'))
        print(f'Power of the number of pixels that {task} grows with: {slopes}')
    return rows


def slope(rows: list[dict], task: str, key: str) -> float:
    """Slope of a log-log fit of `key` against the number of pixels; 1 is linear growth."""
    chosen = [row for row in rows if row['task'] == task]
    pixels = [math.log(row['side'] ** 2) for row in chosen]
    return float(np.polyfit(pixels, [math.log(row[key]) for row in chosen], 1)[0])


def plot(rows: list[dict], title: str, path: str) -> None:
    """Plot time and memory against pixels, with a line of linear growth through the first point of each curve."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt
    from matplotlib.ticker import NullLocator

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout='constrained')
    for axis, key, label, unit in zip(axes, ('seconds', 'bytes'), ('seconds', 'GiB'), (1, GIB), strict=True):
        for task, marker in (('inference', 'o'), ('training', 's')):
            chosen = [row for row in rows if row['task'] == task]
            pixels = np.array([row['side'] ** 2 for row in chosen])
            values = np.array([row[key] for row in chosen]) / unit
            (line,) = axis.loglog(pixels, values, marker, label=f'{task}, slope {slope(rows, task, key):.2f}')
            axis.loglog(pixels, values[0] * pixels / pixels[0], '--', color=line.get_color(), linewidth=1)
        axis.set_xticks(pixels, [f'{row["side"]}$^2$' for row in chosen])
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel('pixels')
        axis.set_ylabel(label)
        axis.legend()
        axis.grid(alpha=0.3, which='both')
    figure.suptitle(title + ' (dashed: linear in the pixels)')
    figure.savefig(path, dpi=110)


# ---------------------------------------------------------------- command line


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--task', choices=['sizes', *TASKS], default='techniques')
    parser.add_argument(
        '--techniques', nargs='+', choices=TECHNIQUES, help='only these (default: all that can run here)'
    )
    parser.add_argument('--repeats', type=int, default=3, help='timed steps; the fastest is reported (default: 3)')
    parser.add_argument('--arch', choices=list(ARCHS), default='tiny', help='backbone of `sizes` (default: tiny)')
    parser.add_argument('--window', type=int, default=16, help='window of `sizes` (default: 16)')
    parser.add_argument(
        '--sizes', type=int, nargs='+', default=[512, 768, 1024, 1536, 2048], help='sides of the inputs of `sizes`'
    )
    parser.add_argument('--json', metavar='OUT', help='write all results to this file, in bytes and seconds')
    parser.add_argument('--resume', action='store_true', help='measure only what is missing in the file of --json')
    parser.add_argument('--plot', metavar='OUT', help='plot the results of `sizes` to this file')
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check the arguments before anything is measured.

    Raises:
        OSError: A file for results cannot be written.
        ValueError: An argument is wrong.
    """
    if args.repeats < 1:
        raise ValueError(f'--repeats must be at least 1, got {args.repeats}')
    if args.window < 1:
        raise ValueError(f'--window must be at least 1, got {args.window}')
    if len(set(args.sizes)) < 2 or min(args.sizes) < 1:
        raise ValueError(f'--sizes must be at least two different positive numbers, got {args.sizes}')
    if args.plot and args.task != 'sizes':
        raise ValueError(f'--plot draws the results of --task sizes, not of --task {args.task}')
    if DEVICE == 'cpu' and any(TECHNIQUES[technique][0] == 'triton' for technique in args.techniques or ()):
        raise ValueError('--techniques triton needs a GPU')
    if args.task == 'full' and DEVICE == 'cpu':
        raise ValueError('--task full needs a GPU; plan_memory.py forecasts its memory without one')
    if args.resume and not args.json:
        raise ValueError('--resume needs --json, the file to continue')
    if args.task in TASKS and DEVICE == 'cpu' and sys.platform != 'linux':
        raise ValueError(
            f'--task {args.task} without a GPU reads the memory of a process from /proc, which needs Linux'
        )
    check_outputs(args.json, args.plot)


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with one_line_errors(OSError, ValueError):
        check(args)
    torch.manual_seed(0)

    def save(rows: list[dict]) -> None:
        if args.json:
            write_whole(args.json, json.dumps(rows, indent=1) + '\n')

    if args.task == 'sizes':
        rows = measure_sizes(args.arch, args.window, args.sizes, args.repeats)
        save(rows)
    else:
        can_run = [name for name, (backend, *_) in TECHNIQUES.items() if backend != 'triton' or DEVICE == 'cuda']
        rows = json.loads(Path(args.json).read_text()) if args.resume and Path(args.json).exists() else []
        measure_techniques(TASKS[args.task], args.techniques or can_run, args.repeats, rows, save)
    if args.plot:
        plot(rows, f'SwinV2 {args.arch}, window {args.window}', args.plot)


if __name__ == '__main__':
    main()

"""Memory that training a config takes on each GPU, with and without each memory-saving technique; needs no GPU or data.

python tools/analysis_tools/plan_memory.py configs/det/htc_swinv2_g.py --gpus 8 --gpu-mem 40
python tools/analysis_tools/plan_memory.py configs/det/cascade_mask_rcnn_swinv2_t.py --gpus 8 --shape 800 1333

How memory is estimated: `swinv2_mm/cli/memory_plan.py`. One GiB is 2**30 bytes; a "40 GB" GPU has about 40 GiB.
"""

import argparse
from collections.abc import Sequence

from mmengine.config import Config, DictAction

import swinv2_mm  # noqa: F401  before any toolbox: it applies workarounds that the toolboxes' imports need
from swinv2_mm.cli import classes, launch
from swinv2_mm.cli.inputs import OBJECTS, join_numbers, training_shape
from swinv2_mm.cli.memory_plan import (
    CUDA_CONTEXT,
    FLOAT32,
    GIB,
    MAX_HEAD_SAMPLES,
    Activations,
    ModelSize,
    activations,
    configured_strategy,
    is_bfloat16,
    model_size,
    model_states,
    optimizer_slots,
)

# ---------------------------------------------------------------- output


def _row(name: str, values: Sequence[float], width: int = 11) -> str:
    return f'{name:<30}' + ''.join(f'{value / GIB:>{width}.2f}' for value in values)


def report(cfg: Config, shape: tuple[int, ...], gpus: int, gpu_mem: float, rows: list[Activations]) -> str:
    """Tables of the activations, of the model states, and of the total on each GPU for every combination of both."""
    model = model_size(cfg)
    stages = [f'stage {i + 1}' for i in range(len(rows[0].backbone.kept) - 1)]
    precision = 'bfloat16' if is_bfloat16(cfg) else 'float32'
    lines = [
        f'{cfg.train_dataloader.batch_size} x {join_numbers(shape)} on each of {gpus} GPUs of {gpu_mem:g} GiB, '
        f'{precision}; {model.parameters / FLOAT32 / 1e6:.1f} M parameters, '
        f'{model.trained / FLOAT32 / 1e6:.1f} M trained.',
        'All figures in GiB per GPU; < marks the settings of the config, + totals that fit.',
        '',
        f'{"Activations kept":<30}'
        + ''.join(f'{name:>11}' for name in ('patches', *stages, 'heads', 'backward', 'peak')),
    ]
    for row in rows:
        values = [*row.backbone.kept, row.heads, row.backbone.backward_peak, row.peak]
        lines.append(_row(row.name, values) + ' <' * row.is_config)
    columns = ('parameters', 'gradients', 'optimizer', 'others', 'state')
    lines += ['', f'{"Model states":<30}' + ''.join(f'{name:>11}' for name in columns)]
    strategies = model_states(model, gpus)
    for s in strategies:
        values = (s.parameters, s.gradients, s.optimizer, s.others, s.total)
        lines.append(_row(s.name, values) + ' <' * (s.name == configured_strategy(cfg)))
    lines += ['', f'{"Total":<30}' + ''.join(f'{s.name:>11}' for s in strategies)]
    for row in rows:
        totals = [s.total + row.peak + CUDA_CONTEXT for s in strategies]
        cells = [f'{total / GIB:>9.2f}{" +" if total <= gpu_mem * GIB else "  "}' for total in totals]
        lines.append(f'{row.name:<30}' + ''.join(cells) + ' <' * row.is_config)
    return '\n'.join([*lines, '', *_notes(cfg, model)])


def _notes(cfg: Config, model: ModelSize) -> list[str]:
    notes = [
        'Heads: neck and heads, forward and backward, in addition to what the backbone keeps. Backward: backbone.',
        'Others: buckets of DDP; bucket and second copy of DeepSpeed; blocks gathered by FSDP; copy of an EMAHook '
        f'({"included" if model.ema else "none in this config"}).',
        f'The total includes {CUDA_CONTEXT / GIB:g} GiB for CUDA and NCCL (assumed). Not counted: kernel workspaces, '
        'fragmentation.',
    ]
    if cfg.default_scope == 'mmdet':
        notes.append(f'Heads: with {OBJECTS} objects per image.')
    if cfg.train_dataloader.batch_size > MAX_HEAD_SAMPLES:
        notes.append(f'Heads: extrapolated from batches of up to {MAX_HEAD_SAMPLES} samples.')
    return notes


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('config', help='config file')
    parser.add_argument('--gpus', type=int, default=8, help='number of GPUs (default: 8)')
    parser.add_argument('--gpu-mem', type=float, default=40, help='memory of a GPU in GiB (default: 40)')
    parser.add_argument(
        '--shape',
        type=int,
        nargs='+',
        metavar='N',
        help='size of a sample: one side of a square, H W, or for video T H W (default: the size in the config)',
    )
    parser.add_argument('--cfg-options', nargs='+', action=DictAction, help='change the config: key=value')
    return parser.parse_args(argv)


def check(args: argparse.Namespace, cfg: Config) -> tuple[int, ...]:
    """Check the arguments and the config; returns the shape of a sample.

    Raises:
        ValueError: An argument is out of range, or the config is not supported.
    """
    if args.gpus < 1:
        raise ValueError(f'--gpus must be at least 1, got {args.gpus}')
    if args.gpu_mem <= 0:
        raise ValueError(f'--gpu-mem must be more than 0, got {args.gpu_mem:g}')
    shape = training_shape(cfg, args.shape)
    backbone = cfg.model.get('backbone', {}).get('type')
    if not str(backbone).startswith('swinv2_mm.'):
        raise ValueError(f'model.backbone.type must be a backbone of swinv2_mm, got {backbone!r}')
    classes.check_classes(cfg, parts=['model'])
    optimizer_slots(cfg)
    return shape


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(FileNotFoundError, ModuleNotFoundError, ValueError):
        cfg = launch.load_config(args.config, args.cfg_options)
        shape = check(args, cfg)
    print(report(cfg, shape, args.gpus, args.gpu_mem, activations(cfg, shape)))


if __name__ == '__main__':
    main()

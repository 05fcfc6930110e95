"""Plot the position bias of a checkpoint: every stage at several windows.

python tools/analysis_tools/plot_position_bias.py swinv2_base_patch4_window12_192_22k.pth --windows 12 24 32

A cell shows the bias (0 to 16) of all heads of a stage's last block at each offset between two tokens of the window,
with offset (0, 0) in the middle. A red frame bounds the offsets of pre-training; the bias outside is extrapolated.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

from swinv2_mm.checkpoints import load_swinv2_state_dict
from swinv2_mm.checkpoints.conversion import write_windows
from swinv2_mm.checkpoints.layouts import depths
from swinv2_mm.cli import launch
from swinv2_mm.cli.errors import check_outputs
from swinv2_mm.models.log_cpb import LogCPB

BIAS_RANGE = (0, 16)
OPTION = '--pretrained-window-sizes'


def mlp_prefix(state_dict: dict[str, Tensor], stage: int) -> str:
    """Prefix of the keys of the Log-CPB in a stage's last block."""
    return f'layers.{stage}.blocks.{depths(state_dict)[stage] - 1}.attn.cpb_mlp.'


def pretrained_window(state_dict: dict[str, Tensor], stage: int) -> tuple[int, ...]:
    """Window along each axis that a stage was pre-trained with.

    Raises:
        ValueError: It is unknown.
    """
    entry = state_dict.get(mlp_prefix(state_dict, stage) + 'pretrained_window_size')
    if entry is None or (entry == 0).any():
        raise ValueError(
            f'the pre-training window of stage {stage} is not in the checkpoint, and another one gives another bias; '
            f'pass one number per stage, for example {OPTION} 12 12 12 6'
        )
    return tuple(entry.tolist())


def bias_maps(state_dict: dict[str, Tensor], stage: int, window: int) -> Tensor:
    """Position bias of a stage's last block in a square window.

    Args:
        state_dict: Weights of `load_swinv2_state_dict`, with the pre-training windows.
        stage: Stage, counted from 0.
        window: Tokens along each axis. A video backbone's bias is that within one frame.

    Returns:
        (heads, 2 * window - 1, 2 * window - 1) in float32: entry (window - 1 + dy, window - 1 + dx) belongs to a query
        dy rows below and dx columns right of its key.
    """
    prefix = mlp_prefix(state_dict, stage)
    weights = {name: state_dict[prefix + name].float() for name in ('0.weight', '0.bias', '2.weight')}
    pretrained = pretrained_window(state_dict, stage)
    mlp = LogCPB((1,) * (len(pretrained) - 2) + (window, window), pretrained, len(weights['2.weight']))
    mlp.load_state_dict({**mlp.state_dict(), **weights})
    with torch.inference_mode():
        return mlp().view(-1, 2 * window - 1, 2 * window - 1)


def mosaic(maps: np.ndarray) -> tuple[np.ndarray, list[tuple[int, int]]]:
    """Lay maps out in a near-square grid with separators of NaN; also returns the top left corner of each map."""
    heads, side = maps.shape[:2]
    columns = math.ceil(math.sqrt(heads))
    rows = math.ceil(heads / columns)
    step = side + max(1, side // 20)
    canvas = np.full((rows * step, columns * step), np.nan, np.float32)
    corners = [(i // columns * step, i % columns * step) for i in range(heads)]
    for (top, left), values in zip(corners, maps, strict=True):
        canvas[top : top + side, left : left + side] = values
    return canvas[: rows * step - (step - side), : columns * step - (step - side)], corners


def draw_cell(axes: Axes, maps: np.ndarray, pretrained: tuple[int, ...]) -> AxesImage:
    """Draw the maps of all heads, with the offsets along the first one."""
    canvas, corners = mosaic(maps)
    image = axes.imshow(canvas, vmin=BIAS_RANGE[0], vmax=BIAS_RANGE[1], cmap='viridis')
    window = (maps.shape[1] + 1) // 2
    offsets = sorted({1 - window, 0, window - 1})
    ticks = [offset + window - 1 for offset in offsets]
    axes.set_xticks(ticks, offsets)
    axes.set_yticks(ticks, offsets)
    axes.tick_params(labelsize=6, length=2, top=True, labeltop=True, bottom=False, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    height, width = (2 * p - 1 for p in pretrained[-2:])
    if height < maps.shape[1] or width < maps.shape[2]:
        middle = window - 1
        frames = [
            Rectangle((left + middle - width / 2, top + middle - height / 2), width, height) for top, left in corners
        ]
        axes.add_collection(PatchCollection(frames, facecolor='none', edgecolor='red', linewidth=0.5))
    return image


def draw(maps: list[list[np.ndarray]], windows: list[int], pretrained: list[tuple[int, ...]]) -> Figure:
    """Draw a row per stage and a column per window.

    Args:
        maps: What `bias_maps` returns, for each stage and each window.
        windows: The windows.
        pretrained: Pre-training window of each stage.
    """
    # without pyplot the figure belongs to the Agg canvas, which needs no display
    figure = Figure(figsize=(3.2 * len(windows) + 1.2, 3.2 * len(maps) + 0.6), layout='constrained')
    cells = figure.subplots(len(maps), len(windows), squeeze=False)
    for stage, row in enumerate(maps):
        for axes, values in zip(cells[stage], row, strict=True):
            image = draw_cell(axes, values, pretrained[stage])
        heads = len(row[0])
        cells[stage, 0].set_ylabel(
            f'stage {stage}\npre-trained with {_times(pretrained[stage][-2:])}\n{heads} head{"s" * (heads > 1)}'
        )
    for axes, window in zip(cells[0], windows, strict=True):
        axes.set_title(f'window {_times((window, window))}')
    figure.supxlabel('offset of the query from the key, in tokens: columns to the right, rows downwards', fontsize=8)
    figure.colorbar(image, ax=cells, label='position bias', shrink=0.6)
    return figure


def _times(window: Sequence[int]) -> str:
    return ' x '.join(map(str, window))


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='weights in any known layout: a file, or swinv2://NAME')
    parser.add_argument('--windows', type=int, nargs='+', required=True, metavar='N', help='windows, in tokens a side')
    parser.add_argument(
        '--out', type=Path, default=Path('position_bias.png'), help='picture to write (default: %(default)s)'
    )
    parser.add_argument(
        OPTION,
        type=int,
        nargs='+',
        metavar='N',
        help='pre-training window of each stage, for a checkpoint without it',
    )
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check the arguments before the checkpoint is read.

    Raises:
        OSError: The picture cannot be written.
        ValueError: A window, or the format of the picture, is not supported.
    """
    if min(args.windows) < 1:
        raise ValueError(f'--windows must be at least 1, got {min(args.windows)}')
    check_picture(args.out)


def check_picture(path: Path) -> None:
    """Check before a long computation that `--out` can be written as a picture.

    Raises:
        OSError: The file cannot be written.
        ValueError: The format is not supported.
    """
    check_outputs(path)
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise ValueError(f'--out {path}: the file must end in one of .{", .".join(kinds)}')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(OSError, ValueError):
        check(args)
        state_dict = load_swinv2_state_dict(args.checkpoint)
        if args.pretrained_window_sizes:
            state_dict = write_windows(state_dict, args.pretrained_window_sizes)
        stages = range(len(depths(state_dict)))
        pretrained = [pretrained_window(state_dict, stage) for stage in stages]
    maps = [[bias_maps(state_dict, stage, window).numpy() for window in args.windows] for stage in stages]
    draw(maps, args.windows, pretrained).savefig(args.out, dpi=200, bbox_inches='tight')
    for stage in stages:
        ranges = [
            f'{values.min():.2f} to {values.max():.2f} at {window}'
            for window, values in zip(args.windows, maps[stage], strict=True)
        ]
        print(f'stage {stage}, pre-trained with {_times(pretrained[stage][-2:])}: bias {", ".join(ranges)}')
    print(args.out)


if __name__ == '__main__':
    main()

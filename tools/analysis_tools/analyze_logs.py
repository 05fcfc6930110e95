"""Curves and times of trainings, from the logs that mmengine writes to <work folder>/<time>/vis_data/<time>.json.

python tools/analysis_tools/analyze_logs.py plot_curve LOG.json --keys loss bbox_mAP --out curves.png
python tools/analysis_tools/analyze_logs.py cal_train_time LOG.json

The commands and flags are those of mmdet's script. That script needs seaborn, and confuses training and validation in
the logs of mmseg, whose metrics have no prefix. This one reads the logs of all four toolboxes.
"""

import argparse
import json
import os
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

import matplotlib
import numpy as np

from swinv2_mm.cli import launch
from swinv2_mm.cli.errors import check_outputs

MAIN_METRICS = ('bbox_mAP', 'mIoU', 'top1')
STYLES = ('dark', 'white', 'ticks', 'darkgrid', 'whitegrid')


@dataclass
class Log:
    """Contents of a log file.

    Attributes:
        path: The file.
        train: Records of the training, in order.
        validation: For each validation the training iteration before it, and its record.
    """

    path: str
    train: list[dict] = field(default_factory=list)
    validation: list[tuple[int, dict]] = field(default_factory=list)

    def names(self) -> list[str]:
        """Keys of all values that can be plotted."""
        lines = [*self.train, *(line for _, line in self.validation)]
        return sorted({k for line in lines for k, v in line.items() if isinstance(v, (int, float))})


def read_log(path: str) -> Log:
    """Read a log file of mmengine.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not such a log.
    """
    if not os.path.isfile(path):
        raise FileNotFoundError(f'log {path} does not exist')
    log = Log(path)
    with open(path, encoding='utf-8') as file:
        for number, text in enumerate(file, start=1):
            try:
                line = json.loads(text)
            except ValueError:  # JSONDecodeError, or UnicodeDecodeError
                line = None
            if not isinstance(line, dict):
                raise ValueError(
                    f'{path}, line {number} is not a JSON object; a log is <work folder>/<time>/vis_data/<time>.json'
                )
            if 'iter' in line:  # only in records of the training
                log.train.append(line)
            elif 'step' in line and len(line) > 1:
                log.validation.append((log.train[-1]['step'] if log.train else 0, line))
    if not log.train and not log.validation:
        raise ValueError(f'{path} contains no record of a training or validation')
    return log


def find_key(log: Log, key: str) -> str:
    """Find a key of the log, with or without its prefix: 'bbox_mAP' finds 'coco/bbox_mAP'.

    Raises:
        ValueError: There is no such key, or several have this name after their prefix.
    """
    names = log.names()
    found = [key] if key in names else [name for name in names if name.split('/')[-1] == key]
    if len(found) != 1:
        what = f'more than one {key}: {", ".join(found)}' if found else f'no {key}; it has {", ".join(names)}'
        raise ValueError(f'{log.path} has {what}')
    return found[0]


def curve(log: Log, key: str, start_epoch: int = 1) -> tuple[list[int], list[float], bool]:
    """Points of a curve.

    Args:
        log: The log.
        key: A key, see `find_key`. Of a key that training and validation both log, such as `time`, the training's
            values are returned.
        start_epoch: The first epoch of the curve. Iteration-based trainings have no epochs.

    Returns:
        Iterations, values, and whether the key is a metric of the validation.
    """
    name = find_key(log, key)
    points = [(line['step'], line[name]) for line in log.train if name in line and _epoch(line) >= start_epoch]
    if any(name in line for line in log.train):
        return [x for x, _ in points], [y for _, y in points], False
    start = min((line['step'] for line in log.train if _epoch(line) >= start_epoch), default=0)
    points = [(x, line[name]) for x, line in log.validation if name in line and x >= start]
    return [x for x, _ in points], [y for _, y in points], True


def _epoch(line: dict) -> int:
    return line.get('epoch', sys.maxsize)


def plot_curve(logs: list[Log], args: argparse.Namespace) -> None:
    """Draw curves of the logs over iterations; the x of a validation is the last logged iteration before it.

    Raises:
        ValueError: A key is missing, or the number of names in the legend is wrong.
    """
    from matplotlib import pyplot as plt

    keys = args.keys or [_main_key(logs[0])]
    names = args.legend or [f'{log.path}_{key}' for log in logs for key in keys]
    if len(names) != len(logs) * len(keys):
        raise ValueError(f'--legend must name {len(logs) * len(keys)} curves, got {len(names)}')
    curves = [curve(log, key, args.start_epoch) for log in logs for key in keys]
    plt.style.use(f'seaborn-v0_8-{args.style}')
    figure, axes = plt.subplots(layout='constrained')
    for (xs, ys, validation), name in zip(curves, names, strict=True):
        axes.plot(xs, ys, label=name, marker='o' if validation or len(xs) == 1 else None, linewidth=1)
    axes.set_xlabel('iter')
    axes.legend()
    if args.title:
        axes.set_title(args.title)
    if args.out:
        figure.savefig(args.out, dpi=150)
        print(f'save curve to: {args.out}')
    else:
        plt.show()


def _main_key(log: Log) -> str:
    """The main metric of the toolbox, or the loss."""
    last = [name.split('/')[-1] for name in log.names()]
    return next((metric for metric in MAIN_METRICS if last.count(metric) == 1), 'loss')


def train_times(log: Log, include_outliers: bool = False) -> dict[int, float]:
    """Mean seconds per iteration of each epoch; an iteration-based training is one epoch.

    Args:
        log: The log.
        include_outliers: Whether to include the first record of every epoch, during which data workers start.

    Raises:
        ValueError: There are no records to average.
    """
    times = defaultdict(list)
    for line in log.train:
        if 'time' in line:
            times[line.get('epoch', 1)].append(line['time'])
    times = {epoch: values if include_outliers else values[1:] for epoch, values in times.items()}
    means = {epoch: float(np.mean(values)) for epoch, values in times.items() if values}
    if not means:
        raise ValueError(
            f'{log.path} has at most one record per epoch, and the first is excluded: '
            'add --include-outliers, or train with a shorter interval of default_hooks.logger'
        )
    return means


def cal_train_time(logs: list[Log], args: argparse.Namespace) -> None:
    """Print the times of the logs.

    Raises:
        ValueError: See `train_times`.
    """
    for log in logs:
        times = train_times(log, args.include_outliers)
        slowest, fastest = max(times, key=times.get), min(times, key=times.get)
        print(f'-----Analyze train time of {log.path}-----')
        print(f'slowest epoch {slowest}, average time is {times[slowest]:.4f} s/iter')
        print(f'fastest epoch {fastest}, average time is {times[fastest]:.4f} s/iter')
        print(f'time std over epochs is {np.std(list(times.values())):.4f}')
        print(f'average iter time: {np.mean(list(times.values())):.4f} s/iter\n')


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tasks = parser.add_subparsers(dest='task', required=True)
    plot = tasks.add_parser('plot_curve', help='draw curves')
    times = tasks.add_parser('cal_train_time', help='average time of an iteration')
    for task in (plot, times):
        task.add_argument('json_logs', nargs='+', help='log files')
    plot.add_argument(
        '--keys', nargs='+', help='what to plot, without its prefix or with it (default: bbox_mAP, mIoU, top1 or loss)'
    )
    plot.add_argument('--start-epoch', type=int, default=1, help='first epoch to plot (default: 1)')
    plot.add_argument('--eval-interval', help=argparse.SUPPRESS)  # a flag of mmdet's script, not needed here
    plot.add_argument('--title', help='title of the figure')
    plot.add_argument('--legend', nargs='+', help='name of each curve (default: log and key)')
    plot.add_argument('--backend', help='backend of matplotlib')
    plot.add_argument('--style', choices=STYLES, default='dark', help='style of the figure (default: dark)')
    plot.add_argument('--out', help='file to write instead of opening a window')
    times.add_argument('--include-outliers', action='store_true', help='include the first record of every epoch')
    return parser.parse_args(argv)


def check(args: argparse.Namespace) -> None:
    """Check the output before the logs are read, and set the backend of matplotlib.

    Raises:
        OSError: The figure cannot be written.
        ValueError: There is neither --out nor a display, or matplotlib does not support the backend or file type.
    """
    if args.task != 'plot_curve':
        return
    if args.backend or args.out:
        matplotlib.use(args.backend or 'agg')
    from matplotlib import pyplot as plt

    if args.out:
        check_outputs(args.out)
        kinds = plt.gcf().canvas.get_supported_filetypes()
        plt.close()
        if os.path.splitext(args.out)[1][1:].lower() not in kinds:
            raise ValueError(f'--out {args.out}: the file must end in one of .{", .".join(kinds)}')
    elif matplotlib.get_backend().lower() == 'agg':
        raise ValueError('there is no display for a window: use --out FILE.png')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    args = parse_args(argv)
    with launch.one_line_errors(ImportError, OSError, ValueError):
        check(args)
        logs = [read_log(path) for path in args.json_logs]
        {'plot_curve': plot_curve, 'cal_train_time': cal_train_time}[args.task](logs, args)


if __name__ == '__main__':
    main()

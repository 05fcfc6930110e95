"""Results of a comparison: rows, Markdown tables, JSON and a plot."""

import contextlib
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch
from measure import DEVICE, MIB

from swinv2_mm.ops.files import write_whole

PROFILED = 12  # operators of a profile that get a line


@dataclass
class Row:
    """Result of an implementation: seconds, bytes and errors relative to the largest value; None if not measured."""

    case: str
    mode: str
    implementation: str
    batch: int
    dtype: str
    note: str = ''
    errors: dict[str, float] = field(default_factory=dict)
    seconds: float | None = None
    iqr: float | None = None
    images_per_second: float | None = None
    relative: float | None = None
    peak_bytes: int | None = None
    share_of_peak: float | None = None
    compile_seconds: float | None = None
    operators: dict[str, float] = field(default_factory=dict)


def print_table(rows: list[Row]) -> None:
    """Print the rows of a case and mode in Markdown."""
    first = rows[0]
    base = next((row.implementation for row in rows if row.relative == 1.0), 'none')
    print(f'\n{first.case}, {first.mode}, batch {first.batch}, {first.dtype}, {DEVICE}\n')
    names = ('implementation', 'ms', 'IQR', 'img/s', f'x {base}', 'peak MiB', '% of peak', 'compile s')
    names += tuple(f'{key} error' for key in next((row.errors for row in rows if row.errors), {}))
    width = max(len(names[0]), *(len(row.implementation) for row in rows))
    print('|', ' | '.join([f'{names[0]:<{width}}', *(f'{name:>9}' for name in names[1:])]), '|')
    print('|', ' | '.join(['-' * width, *('-' * max(9, len(name)) for name in names[1:])]), '|')
    for row in rows:
        cells = [f'{cell:>{max(9, len(name))}}' for cell, name in zip(_cells(row), names[1:], strict=False)]
        print('|', ' | '.join([f'{row.implementation:<{width}}', *cells]), '|', flush=True)


def _cells(row: Row) -> list[str]:
    errors = [f'{value:.1e}' for value in row.errors.values()]
    if row.note:
        return [row.note, *['-'] * 6, *errors]
    return [
        f'{1000 * row.seconds:.2f}',
        f'{1000 * row.iqr:.2f}',
        f'{row.images_per_second:.2f}',
        f'{row.relative:.2f}',
        f'{row.peak_bytes / MIB:.0f}',
        f'{100 * row.share_of_peak:.1f}',
        '-' if row.compile_seconds is None else f'{row.compile_seconds:.1f}',
        *errors,
    ]


def print_profile(rows: list[Row]) -> None:
    """Print the time of each row in the largest operators of all rows."""
    first, rows = rows[0], [row for row in rows if row.operators]
    largest = {name: max(row.operators.get(name, 0) for row in rows) for row in rows for name in row.operators}
    names = sorted(largest, key=largest.get, reverse=True)[:PROFILED]
    print(f'\n{first.case}, {first.mode}: ms in operators\n')
    print('| operator |', ' | '.join(row.implementation for row in rows), '|')
    print('| --- |', ' | '.join('---' for _ in rows), '|')
    for name in names:
        print(f'| `{name}` |', ' | '.join(f'{1000 * row.operators.get(name, 0):.1f}' for row in rows), '|')
    rest = [sum(value for name, value in row.operators.items() if name not in names) for row in rows]
    print('| all others |', ' | '.join(f'{1000 * value:.1f}' for value in rest), '|', flush=True)


def machine() -> dict:
    """The machine and the versions that the results depend on."""
    versions = dict(python=platform.python_version())
    for package in ('torch', 'triton', 'timm', 'transformers', 'torchvision'):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    cpu = platform.processor()
    if sys.platform == 'linux':
        cpu = next(re.finditer(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()), [None, cpu])[1]
    gpu = torch.cuda.get_device_name() if DEVICE == 'cuda' else None
    if gpu:
        query = ['nvidia-smi', '--query-gpu=driver_version', '--format=csv,noheader']
        versions['driver'] = subprocess.run(query, capture_output=True, text=True, check=False).stdout.split('\n')[0]
    return dict(cpu=cpu, gpu=gpu, cores=os.cpu_count(), threads=torch.get_num_threads(), versions=versions)


def write_json(rows: list[Row], peak: float, path: str | Path) -> None:
    """Write all rows, with the machine and the command line."""
    content = dict(
        machine=machine() | dict(peak_flops=peak),
        command=shlex.join(sys.argv),
        rows=[asdict(row) for row in rows],
    )
    write_whole(path, json.dumps(content, indent=1) + '\n')


def plot(rows: list[Row], path: str) -> None:
    """Plot images per second relative to the base of the tables: a panel per mode, a group of bars per case."""
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot as plt

    modes = list(dict.fromkeys(row.mode for row in rows))
    cases = list(dict.fromkeys(row.case for row in rows))
    names = list(dict.fromkeys(row.implementation for row in rows))
    figure, axes = plt.subplots(
        len(modes), figsize=(4.5 + 1.6 * len(cases), 1 + 3 * len(modes)), layout='constrained', squeeze=False
    )
    width = 0.85 / len(names)
    for axis, mode in zip(axes[:, 0], modes, strict=True):
        for place, name in enumerate(names):
            speeds = {row.case: row.relative or 0 for row in rows if (row.mode, row.implementation) == (mode, name)}
            left = [i + (place - (len(names) - 1) / 2) * width for i in range(len(cases))]
            axis.bar(left, [speeds.get(case, 0) for case in cases], width, label=name, color=f'C{place}')
        axis.axhline(1, color='black', linewidth=0.8)
        axis.set_xticks(range(len(cases)), cases)
        axis.set_ylabel('relative img/s')
        axis.set_title(mode)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc='outside lower center', fontsize='small', ncols=3)
    figure.savefig(path, dpi=110)
    plt.close(figure)

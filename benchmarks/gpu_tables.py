"""Write the results of gpu_run.sh as tables in Markdown.

python benchmarks/gpu_tables.py OUT > tables.md
python benchmarks/gpu_tables.py --versions

Stages without results have no table. The table of the operator also has the times that the author of
flash-window-attention-v2 (github.com/emiledgl/flash-window-attention-v2) publishes.
"""

import argparse
import importlib.metadata
import json
import platform
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

from swinv2_mm.cli.errors import one_line_errors

PACKAGES = 'torch', 'triton', 'timm', 'transformers', 'numpy'
# milliseconds forward, and forward and backward, by tokens of a window, in float16 on an H100
PUBLISHED = {
    'flash-window-attention-v2 (published)': {64: (0.073, 0.818), 256: (0.226, 2.37), 576: (1.007, 9.34)},
    'compiled PyTorch (published there)': {64: (0.216, 0.839), 256: (1.269, 3.00), 576: (6.25, 13.6)},
}


def versions() -> str:
    """The packages, the GPU and its driver."""
    found = [f'python {platform.python_version()}']
    for name in PACKAGES:
        try:
            found.append(f'{name} {importlib.metadata.version(name)}')
        except importlib.metadata.PackageNotFoundError:
            found.append(f'{name} is not installed')
    query = ['nvidia-smi', '--query-gpu=name,driver_version,memory.total,clocks.max.sm', '--format=csv,noheader']
    gpu = subprocess.run(query, capture_output=True, text=True, check=False).stdout if shutil.which(query[0]) else ''
    return f'{", ".join(found)}; {gpu.strip() or "no GPU"}'


# ---------------------------------------------------------------- tables


def results(folder: Path, pattern: str = '*.json') -> Iterator[dict | list]:
    """Contents of the result files of a stage, in the order in which they were measured."""
    for path in sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime):
        yield json.loads(path.read_text())


def print_checks(folder: Path) -> None:
    """Print the exit code and the last lines of each check."""
    for path in sorted(folder.glob('*.code')):
        lines = path.with_suffix('.txt').read_text().splitlines()
        print(f'\n{path.stem}: exit code {path.read_text().strip()}\n\n```', *lines[-40:], '```', sep='\n')


def print_tiles(folder: Path) -> None:
    """Print milliseconds of each kernel with the default tiles and with the best ones."""
    print('\n| GPU | kernel, tokens of a window, head size, type | default, ms | best, ms | tiles |')
    print('|---|---|---|---|---|')
    for devices in results(folder, 'times.json'):
        for device, kernels in devices.items():
            for key, found in kernels.items():
                best = min(found['ms'], key=found['ms'].get)
                default = found['ms'].get(found['default'])
                default_ms = 'rejected' if default is None else f'{default:.3f}'
                print(f'| {device} | {key} | {default_ms} | {found["ms"][best]:.3f} | {best} |')


def print_operator(folder: Path) -> None:
    """Print the measured and the published milliseconds of the operator."""
    rows = [row for content in results(folder, 'operator.json') for row in content['rows']]
    print('\n| tokens of a window | type | | forward, ms | forward and backward, ms |\n|---|---|---|---|---|')
    for tokens in dict.fromkeys(row['tokens'] for row in rows):
        for row in (row for row in rows if row['tokens'] == tokens):
            cells = [row['note'], '-'] if 'note' in row else [f'{row[k]:.3f}' for k in ('forward', 'forward_backward')]
            print(f'| {tokens} | {row["dtype"]} | ours {row["backend"]} | {" | ".join(cells)} |')
        for name, published in PUBLISHED.items():
            if tokens in published:
                print(f'| {tokens} | float16 | {name} | {" | ".join(map(str, published[tokens]))} |')


def main(argv: Sequence[str] | None = None) -> None:
    """Run the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('out', type=Path, nargs='?', help='folder of gpu_run.sh')
    parser.add_argument('--versions', action='store_true', help='print the versions of packages and driver instead')
    args = parser.parse_args(argv)
    if args.versions:
        print(versions())
        return
    with one_line_errors(FileNotFoundError):
        if args.out is None or not args.out.is_dir():
            raise FileNotFoundError(f'there is no folder {args.out} of results of gpu_run.sh')
    from benchmark_memory import print_techniques  # not at the top: --versions works without torch
    from results import Row, print_profile, print_table

    out = args.out
    print('# Measured on a GPU\n')
    for line in dict.fromkeys(path.read_text().strip() for path in sorted(out.glob('*/versions.txt'))):
        print(line)
    print('\n## Self-check and tests')
    print_checks(out / 'check')
    print('\n## Tiles')
    print_tiles(out / 'tune')
    print('\n## The attention operator\n\n16 feature maps of 4 windows, 6 heads of 32 channels.')
    print_operator(out / 'benchmark')
    print('\n## Backbones, and attention with its projections')
    for content in results(out / 'benchmark', '*-*.json'):
        print_table([Row(**row) for row in content['rows']])
    print('\n## Memory\n\n```')
    for rows in results(out / 'memory'):
        for part in dict.fromkeys(row['part'] for row in rows):
            print_techniques([row for row in rows if row['part'] == part])
    print('```\n\n## Profile')
    for content in results(out / 'profile', '*-*.json'):
        print_profile([Row(**row) for row in content['rows']])


if __name__ == '__main__':
    main()

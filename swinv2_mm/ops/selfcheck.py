"""Compare the Triton kernels of window attention with the reference, on the GPU at hand.

python -m swinv2_mm.ops.selfcheck

Prints the error and the tolerance of each result, and updates the cached verdicts that `attention_backend='auto'`
reads. The exit code is 1 if a result is wrong, and 2 if the kernels cannot run. With TRITON_INTERPRET=1 it runs without
a GPU, on tiny feature maps.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from .files import write_whole
from .triton import attention as triton
from .triton import selfcheck
from .triton.tiles import is_one_tile
from .windows import Size

DTYPES = {'fp32': torch.float32, 'tf32': torch.float32, 'fp16': torch.float16, 'bf16': torch.bfloat16}
WINDOWS: tuple[Size, ...] = (7, 7), (8, 8), (12, 12), (16, 16), (24, 24), (32, 32), (8, 7, 7), (8, 20, 20)
CASES = tuple(DTYPES), selfcheck.HEAD_DIMS, WINDOWS
QUICK = tuple(DTYPES), (32,), tuple(selfcheck.WINDOWS.values())
INTERPRETED = ('fp32',), (16,), ((4, 4), (9, 9))


def main(argv: Sequence[str] | None = None) -> int:
    """Run the check, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--quick', action='store_true', help='heads of 32 channels and two windows')
    parser.add_argument(
        '--resume', type=Path, metavar='FILE', help='write each row to this JSON file, and check only what it lacks'
    )
    args = parser.parse_args(argv)
    is_interpreted = os.environ.get('TRITON_INTERPRET') == '1'
    reason = _why_not(is_interpreted)
    if reason:
        print(f'error: the Triton kernels cannot run: {reason}', file=sys.stderr)
        return 2
    device = torch.device('cpu' if is_interpreted else f'cuda:{torch.cuda.current_device()}')
    try:
        rows = Rows(args.resume)
    except (OSError, ValueError) as error:
        print(f'error: --resume {args.resume} cannot be read and written: {error}', file=sys.stderr)
        return 2
    return _run(INTERPRETED if is_interpreted else QUICK if args.quick else CASES, device, rows)


class Rows:
    """Rows of the table, each with what is wrong, in a file or nowhere.

    Raises:
        OSError: The file cannot be written.
        ValueError: It is damaged.
    """

    def __init__(self, file: Path | None) -> None:
        self.file = file
        self.rows: dict[str, tuple[str, str]] = json.loads(file.read_text()) if file and file.exists() else {}
        self._write()

    def examine(
        self, kernels: str, window: Size, is_shifted: bool, head_dim: int, dtype: torch.dtype, device: torch.device
    ) -> tuple[str, str]:
        """Deviations as text, and what is wrong or '', as of `selfcheck.examine`; those of a former call if it can.

        `kernels` is the description of those that such windows run.
        """
        key = f'{kernels}, {window}, {"shifted" if is_shifted else "not shifted"}'
        if key not in self.rows:
            deviations, fault = selfcheck.examine(window, is_shifted, head_dim, dtype, device)
            self.rows[key] = ' | '.join(map(str, deviations.values())) or fault, fault
            self._write()
        return tuple(self.rows[key])

    def _write(self) -> None:
        if self.file:
            write_whole(self.file, json.dumps(self.rows, indent=1) + '\n')


def _why_not(is_interpreted: bool) -> str | None:
    if is_interpreted:
        return None if triton.HAS_TRITON else 'the package triton is not installed'
    if not torch.cuda.is_available():
        return 'there is no GPU; TRITON_INTERPRET=1 tries this out without one'
    return triton.can_run(torch.empty(1, 1, 3, 1, 16, device='cuda'))


def _run(cases: tuple[Sequence[str], Sequence[int], Sequence[Size]], device: torch.device, rows: Rows) -> int:
    dtypes, head_dims, windows = cases
    print(f'| type | head size | window | shifted, padded | {" | ".join(selfcheck.RESULTS)} |')
    print('|---|---|---|---|' + '---|' * len(selfcheck.RESULTS))
    verdicts = _check_post_norm([DTYPES[name] for name in dtypes], device)
    for name, head_dim in itertools.product(dtypes, head_dims):
        if head_dim > triton.MAX_HEAD_DIM[DTYPES[name]]:
            continue
        torch.set_float32_matmul_precision('high' if name == 'tf32' else 'highest')
        faults: dict[str, list[str]] = {}
        for window, is_shifted in itertools.product(windows, (True, False)):
            print(f'| {name} | {head_dim} | {"x".join(map(str, window))} | {"yes" if is_shifted else "no"}', end=' | ')
            one_tile = is_one_tile(math.prod(window), head_dim, DTYPES[name])
            kernels = selfcheck.describe(device, DTYPES[name], head_dim, one_tile)
            try:
                cells, fault = rows.examine(kernels, window, is_shifted, head_dim, DTYPES[name], device)
            except selfcheck.NotCheckedError as error:
                print(f'not checked {error} |', flush=True)
                continue
            print(cells, end=' |\n', flush=True)
            faults.setdefault(kernels, []).append(fault)
        if faults:
            found = {key: '; '.join(filter(None, of_key)) for key, of_key in faults.items()}
            selfcheck.keep(found)
            verdicts |= found
    for key, faults in verdicts.items():
        print(f'{"wrong" if faults else "right"} on {key}{":" * bool(faults)} {faults}'.rstrip())
    return int(any(verdicts.values()))


def _check_post_norm(dtypes: Sequence[torch.dtype], device: torch.device) -> dict[str, str]:
    verdicts = {}
    for dtype in dict.fromkeys(dtypes):
        with contextlib.suppress(selfcheck.NotCheckedError):
            key = selfcheck.describe(device, dtype, None)
            verdicts[key] = selfcheck.examine_post_norm(dtype, device)[1]
            selfcheck.keep({key: verdicts[key]})
    return verdicts


if __name__ == '__main__':
    sys.exit(main())

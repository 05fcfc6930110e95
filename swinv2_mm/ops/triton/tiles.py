"""How many tokens a program of each Triton kernel takes, and what it runs them with."""

import functools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

# the last two take a whole window
KERNELS = 'forward', 'bwd_dq', 'bwd_dk_dv', 'bwd_dbias', 'window_forward', 'window_backward'
SMALLEST = 16  # rows and columns of a matrix product
LARGEST_WINDOW = 64  # tokens of a window that is one tile
# written by benchmarks/tune_kernels.py: {device: {'kernel tokens head_dim type': TileConfig}}
TUNED = Path(__file__).with_name('tiles.json')


class TileConfig(NamedTuple):
    """Tokens and threads of a program."""

    block_m: int  # tokens that it works for; the last three kernels take a box or a window, whatever is said here
    block_n: int  # tokens that it takes at a time, or fewer if that does not divide a window
    warps: int
    stages: int  # of the pipeline of its loop


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not smaller than n."""
    return 1 << (n - 1).bit_length()


def is_one_tile(tokens: int, head_dim: int, dtype: torch.dtype) -> bool:
    """Whether the registers of one program hold a window, forward and backward."""
    return tokens <= LARGEST_WINDOW and head_dim <= 32 and dtype.itemsize == 2


def box_tokens(head_dim: int, dtype: torch.dtype) -> int:
    """Places of the boxes that windows are cut into."""
    return 64 if dtype.itemsize == 2 and head_dim <= 64 else 32


def choose_tiles(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> TileConfig:
    """Tiles of a kernel for windows of so many tokens: as measured on this kind of device, or by rule.

    Windows that were not measured take what the next larger ones, or else the largest ones, were found to need.
    """
    tuned = _tuned(device).get((kernel, next_power_of_2(head_dim), str(dtype)))
    if not tuned:
        return default_tiles(kernel, tokens, head_dim, dtype)
    return tuned[min((n for n in tuned if n >= tokens), default=max(tuned))]


def default_tiles(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """Tiles that fit the registers of a program, as the compiler reports them."""
    box = box_tokens(head_dim, dtype)
    if kernel == 'window_backward':  # whose registers hold no second stage
        return TileConfig(LARGEST_WINDOW, LARGEST_WINDOW, warps=4, stages=1)
    if kernel == 'bwd_dbias':  # whose loop loads by tables, so that a second stage costs more instructions
        return TileConfig(box, box, warps=4, stages=1)
    if box == 64 and head_dim <= 32 and tokens % 128 == 0:
        return TileConfig(128, 64 if kernel == 'forward' else 32, warps=4, stages=2)
    return TileConfig(box, 32 if head_dim > 32 else box, warps=4, stages=2)


def candidates(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype) -> Iterator[TileConfig]:
    """Tiles that are worth measuring."""
    box = box_tokens(head_dim, dtype)
    rule = default_tiles(kernel, tokens, head_dim, dtype)
    if kernel in ('window_forward', 'window_backward', 'bwd_dbias'):
        yield from (rule._replace(warps=warps, stages=stages) for warps in (4, 8) for stages in (1, 2, 3))
    else:
        sizes = [(m, n) for m in (box, 2 * box) for n in (box // 2, box)]
        yield from (TileConfig(m, n, m // 16, stages) for m, n in sizes for stages in (1, 2, 3))


@functools.cache
def _tuned(device: torch.device) -> dict[tuple[str, int, str], dict[int, TileConfig]]:
    """What was measured on this kind of device: tokens to tiles, for each kernel, head size and type."""
    if device.type != 'cuda' or not TUNED.exists():
        return {}
    measured = json.loads(TUNED.read_text()).get(torch.cuda.get_device_name(device), {})
    found: dict[tuple[str, int, str], dict[int, TileConfig]] = {}
    for key, tiles in measured.items():
        kernel, tokens, head_dim, dtype = key.split()
        found.setdefault((kernel, int(head_dim), dtype), {})[int(tokens)] = TileConfig(*tiles)
    return found

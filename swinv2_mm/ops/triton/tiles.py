"""How many tokens a program of each Triton kernel takes, and what it runs them with."""

import functools
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch

from ..windows import Size

KERNELS = 'attend', 'grad_queries', 'grad_keys', 'grad_bias', 'grad_all'
SMALLEST = 16  # rows and columns of a matrix product
# written by tools/analysis_tools/tune_kernels.py: {device: {'kernel tokens head_dim type': TileConfig}}
TUNED = Path(__file__).with_name('tiles.json')


class TileConfig(NamedTuple):
    """Tokens and threads of a program."""

    block: int  # tokens that it works for
    step: int  # tokens that it takes at a time; those of `grad_bias` and `grad_all` are `block`
    warps: int
    stages: int  # of the pipeline of its loop


def next_power_of_2(n: int) -> int:
    """The smallest power of 2 that is not smaller than n."""
    return 1 << (n - 1).bit_length()


def is_wide(head_dim: int, dtype: torch.dtype) -> bool:
    """Whether tokens take so much memory that few of them fit into a program."""
    return head_dim * dtype.itemsize > 128


def choose_tiles(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> TileConfig:
    """TileConfig of a kernel for windows of so many tokens: as measured on this kind of device, or by rule.

    Windows that were not measured take what the next larger ones, or else the largest ones, were found to need.
    """
    tuned = _tuned(device).get((kernel, next_power_of_2(head_dim), str(dtype)))
    if not tuned:
        return default_tiles(kernel, tokens, head_dim, dtype)
    found = tuned[min((n for n in tuned if n >= tokens), default=max(tuned))]
    return _fit(found, tokens)


def default_tiles(kernel: str, tokens: int, head_dim: int, dtype: torch.dtype) -> TileConfig:
    """TileConfig whose tiles fit the registers of a program, as the compiler reports them."""
    if kernel == 'grad_all':  # which holds a whole window
        blocks = TileConfig(64, 64, warps=4, stages=1)
    elif is_wide(head_dim, dtype) or dtype.itemsize > 2:
        blocks = TileConfig(32, 32, warps=4, stages=2)
    elif kernel == 'grad_bias':
        blocks = TileConfig(64, 64, warps=8, stages=2)
    else:  # on Hopper, eight warps would compute the 64 rows of a product twice
        blocks = TileConfig(64, 32, warps=4, stages=2)
    return _fit(blocks, tokens)


def candidates(kernel: str, tokens: int) -> Iterator[TileConfig]:
    """TileConfig that are worth measuring."""
    sizes = [size for size in (32, 64, 128) if size <= max(32, next_power_of_2(tokens))]
    square = kernel in ('grad_bias', 'grad_all')
    for block in sizes:
        for step in [block] if square else [size for size in sizes if size <= 64]:
            if block * step <= 64 * 128 and (kernel != 'grad_all' or block >= tokens):
                yield from (TileConfig(block, step, warps, stages) for warps in (4, 8) for stages in (1, 2, 3))


def tile_window(window_size: Size, tokens: int) -> tuple[Size, Size]:
    """Box of so many tokens, a power of 2, with which boxes hold the fewest places outside of the window.

    Returns:
        Size of the box, and boxes of the window, along each axis.
    """
    sides = [1 << i for i in range(tokens.bit_length())]
    boxes = [(a, b, tokens // a // b) for a in sides for b in sides if a * b <= tokens]

    def counts(box: Size) -> Size:
        return tuple(-(-w // side) for w, side in zip(window_size, box, strict=True))

    # of equal ones the most compact, whose last axis is the longest
    box = min(boxes, key=lambda box: (math.prod(counts(box)), sum(box), -box[-1]))
    return box, counts(box)


def _fit(blocks: TileConfig, tokens: int) -> TileConfig:
    """Make blocks no larger than a window needs."""
    largest = max(SMALLEST, next_power_of_2(tokens))
    return blocks._replace(block=min(blocks.block, largest), step=min(blocks.step, largest))


@functools.cache
def _tuned(device: torch.device) -> dict[tuple[str, int, str], dict[int, TileConfig]]:
    """What was measured on this kind of device: tokens to blocks, for each kernel, head size and type."""
    if device.type != 'cuda' or not TUNED.exists():
        return {}
    measured = json.loads(TUNED.read_text()).get(torch.cuda.get_device_name(device), {})
    found: dict[tuple[str, int, str], dict[int, TileConfig]] = {}
    for key, blocks in measured.items():
        kernel, tokens, head_dim, dtype = key.split()
        found.setdefault((kernel, int(head_dim), dtype), {})[int(tokens)] = TileConfig(*blocks)
    return found

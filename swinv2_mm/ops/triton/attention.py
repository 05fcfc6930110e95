"""Window attention by the Triton kernels of `kernels.py`, forward and backward, as operators of torch's library.

Nothing is copied into windows, and nothing is kept for the backward pass but the inputs, the result, and one number for
each token and head: the logarithm, to the base 2, of the sum of its exponentials.
"""

import importlib
import importlib.util
import math

import torch
from torch import Tensor

from ..recording import at_compilation, is_tracing, is_transformed
from ..reference import MAX_LOGIT_SCALE
from ..windows import (
    Size,
    add_overlapping,
    crop_bias_table,
    crop_bias_table_backward,
    dense_bias_backward,
    fit_window,
)
from .launch import launch
from .tiles import SMALLEST, choose_tiles, is_wide, next_power_of_2, tile_window

HAS_TRITON = importlib.util.find_spec('triton') is not None
TRITON = 3, 4  # older ones do not compile the kernels
MAX_HEAD_DIM = 128  # larger ones do not fit the registers of a program
MAX_AXES = 3
CAPABILITY = 8  # of the oldest GPUs, Ampere, that multiply bfloat16
DTYPES = torch.float32, torch.float16, torch.bfloat16
PROGRAMS = 1024  # of the kernels that sum over windows; a GPU has some 100 processors


def can_run(qkv: Tensor) -> str | None:
    """Tell why this backend cannot attend, or None if it can."""
    if not qkv.is_cuda:
        return f'its kernels are for GPUs, and the map is on {str(qkv.device)!r}'
    if not HAS_TRITON:
        return 'the package triton is not installed'
    version = _triton_version()
    if tuple(map(int, version.split('.')[:2])) < TRITON:
        return f'its kernels need triton {TRITON[0]}.{TRITON[1]} or newer, this is {version}'
    if not hasattr(torch.library, 'custom_op'):
        return f'it needs torch 2.4 or newer, this is {torch.__version__}'
    if is_tracing():
        return 'its operator is not one of those that models are exported with'
    if is_transformed():
        return 'torch.func and forward-mode AD transform operators of PyTorch alone'
    if qkv.dtype not in DTYPES:
        return f'its kernels compute in float32, and the map is of type {qkv.dtype}'
    if qkv.dim() - 4 > MAX_AXES:
        return f'its kernels know maps of up to {MAX_AXES} axes, and this one has {qkv.dim() - 4}'
    if qkv.shape[-1] > MAX_HEAD_DIM:
        return f'its kernels take heads of up to {MAX_HEAD_DIM} channels, and these have {qkv.shape[-1]}'
    major, minor = _capability(qkv.device)
    if major < CAPABILITY:
        return f'its kernels are for GPUs of compute capability {CAPABILITY} or more, and this one has {major}.{minor}'
    return None


@at_compilation
def _triton_version() -> str:
    return importlib.import_module('triton').__version__


@at_compilation
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def triton_window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window_size: Size,
    shift_size: Size,
    sequential: bool = False,
) -> Tensor:
    """See `swinv2_mm.ops.window_attention`; attention weights are never in memory, sequential or not."""
    return torch.ops.swinv2_mm.triton_window_attention(qkv, logit_scale, bias_table, window_size, shift_size)[0]


class Geometry:
    """Sizes of a map and its windows, with three axes, and what the kernels are compiled for."""

    def __init__(self, qkv: Tensor, window_size: Size, shift_size: Size) -> None:
        map_size = tuple(qkv.shape[1:-3])
        window, shift = fit_window(map_size, window_size, shift_size)
        ones = (1,) * (MAX_AXES - len(map_size))
        self.size, self.window, self.table = ones + map_size, ones + window, ones + tuple(window_size)
        self.shift = (0,) * len(ones) + shift
        self.heads, self.head_dim = qkv.shape[-2:]
        self.windows = len(qkv) * math.prod(-(-s // w) for s, w in zip(self.size, self.window, strict=True))
        self.tokens = math.prod(window)
        self.dtype, self.device = qkv.dtype, qkv.device

    def constants(self) -> dict:
        """What all kernels are compiled for."""
        return {
            'WINDOW': self.window,
            'SHIFT': self.shift,
            'TABLE': self.table,
            'DIM': self.head_dim,
            'BLOCK_DIM': max(SMALLEST, next_power_of_2(self.head_dim)),
            'PRECISION': 'tf32' if self.dtype == torch.float32 and _is_tf32_allowed() else 'ieee',
            'enable_fp_fusion': True,
        }

    def runs(self, kernel: str) -> tuple[int, dict]:
        """TileConfig of a window for one of the kernels that go over runs of tokens, and its constants."""
        blocks = choose_tiles(kernel, self.tokens, self.head_dim, self.dtype, self.device)
        constants = {'BLOCK': blocks.block, 'STEP': blocks.step, 'num_warps': blocks.warps, 'num_stages': blocks.stages}
        return -(-self.tokens // blocks.block), {**self.constants(), **constants}

    def boxes(self, kernel: str) -> tuple[Size, Size, dict]:
        """Box and boxes of a window for one of the kernels that go over boxes of tokens, and its constants."""
        blocks = choose_tiles(kernel, self.tokens, self.head_dim, self.dtype, self.device)
        box, counts = tile_window(self.window, blocks.block)
        constants = {'BOX': box, 'BOXES': counts, 'num_warps': blocks.warps, 'num_stages': blocks.stages}
        return box, counts, {**self.constants(), **constants}

    def fits_one_tile(self) -> bool:
        """Whether one program can hold a window, in its registers and in shared memory."""
        return not is_wide(self.head_dim, self.dtype) and self.runs('grad_all')[0] == 1

    def kernels(self) -> tuple[str, ...]:
        """Kernels that run for such windows, forward and backward."""
        if self.fits_one_tile():
            return 'attend', 'grad_all'
        return 'attend', 'grad_queries', 'grad_keys', 'grad_bias'

    def widen(self, grad_table: Tensor) -> Tensor:
        """Gradient of the whole bias table, from that of the window in effect."""
        return crop_bias_table_backward(grad_table, self.table, self.window)


def _is_tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be computed in TF32, at its present setting."""
    setting = torch.backends.cuda.matmul
    if hasattr(setting, 'fp32_precision'):  # of torch 2.9; where it was set, it is an error to read the former ones
        return setting.fp32_precision == 'tf32'
    return setting.allow_tf32


def attend(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> tuple[Tensor, Tensor]:
    """Attention within windows, without autograd; arguments as of `swinv2_mm.ops.window_attention`.

    Returns:
        Its result, and the logarithms to the base 2 of the sums of exponentials (B * prod(S), heads) in float32.
    """
    from . import kernels

    geometry = Geometry(qkv, window_size, shift_size)
    heads = geometry.heads
    out = qkv.new_empty(*qkv.shape[:-3], heads * geometry.head_dim)
    log_sums = qkv.new_empty(math.prod(qkv.shape[:-3]), heads, dtype=torch.float32)
    inputs = [t.contiguous() for t in (qkv, logit_scale, bias_table)]
    blocks, constants = geometry.runs('attend')
    programs = geometry.windows * blocks * heads
    launch(kernels.attend, programs, *inputs, out, log_sums, geometry.size, heads, **constants)
    return out, log_sums


def attend_backward(
    grad: Tensor,
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    out: Tensor,
    log_sums: Tensor,
    window_size: Size,
    shift_size: Size,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for its first three arguments, given the one for its first result."""
    geometry = Geometry(qkv, window_size, shift_size)
    given = [t.contiguous() for t in (grad, qkv, logit_scale, bias_table, out, log_sums)]
    grad_qkv = torch.empty_like(given[1])
    if geometry.fits_one_tile():
        grad_scale, grad_table = grad_all(geometry, given, grad_qkv)
    else:
        grad_scale, common = grad_queries(geometry, given, grad_qkv)
        grad_keys(geometry, given, common, grad_qkv)
        grad_table = grad_bias(geometry, given, common)
    grad_scale = torch.where(logit_scale <= MAX_LOGIT_SCALE, grad_scale.view_as(logit_scale), 0.0)
    return grad_qkv, grad_scale.to(logit_scale.dtype), grad_table.to(bias_table.dtype)


# Each of the following takes the tensors that are given to the backward pass.


def grad_queries(geometry: Geometry, given: list[Tensor], grad_qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of the queries to that of the map.

    Returns:
        The gradient of the scale (heads,), and what the gradients of each query's weights have in common, which the
        other kernels need.
    """
    from . import kernels

    windows, heads = geometry.windows, geometry.heads
    blocks, constants = geometry.runs('grad_queries')
    grad_scale = grad_qkv.new_empty(windows * blocks, heads, dtype=torch.float32)
    common = torch.empty_like(given[-1])
    programs = windows * blocks * heads
    launch(kernels.grad_queries, programs, *given, common, grad_qkv, grad_scale, geometry.size, heads, **constants)
    return grad_scale.sum(0), common


def grad_keys(geometry: Geometry, given: list[Tensor], common: Tensor, grad_qkv: Tensor) -> None:
    """Write the gradients of keys and values to that of the map."""
    from . import kernels

    blocks, constants = geometry.runs('grad_keys')
    *inputs, _, log_sums = given
    programs = geometry.windows * blocks * geometry.heads
    launch(kernels.grad_keys, programs, *inputs, log_sums, common, grad_qkv, geometry.size, geometry.heads, **constants)


def grad_bias(geometry: Geometry, given: list[Tensor], common: Tensor) -> Tensor:
    """Gradient of the bias table."""
    from . import kernels

    windows, heads = geometry.windows, geometry.heads
    box, boxes, constants = geometry.boxes('grad_bias')
    displacements, tokens = math.prod(2 * n - 1 for n in boxes), math.prod(box)
    splits = min(windows, -(-PROGRAMS // (heads * displacements)))
    tiles = given[0].new_empty(splits, heads, displacements, tokens, tokens, dtype=torch.float32)
    *inputs, _, log_sums = given
    sizes = geometry.size, heads, windows, splits
    programs = splits * heads * displacements
    launch(kernels.grad_bias, programs, *inputs, log_sums, common, tiles, *sizes, **constants)
    return geometry.widen(_fold(tiles.sum(0), box, boxes, geometry.window))


def grad_all(geometry: Geometry, given: list[Tensor], grad_qkv: Tensor) -> tuple[Tensor, Tensor]:
    """Write the gradient of the map, and return those of the scale (heads,) and of the bias table."""
    from . import kernels

    windows, heads, tokens = geometry.windows, geometry.heads, geometry.tokens
    _, constants = geometry.runs('grad_all')
    del constants['STEP']
    splits, block = min(windows, -(-PROGRAMS // heads)), constants['BLOCK']
    grad_scale = grad_qkv.new_empty(splits, heads, dtype=torch.float32)
    tiles = grad_qkv.new_empty(splits, heads, block, block, dtype=torch.float32)
    sizes = geometry.size, heads, windows, splits
    launch(kernels.grad_all, splits * heads, *given, grad_qkv, grad_scale, tiles, *sizes, **constants)
    grad_bias = tiles.sum(0)[:, :tokens, :tokens].flip(1)
    return grad_scale.sum(0), geometry.widen(dense_bias_backward(grad_bias, geometry.window))


def _fold(tiles: Tensor, box: Size, boxes: Size, window: Size) -> Tensor:
    """Sum gradients of the bias between boxes, (heads, displacements, tokens, tokens), onto the table of a window."""
    offsets = dense_bias_backward(tiles.flatten(0, 1).flip(1), box)  # of each displacement, by offset within boxes
    displacements = [2 * n - 1 for n in boxes]
    offsets = offsets.view(-1, *displacements, *(2 * side - 1 for side in box))
    covered = tuple(n * side for n, side in zip(boxes, box, strict=True))
    return crop_bias_table(add_overlapping(offsets, box).flatten(1), covered, window)


def _register() -> None:
    """Make operators of `attend` and its gradient, which torch.compile keeps whole, at maps of any size."""
    inputs, sizes = 'Tensor qkv, Tensor logit_scale, Tensor bias_table', 'int[] window_size, int[] shift_size'

    @torch.library.custom_op(
        'swinv2_mm::triton_window_attention', mutates_args=(), schema=f'({inputs}, {sizes}) -> (Tensor, Tensor)'
    )
    def forward(qkv, logit_scale, bias_table, window_size, shift_size):
        return attend(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @forward.register_fake
    def _(qkv, *_):
        *maps, _, heads, head_dim = qkv.shape
        return qkv.new_empty(*maps, heads * head_dim), qkv.new_empty(math.prod(maps), heads, dtype=torch.float32)

    @torch.library.custom_op(
        'swinv2_mm::triton_window_attention_backward',
        mutates_args=(),
        schema=f'(Tensor grad, {inputs}, Tensor out, Tensor log_sums, {sizes}) -> (Tensor, Tensor, Tensor)',
    )
    def backward(grad, qkv, logit_scale, bias_table, out, log_sums, window_size, shift_size):
        sizes = tuple(window_size), tuple(shift_size)
        return attend_backward(grad, qkv, logit_scale, bias_table, out, log_sums, *sizes)

    @backward.register_fake
    def _(grad, qkv, logit_scale, bias_table, *_):
        return tuple(t.new_empty(t.shape) for t in (qkv, logit_scale, bias_table))

    def keep(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3], *output)
        ctx.sizes = inputs[3:]

    forward.register_autograd(
        lambda ctx, grad, _: (*backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None), setup_context=keep
    )


if hasattr(torch.library, 'custom_op'):
    _register()

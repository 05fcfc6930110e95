"""Window attention by the Triton kernels of `kernels.py`, forward and backward, as operators of torch's library.

Nothing is copied into windows, and nothing is kept for the backward pass but the inputs, the result, and `lse`: one
number for each slot of a window and head, and none for windows of one tile.
"""

import importlib
import importlib.util
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils import _python_dispatch

from ..reference import MAX_LOGIT_SCALE
from ..tracing import assume_constant_result, is_compiling, is_tracing, is_transformed
from ..windows import (
    Size,
    fit_window,
)
from .launch import launch
from .layout import (
    BiasTables,
    Box,
    TokenTables,
    bias_members,
    bias_tables,
    box_pairs,
    dense_entries,
    tile_window,
    token_tables,
)
from .tiles import (
    SMALLEST,
    box_tokens,
    choose_tiles,
    is_one_tile,
    next_power_of_2,
)

HAS_TRITON = importlib.util.find_spec('triton') is not None
TRITON = 3, 4  # older ones do not compile the kernels
# larger heads do not fit the registers of a program
MAX_HEAD_DIM = {torch.float32: 64, torch.float16: 128, torch.bfloat16: 128}
MAX_AXES = 3
CAPABILITY = 8  # of the oldest GPUs, Ampere, that multiply bfloat16
# of the kernels that go over windows: an H100 runs 400 or 660 of them at once, and each costs what precedes its loop
PROGRAMS = {'bwd_dbias': 1024, 'window_forward': 512, 'window_backward': 512}
MOST_QUERIES = 128  # of a tile; tables have rows of a multiple of it
BIAS_CENTER = 8.0  # of the position bias, which lies between 0 and 16
BLOCK_OF_PLACES, BLOCK_OF_VECTORS = 1024, 128


def can_run(qkv: Tensor) -> str | None:
    """Tell why this backend cannot attend, or None if it can."""
    if not qkv.is_cuda:
        return f'its kernels are for GPUs, but the feature map is on {str(qkv.device)!r}'
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
        return 'torch.func and forward-mode AD transform only operators of PyTorch'
    if qkv.dtype not in MAX_HEAD_DIM:
        return f'its kernels compute in float32, but the feature map is of type {qkv.dtype}'
    if qkv.dim() - 4 > MAX_AXES:
        return f'its kernels support feature maps of up to {MAX_AXES} axes, but this one has {qkv.dim() - 4}'
    most = MAX_HEAD_DIM[qkv.dtype]
    if qkv.shape[-1] > most:
        return f'its kernels take heads of up to {most} channels in {qkv.dtype}, and these have {qkv.shape[-1]}'
    major, minor = _capability(qkv.device)
    if major < CAPABILITY:
        return f'its kernels are for GPUs of compute capability {CAPABILITY} or more, and this one has {major}.{minor}'
    return None


@assume_constant_result
def _triton_version() -> str:
    return importlib.import_module('triton').__version__


@assume_constant_result
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
    # the operator takes longer on the host; modes and subclasses see nothing else
    if is_compiling() or type(qkv) is not Tensor or _python_dispatch._get_current_dispatch_mode() is not None:
        return torch.ops.swinv2_mm.triton_window_attention(qkv, logit_scale, bias_table, window_size, shift_size)[0]
    return TritonAttention.apply(qkv, logit_scale, bias_table, window_size, shift_size)


class TritonAttention(torch.autograd.Function):
    """Attention that keeps its inputs, its result and `lse` for the backward pass."""

    @staticmethod
    def forward(ctx, qkv, logit_scale, bias_table, window_size, shift_size):  # noqa: D102
        out, lse = triton_forward(qkv, logit_scale, bias_table, window_size, shift_size)
        ctx.save_for_backward(qkv, logit_scale, bias_table, out, lse)
        ctx.sizes = window_size, shift_size
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # noqa: D102
        return *triton_backward(grad_out, *ctx.saved_tensors, *ctx.sizes), None, None


class Geometry:
    """Sizes of a feature map and its windows, with three axes, and the arguments of the kernels for them."""

    def __init__(self, qkv: Tensor, window_size: Size, shift_size: Size) -> None:
        spatial_shape = tuple(qkv.shape[1:-3])
        window, shift = fit_window(spatial_shape, window_size, shift_size)
        ones = (1,) * (MAX_AXES - len(spatial_shape))
        self.size, self.window, self.table = ones + spatial_shape, ones + window, ones + tuple(window_size)
        self.shift = (0,) * len(ones) + shift
        self.batch, (self.heads, self.head_dim) = len(qkv), qkv.shape[-2:]
        self.tokens, self.window_tokens = math.prod(self.size), math.prod(window)
        self.dtype, self.device = qkv.dtype, qkv.device
        # of unit vectors and the bias: bfloat16 would be too coarse for them
        self.unit_dtype = torch.float32 if qkv.dtype == torch.float32 else torch.float16
        self.is_one_tile = is_one_tile(self.window_tokens, self.head_dim, self.dtype)
        if self.is_one_tile:
            self.box, self.keys = None, max(SMALLEST, next_power_of_2(self.window_tokens))
        else:
            self.box = tile_window(self.window, box_tokens(self.head_dim, self.dtype))
            self.keys = math.prod(self.box.counts) * math.prod(self.box.size)
        self.slots = self.keys if self.is_one_tile else slots_of(self.box)

    def tables(self) -> TokenTables:
        """Where the tokens of all windows lie."""
        return token_tables(self.size, self.window, self.shift, self.box, self.slots, self.device)

    def window_groups(self) -> Iterator[tuple[Tensor, bool]]:
        """Numbers of the windows that need no mask, and of those that do, which is the second item."""
        _, _, inner, edge = self.tables()
        yield from ((ids, needs_mask) for ids, needs_mask in ((inner, False), (edge, True)) if len(ids))

    def bias_tables(self) -> BiasTables:
        """Where the bias of queries and keys lies."""
        return bias_tables(self.window, self.table, self.box, self.slots, self.device)

    def expand_bias(self, bias_table: Tensor) -> Tensor:
        """Bias as the kernels read it: (heads, places)."""
        from . import kernels

        if self.is_one_tile:
            entries = dense_entries(self.window, self.table, self.slots, self.device)
        else:
            entries = self.bias_tables().entries
        # windows of one tile are read once for many windows
        dtype = torch.float32 if self.is_one_tile else self.unit_dtype
        bias = bias_table.new_empty(self.heads, len(entries), dtype=dtype)
        programs = -(-len(entries) // BLOCK_OF_PLACES) * self.heads
        sizes = self.heads, len(entries), *bias_table.stride()
        launch(
            kernels.expand_bias, programs, bias_table, entries, bias, *sizes, CENTER=BIAS_CENTER,
            BLOCK_M=BLOCK_OF_PLACES, num_warps=4,
        )  # fmt: skip
        return bias

    def normalize(self, qkv: Tensor, logit_scale: Tensor, parts: int) -> tuple[Tensor, Tensor, Tensor]:
        """Unit vectors of scaled queries and keys, or of keys (parts = 1): (tokens, parts, heads, head_dim).

        The second result repeats them in bfloat16 if that is the type of `qkv`, for the products of the backward pass:
        the other factor might not fit into float16. The third is 1 / norm of queries and keys, (tokens, 2, heads) in
        float32, and empty without queries.
        """
        from . import kernels

        is_rounded = parts == 2 and self.dtype == torch.bfloat16
        units = qkv.new_empty(self.batch * self.tokens, parts, self.heads, self.head_dim, dtype=self.unit_dtype)
        rounded_units = torch.empty_like(units, dtype=self.dtype) if is_rounded else units
        inverse_norms = units.new_empty(units.shape[:-1] if parts == 2 else 0, dtype=torch.float32)
        vectors = self.batch * self.tokens * parts * self.heads
        launch(
            kernels.normalize, -(-vectors // BLOCK_OF_VECTORS), qkv, logit_scale, units, rounded_units, inverse_norms,
            vectors, self.heads, PARTS=parts, ROUNDED=is_rounded, **self._dims(), BLOCK_M=BLOCK_OF_VECTORS, num_warps=4,
        )  # fmt: skip
        return units, rounded_units, inverse_norms

    def _dims(self) -> dict[str, int]:
        return {'DIM': self.head_dim, 'BLOCK_DIM': max(SMALLEST, next_power_of_2(self.head_dim))}

    def constants(self, kernel: str) -> dict[str, Any]:
        """What a kernel is compiled for, but whether its windows need a mask."""
        tiles = choose_tiles(kernel, self.window_tokens, self.head_dim, self.dtype, self.device)
        constants = {
            **self._dims(),
            'LARGE': self.tokens * 3 * self.heads * self.head_dim >= 2**31,
            'WHOLE': self.keys == self.window_tokens,
            'PRECISION': 'tf32' if self.dtype == torch.float32 and _is_tf32_allowed() else 'ieee',
            'num_warps': tiles.warps,
            'num_stages': tiles.stages,
        }
        if self.is_one_tile:
            return constants | {'BLOCK_M': self.slots}
        constants |= {'SLOTS': self.slots, 'PLACES': len(self.bias_tables().entries), 'RUN': self.box.run}
        if kernel == 'bwd_dbias':
            return constants | {'BLOCK_M': math.prod(self.box.size)}
        block_n = math.gcd(tiles.block_n, self.keys)
        return constants | {'KEYS': self.keys, 'BLOCK_M': tiles.block_m, 'BLOCK_N': block_n}


def _is_tf32_allowed() -> bool:
    """Whether PyTorch's own products of float32 may be computed in TF32, at its present setting."""
    setting = torch.backends.cuda.matmul
    if hasattr(setting, 'fp32_precision'):  # of torch 2.9; where it was set, it is an error to read the former ones
        return setting.fp32_precision == 'tf32'
    return setting.allow_tf32


def lse_shape(qkv: Tensor, window_size: Size) -> tuple[int, int, int]:
    """(windows, heads, slots); no windows where they are one tile at any size, whose backward pass needs no `lse`.

    Smaller feature maps need fewer slots. So the shape has no conditions on the size of the feature map, which is not
    known when a model is compiled.
    """
    heads, head_dim = qkv.shape[-2:]
    if is_one_tile(math.prod(window_size), head_dim, qkv.dtype):
        return 0, heads, 0
    windows = math.prod(-(-s // w) for s, w in zip(qkv.shape[1:-3], window_size, strict=True))
    window = (1,) * (MAX_AXES - len(window_size)) + tuple(window_size)
    return len(qkv) * windows, heads, slots_of(tile_window(window, box_tokens(head_dim, qkv.dtype)))


def slots_of(box: Box) -> int:
    """Slots of a window in the tables, with those that fill the last tile of queries."""
    return -(-math.prod(box.counts) * math.prod(box.size) // MOST_QUERIES) * MOST_QUERIES


def triton_forward(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> tuple[Tensor, Tensor]:
    """Attention within windows, without autograd; arguments as of `swinv2_mm.ops.window_attention`.

    Returns:
        Its result, and for each slot of a window and head the logarithm to the base 2 of the sum of the exponentials of
        its logits, in float32 and in the shape of `lse_shape`.
    """
    geometry = Geometry(qkv, window_size, shift_size)
    qkv, logit_scale = qkv.contiguous(), logit_scale.contiguous()
    out = qkv.new_empty(*qkv.shape[:-3], geometry.heads * geometry.head_dim)
    # no kernel writes slots beyond its last tile: without a query, they give no weights
    lse = qkv.new_full(lse_shape(qkv, window_size), math.inf, dtype=torch.float32)
    bias = geometry.expand_bias(bias_table)
    if geometry.is_one_tile:
        _forward_one_tile(geometry, qkv, logit_scale, bias, out)
    else:
        _forward_tiles(geometry, qkv, logit_scale, bias, out, lse)
    return out, lse


def _forward_tiles(
    geometry: Geometry, qkv: Tensor, logit_scale: Tensor, bias: Tensor, out: Tensor, lse: Tensor
) -> None:
    from . import kernels

    units, *_ = geometry.normalize(qkv, logit_scale, parts=1)
    constants, blocks = _blocks(geometry, 'forward')
    rows, regions, *_ = geometry.tables()
    _, *places = geometry.bias_tables()
    for ids, needs_mask in geometry.window_groups():
        programs = geometry.batch * len(ids) * blocks * geometry.heads
        inputs = qkv, units, logit_scale, bias, rows, regions, *places, ids
        sizes = len(ids), len(rows), geometry.tokens, geometry.heads
        launch(kernels.forward, programs, *inputs, out, lse, *sizes, EDGE=needs_mask, **constants)


def _blocks(geometry: Geometry, kernel: str) -> tuple[dict[str, Any], int]:
    """Constants of a kernel, and how many blocks of tokens it takes a window in."""
    constants = geometry.constants(kernel)
    return constants, -(-geometry.keys // constants['BLOCK_M'])


def _forward_one_tile(geometry: Geometry, qkv: Tensor, logit_scale: Tensor, bias: Tensor, out: Tensor) -> None:
    from . import kernels

    constants = geometry.constants('window_forward')
    rows, regions, *_ = geometry.tables()
    for ids, needs_mask in geometry.window_groups():
        sizes, programs = _parts(geometry, 'window_forward', len(ids))
        inputs = qkv, logit_scale, bias, rows, regions, ids
        launch(kernels.window_forward, programs, *inputs, out, *sizes, EDGE=needs_mask, **constants)


def _parts(geometry: Geometry, kernel: str, ids: int, tiles: int = 1) -> tuple[tuple[int, ...], int]:
    """Sizes for a kernel that goes over windows, so many of each sample, and its programs for so many tiles a head."""
    windows = geometry.batch * ids
    splits = min(windows, -(-PROGRAMS[kernel] // (geometry.heads * tiles)))
    return (ids, geometry.tokens, geometry.heads, windows, splits), splits * geometry.heads * tiles


def triton_backward(
    grad_out: Tensor,
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    out: Tensor,
    lse: Tensor,
    window_size: Size,
    shift_size: Size,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `triton_forward` with respect to qkv, logit_scale and bias_table."""
    geometry = Geometry(qkv, window_size, shift_size)
    saved = [t.contiguous() for t in (grad_out, qkv, logit_scale, out, lse)]
    bias = geometry.expand_bias(bias_table)
    if geometry.is_one_tile:
        grad_qkv, grad_scale, grad_table = _backward_one_tile(geometry, *saved[:3], bias)
    else:
        grad_qkv, grad_scale, grad_table = _backward_tiles(geometry, *saved, bias)
    grad_scale = torch.where(logit_scale <= MAX_LOGIT_SCALE, grad_scale.view_as(logit_scale), 0.0)
    return grad_qkv, grad_scale.to(logit_scale.dtype), grad_table.to(bias_table.dtype)


def _backward_one_tile(
    geometry: Geometry, grad_out: Tensor, qkv: Tensor, logit_scale: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernels

    constants = geometry.constants('window_backward')
    rows, regions, *_ = geometry.tables()
    grad_qkv = torch.empty_like(qkv)
    groups, all_tiles = _parts_of_groups(geometry, 'window_backward')
    scales = qkv.new_empty(all_tiles, geometry.heads, dtype=torch.float32)
    tiles = qkv.new_empty(geometry.heads, all_tiles, geometry.slots, geometry.slots, dtype=torch.float32)
    for ids, needs_mask, first_tile, sizes, programs in groups:
        inputs = grad_out, qkv, logit_scale, bias, rows, regions, ids
        outputs = grad_qkv, scales[first_tile:], tiles
        sizes = *sizes, first_tile, all_tiles
        launch(kernels.window_backward, programs, *inputs, *outputs, *sizes, EDGE=needs_mask, **constants)
    return grad_qkv, scales.sum(0), _fold(geometry, tiles)


def _backward_tiles(
    geometry: Geometry, grad_out: Tensor, qkv: Tensor, logit_scale: Tensor, out: Tensor, lse: Tensor, bias: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    from . import kernels

    units, rounded_units, inverse_norms = geometry.normalize(qkv, logit_scale, parts=2)
    delta, grad_qkv, scales = torch.empty_like(lse), torch.empty_like(qkv), []
    rows, regions, *_ = geometry.tables()
    _, *places = geometry.bias_tables()
    heads = geometry.heads
    for ids, needs_mask in geometry.window_groups():
        sizes, tables = (len(ids), len(rows), geometry.tokens, heads), (bias, rows, regions, *places, ids)
        constants, blocks = _blocks(geometry, 'bwd_dq')
        scales.append(lse.new_empty(geometry.batch * len(ids) * blocks, heads))
        inputs = grad_out, qkv, units, rounded_units, inverse_norms, logit_scale, *tables, out, lse
        constants |= {'EDGE': needs_mask, 'ROUNDED': rounded_units is not units}
        outputs = delta, grad_qkv, scales[-1]
        launch(kernels.bwd_dq, scales[-1].numel(), *inputs, *outputs, *sizes, **constants)
        constants, blocks = _blocks(geometry, 'bwd_dk_dv')
        programs = geometry.batch * len(ids) * blocks * heads
        inputs = grad_out, qkv, units, rounded_units, inverse_norms, *tables, lse, delta
        constants |= {'EDGE': needs_mask, 'ROUNDED': rounded_units is not units}
        launch(kernels.bwd_dk_dv, programs, *inputs, grad_qkv, *sizes, **constants)
    grad_table = _grad_table(geometry, (grad_out, qkv, units, bias), lse, delta)
    return grad_qkv, sum(scale.sum(0) for scale in scales), grad_table


def _grad_table(geometry: Geometry, inputs: tuple[Tensor, ...], lse: Tensor, delta: Tensor) -> Tensor:
    """Gradient of the bias table."""
    from . import kernels

    constants, box = geometry.constants('bwd_dbias'), geometry.box
    rows, regions, *_ = geometry.tables()
    _, *places = geometry.bias_tables()
    slots, first = box_pairs(box, geometry.device)
    displacements, tokens = len(first) - 1, math.prod(box.size)
    groups, all_tiles = _parts_of_groups(geometry, 'bwd_dbias', displacements)
    tiles = lse.new_empty(displacements, geometry.heads, all_tiles, tokens, tokens)
    for ids, needs_mask, first_tile, sizes, programs in groups:
        tables = rows, regions, *places, ids, slots, first
        sizes = sizes[0], len(rows), *sizes[1:], first_tile, all_tiles
        launch(kernels.bwd_dbias, programs, *inputs, *tables, lse, delta, tiles, *sizes, EDGE=needs_mask, **constants)
    return _fold(geometry, tiles)


def _parts_of_groups(geometry: Geometry, kernel: str, tiles: int = 1) -> tuple[list[tuple], int]:
    """Launches of a kernel that sums tiles, and the number of its parts.

    Returns:
        For each of `window_groups` its items, the first of its parts, and its `_parts`; and the number of all parts.
    """
    groups, first = [], 0
    for ids, needs_mask in geometry.window_groups():
        sizes, programs = _parts(geometry, kernel, len(ids), tiles)
        groups.append((ids, needs_mask, first, sizes, programs))
        first += sizes[-1]
    return groups, first


def _fold(geometry: Geometry, tiles: Tensor) -> Tensor:
    """Sum gradients of logits (displacements, heads, parts, tokens, tokens) onto the bias table."""
    from . import kernels

    members = bias_members(geometry.window, geometry.table, geometry.box, geometry.slots, geometry.device)
    entries, most = members.shape
    grad_table = tiles.new_empty(geometry.heads, entries)
    block = max(1, BLOCK_OF_PLACES // most)
    launch(
        kernels.fold_bias, -(-entries // block) * geometry.heads, tiles, members, grad_table, geometry.heads,
        tiles.shape[-3], entries, TILE=tiles.shape[-1] ** 2, MEMBERS=most, BLOCK_M=block, num_warps=4,
    )  # fmt: skip
    return grad_table


def _register() -> None:
    """Make operators of `triton_forward` and its gradient, which torch.compile keeps whole, at maps of any size."""
    inputs, sizes = 'Tensor qkv, Tensor logit_scale, Tensor bias_table', 'int[] window_size, int[] shift_size'

    @torch.library.custom_op(
        'swinv2_mm::triton_window_attention', mutates_args=(), schema=f'({inputs}, {sizes}) -> (Tensor, Tensor)'
    )
    def forward(qkv, logit_scale, bias_table, window_size, shift_size):
        return triton_forward(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @forward.register_fake
    def _(qkv, logit_scale, bias_table, window_size, shift_size):
        *maps, _, heads, head_dim = qkv.shape
        lse = qkv.new_empty(lse_shape(qkv, window_size), dtype=torch.float32)
        return qkv.new_empty(*maps, heads * head_dim), lse

    @torch.library.custom_op(
        'swinv2_mm::triton_window_attention_backward',
        mutates_args=(),
        schema=f'(Tensor grad, {inputs}, Tensor out, Tensor lse, {sizes}) -> (Tensor, Tensor, Tensor)',
    )
    def backward(grad, qkv, logit_scale, bias_table, out, lse, window_size, shift_size):
        sizes = tuple(window_size), tuple(shift_size)
        return triton_backward(grad, qkv, logit_scale, bias_table, out, lse, *sizes)

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

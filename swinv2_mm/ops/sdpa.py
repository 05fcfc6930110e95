"""Window attention by PyTorch's fused attention, with a backward pass of its own that recomputes the attention weights.

PyTorch's fused kernels differ in what they can differentiate: those for the CPU and of cuDNN refuse a bias that needs a
gradient, the memory-efficient one writes that gradient for every window, and some are wrong for masks at certain sizes
(pytorch#196678). So they run forward alone here, without autograd, and the backward pass is made of plain products. It
takes a few windows at a time, whose (N, N) matrices are all that is ever in memory, and sums the gradient of the bias
over the windows as it goes. Nothing is kept for it but the inputs.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import no_autocast
from .recording import is_compiling, is_counted, is_tracing, is_transformed
from .reference import MAX_LOGIT_SCALE
from .windows import (
    Size,
    WindowGroup,
    WindowGroups,
    crop_bias_table,
    crop_bias_table_backward,
    dense_bias,
    dense_bias_backward,
    fit_window,
    window_groups,
)

# Logits of the heads and windows that are taken at a time: 2 MiB in float32 stay in the cache of a CPU, 128 MiB keep a
# GPU busy
CHUNKS = {'cpu': 2**19, 'cuda': 2**25}
MAX_BATCH = 65535  # blocks along one axis of a grid of CUDA (pytorch#142228)
HAS_SCALE = 'scale' in (F.scaled_dot_product_attention.__doc__ or '')  # of torch 2.1


def can_run(qkv: Tensor) -> str | None:
    """Tell why this backend cannot attend, or None if it can."""
    if is_tracing():
        return 'its operator is not one of those that models are exported with'
    if is_transformed():
        return 'torch.func and forward-mode AD transform operators of PyTorch alone'
    if qkv.is_meta:
        return 'its windows are places in memory, and a map on the meta device has none'
    if not HAS_SCALE:
        return f'it needs torch 2.1 or newer, this is {torch.__version__}'
    if (is_compiling() or is_counted()) and not hasattr(torch.library, 'custom_op'):
        return f'compiled or counted, it needs torch 2.4 or newer, this is {torch.__version__}'
    return None


def sdpa_window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window_size: Size,
    shift_size: Size,
    sequential: bool = False,
) -> Tensor:
    """See `swinv2_mm.ops.window_attention`; a few windows at a time is what the backward pass does in any case."""
    if is_compiling() or is_counted():
        return torch.ops.swinv2_mm.window_attention(qkv, logit_scale, bias_table, window_size, shift_size)
    return RecomputedAttention.apply(qkv, logit_scale, bias_table, window_size, shift_size)


class RecomputedAttention(torch.autograd.Function):
    """Attention that keeps its inputs alone for the backward pass."""

    @staticmethod
    def forward(ctx, qkv, logit_scale, bias_table, window_size, shift_size):  # noqa: D102
        ctx.save_for_backward(qkv, logit_scale, bias_table)
        ctx.window_size, ctx.shift_size = window_size, shift_size
        return attend(qkv, logit_scale, bias_table, window_size, shift_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # noqa: D102
        return *attend_backward(grad, *ctx.saved_tensors, ctx.window_size, ctx.shift_size), None, None


def attend(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size) -> Tensor:
    """Attention within windows, without autograd; arguments and result as of `swinv2_mm.ops.window_attention`."""
    window, windows = _windows_of(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    # a GPU has fused kernels for half precision, which accumulate in float32; a CPU gains nothing from it
    dtype = qkv.dtype if qkv.is_cuda else _exact(qkv.dtype)
    out = qkv.new_empty(len(qkv), math.prod(qkv.shape[1:-3]), heads, head_dim)
    with no_autocast(qkv.device):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        inputs = [_gather_qkv(qkv, group).to(dtype) for group in windows.groups]
        for tokens in inputs:
            _normalize(tokens[:, :2], _scales(logit_scale, _exact(dtype)))
        results = [[] for _ in inputs]  # of each group, and the parts of the heads
        for part in _slices(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[part], window)
            for group, tokens, result in zip(windows.groups, inputs, results, strict=True):
                result.append(_fused(tokens[:, :, :, part], _bias_of(group, bias)))
        _put([_cat(result, 2) for result in results], windows.queries, out)
    return out.view(*qkv.shape[:-3], heads * head_dim)


def attend_backward(
    grad: Tensor, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for its first three arguments, given the one for its result."""
    window, windows = _windows_of(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    dtype = _exact(qkv.dtype)
    grad = grad.flatten(1, -2).unflatten(-1, (heads, head_dim))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_scale = torch.zeros_like(logit_scale, dtype=dtype)
    with no_autocast(qkv.device):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        grad_table = torch.empty_like(table, memory_format=torch.contiguous_format)
        scales = _scales(logit_scale, dtype)
        inputs = [_gather_qkv(qkv, group).to(dtype) for group in windows.groups]
        factors = [_normalize(tokens[:, :2], scales) for tokens in inputs]
        given = [_gather(grad, group.queries).to(dtype) for group in windows.groups]
        grads = [torch.empty_like(tokens) for tokens in inputs]
        for part in _slices(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[part], window)
            grad_bias = torch.zeros_like(bias)
            for group, tokens, grad_out, grad_tokens in zip(windows.groups, inputs, given, grads, strict=True):
                these = [grad_out[:, :, part], tokens[:, :, :, part], grad_tokens[:, :, :, part]]
                _add_to_bias_of(group, grad_bias, _unfused_backward(*these, _bias_of(group, bias)))
            grad_table[part] = dense_bias_backward(grad_bias, window)
        for tokens, grad_tokens, multiplied_by in zip(inputs, grads, factors, strict=True):
            along = _normalize_backward(grad_tokens[:, :2], tokens[:, :2], multiplied_by, scales)
            grad_scale += along[:, 0].sum((0, 1))[..., None]
        _put(grads, windows.qkv, grad_qkv.view(len(qkv), -1, heads, head_dim))
    grad_scale = torch.where(logit_scale <= MAX_LOGIT_SCALE, grad_scale, 0.0)
    grad_table = crop_bias_table_backward(grad_table, window_size, window)
    return grad_qkv, grad_scale.to(logit_scale.dtype), grad_table.to(bias_table.dtype)


def _register() -> None:
    """Make operators of `attend` and its gradient, which torch.compile keeps whole, at maps of any size."""
    arguments = 'Tensor qkv, Tensor logit_scale, Tensor bias_table, int[] window_size, int[] shift_size'

    @torch.library.custom_op('swinv2_mm::window_attention', mutates_args=(), schema=f'({arguments}) -> Tensor')
    def forward(qkv, logit_scale, bias_table, window_size, shift_size):
        return attend(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @forward.register_fake
    def _(qkv, *_):
        return qkv.new_empty(*qkv.shape[:-3], qkv.shape[-2] * qkv.shape[-1])

    @torch.library.custom_op(
        'swinv2_mm::window_attention_backward',
        mutates_args=(),
        schema=f'(Tensor grad, {arguments}) -> (Tensor, Tensor, Tensor)',
    )
    def backward(grad, qkv, logit_scale, bias_table, window_size, shift_size):
        return attend_backward(grad, qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @backward.register_fake
    def _(grad, *inputs_and_sizes):
        return tuple(t.new_empty(t.shape) for t in inputs_and_sizes[:3])

    def keep_inputs(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.sizes = inputs[3:]

    forward.register_autograd(
        lambda ctx, grad: (*backward(grad, *ctx.saved_tensors, *ctx.sizes), None, None), setup_context=keep_inputs
    )


if hasattr(torch.library, 'custom_op'):
    _register()


def _windows_of(qkv: Tensor, window_size: Size, shift_size: Size) -> tuple[Size, WindowGroups]:
    map_size = tuple(qkv.shape[1:-3])
    window, shift = fit_window(map_size, window_size, shift_size)
    # fake tensors, which know no values, must neither get real ones nor leave their own behind
    make = window_groups if type(qkv) is Tensor else window_groups.__wrapped__
    return window, make(map_size, window, shift, qkv.device)


def _exact(dtype: torch.dtype) -> torch.dtype:
    """Type of logits and their gradients: half precision cannot hold +-100, nor sum up the gradient of the bias."""
    return torch.promote_types(dtype, torch.float32)


def _slices(size: int, numbers: int, device: torch.device) -> Iterator[slice]:
    """Cut `size` things of so many `numbers` each into parts for one step."""
    step = max(1, CHUNKS.get(device.type, CHUNKS['cuda']) // numbers)
    return (slice(start, start + step) for start in range(0, size, step))


def _gather(maps: Tensor, tokens: Tensor) -> Tensor:
    """Copy what is at places (n, N) of maps (B, prod(S), ...): (B * n, N, ...)."""
    return maps.index_select(1, tokens.flatten()).view(-1, tokens.shape[1], *maps.shape[2:])


def _gather_qkv(qkv: Tensor, group: WindowGroup) -> Tensor:
    """Copy the windows of a group: (B * n, 3, N, heads, head_dim)."""
    return _gather(qkv.flatten(1, -3), group.qkv).unflatten(1, (3, -1))


def _put(groups: list[Tensor], places: Tensor, maps: Tensor) -> None:
    """Write what `_gather` has copied for each of the groups to where it was.

    `places` tells where it is found for each token of the maps: on a CPU, reading by index is faster than writing by
    index to where the tokens of windows belong.
    """
    windows = _cat([group.to(maps.dtype).reshape(len(maps), -1, *maps.shape[2:]) for group in groups], 1)
    torch.index_select(windows, 1, places, out=maps)


def _cat(parts: list[Tensor], dim: int) -> Tensor:
    """Join tensors, and copy nothing if there is but one."""
    return torch.cat(parts, dim) if len(parts) > 1 else parts[0]


def _scales(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Lengths that queries and keys get: (2, 1, heads, 1)."""
    of_queries = logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp().view(1, -1, 1)
    return torch.stack([of_queries, torch.ones_like(of_queries)])


def _normalize(x: Tensor, scales: Tensor) -> Tensor:
    """Give queries and keys (n, 2, N, heads, head_dim) their lengths, in place; return what they were multiplied by."""
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scales.dtype)
    factors = scales / torch.where(norms < 1e-12, 1.0, norms)
    x.mul_(factors)
    return factors


def _normalize_backward(grad: Tensor, x: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """Turn the gradient of the vectors that `_normalize` has left into that of the former ones, in place.

    It is orthogonal to them, since their length has no effect.

    Returns:
        The gradient of the logarithm of each vector's length, (n, 2, N, heads, 1).
    """
    along = (x * grad).sum(-1, keepdim=True)
    grad.addcmul_(x, along / scales**2, value=-1).mul_(factors)
    return along


def _bias_of(group: WindowGroup, bias: Tensor) -> Tensor:
    """Bias and mask of a group's windows (heads, N, N), from the bias of a whole window."""
    if group.rows is not None:
        bias = bias[:, group.rows[:, None], group.columns]
    return bias if group.mask is None else bias + group.mask


def _add_to_bias_of(group: WindowGroup, bias: Tensor, addend: Tensor) -> None:
    """Add what concerns a group's windows to the bias of a whole window."""
    if group.rows is None:
        bias += addend
    else:
        bias[:, group.rows[:, None], group.columns] += addend


def _fused(tokens: Tensor, bias: Tensor) -> Tensor:
    """Attend within windows of normalized tokens (n, 3, N, heads, head_dim): (n, N, heads, head_dim)."""
    parts = [
        F.scaled_dot_product_attention(*_by_head(part), attn_mask=bias[None], scale=1.0).transpose(1, 2)
        for part in tokens.split(MAX_BATCH)
    ]
    return _cat(parts, 0)


def _unfused_backward(grad_out: Tensor, tokens: Tensor, grads: Tensor, bias: Tensor) -> Tensor:
    """Write the gradient of `_fused` for its tokens to `grads`, and return that for its bias."""
    grad_bias = torch.zeros_like(bias)
    for windows in _slices(len(tokens), bias.numel(), bias.device):
        q, k, v = _by_head(tokens[windows])
        grad_q, grad_k, grad_v = _by_head(grads[windows])
        given = grad_out[windows].transpose(1, 2)
        weights = (q @ k.mT).add_(bias).softmax(-1)
        grad_v.copy_(weights.mT @ given)
        grad_logits = torch.ops.aten._softmax_backward_data(given @ v.mT, weights, -1, weights.dtype)
        grad_q.copy_(grad_logits @ k)
        grad_k.copy_(grad_logits.mT @ q)
        grad_bias += grad_logits.sum(0)
    return grad_bias


def _by_head(tokens: Tensor) -> Tensor:
    """View tokens (n, 3, N, heads, head_dim) as queries, keys and values (3, n, heads, N, head_dim)."""
    return tokens.permute(1, 0, 3, 2, 4)

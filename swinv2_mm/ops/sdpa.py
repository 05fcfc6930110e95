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

from .recording import is_compiling, is_tracing
from .reference import MAX_LOGIT_SCALE
from .windows import (
    Size,
    WindowGroup,
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
    if not HAS_SCALE:
        return f'it needs torch 2.1 or newer, this is {torch.__version__}'
    if is_compiling() and not hasattr(torch.library, 'custom_op'):
        return f'compiled, it needs torch 2.4 or newer, this is {torch.__version__}'
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
    if is_compiling():
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
    window, groups = _windows_of(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    # a GPU has fused kernels for half precision, which accumulate in float32; a CPU gains nothing from it
    dtype = qkv.dtype if qkv.is_cuda else _exact(qkv.dtype)
    out = qkv.new_empty(len(qkv), math.prod(qkv.shape[1:-3]), heads, head_dim)
    with torch.autocast(qkv.device.type, enabled=False):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        inputs = [_normalize(_gather(qkv.flatten(1, -4), group).to(dtype), logit_scale)[0] for group in groups]
        results = [[] for _ in groups]  # of each group, and the parts of the heads
        for part in _slices(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[part], window)
            for group, tokens, result in zip(groups, inputs, results, strict=True):
                result.append(_fused(tokens[:, :, :, part], _bias_of(group, bias)))
        for group, result in zip(groups, results, strict=True):
            _scatter(torch.cat(result, 2) if len(result) > 1 else result[0], group, out)
    return out.view(*qkv.shape[:-3], heads * head_dim)


def attend_backward(
    grad: Tensor, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `attend` for its first three arguments, given the one for its result."""
    window, groups = _windows_of(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    dtype = _exact(qkv.dtype)
    grad = grad.flatten(1, -2).unflatten(-1, (heads, head_dim))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_scale = torch.zeros_like(logit_scale, dtype=dtype)
    with torch.autocast(qkv.device.type, enabled=False):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        grad_table = torch.empty_like(table, memory_format=torch.contiguous_format)
        inputs = [_normalize(_gather(qkv.flatten(1, -4), group).to(dtype), logit_scale) for group in groups]
        given = [_gather(grad, group).to(dtype) for group in groups]
        grads = [torch.empty_like(tokens) for tokens, _ in inputs]
        for part in _slices(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[part], window)
            grad_bias = torch.zeros_like(bias)
            for group, (tokens, _), grad_out, grad_tokens in zip(groups, inputs, given, grads, strict=True):
                these = [grad_out[:, :, part], tokens[:, :, :, part], grad_tokens[:, :, :, part]]
                _add_to_bias_of(group, grad_bias, _unfused_backward(*these, _bias_of(group, bias)))
            grad_table[part] = dense_bias_backward(grad_bias, window)
        for group, normalized, grad_tokens in zip(groups, inputs, grads, strict=True):
            grad_scale += _normalize_backward(grad_tokens, *normalized, logit_scale)
            _scatter(grad_tokens, group, grad_qkv.flatten(1, -4))
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


def _windows_of(qkv: Tensor, window_size: Size, shift_size: Size) -> tuple[Size, tuple[WindowGroup, ...]]:
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


def _gather(maps: Tensor, group: WindowGroup) -> Tensor:
    """Copy the windows of a group from maps (B, prod(S), ...): (B * n, N, ...)."""
    windows = maps.index_select(1, group.tokens.flatten())
    return windows.view(-1, group.tokens.shape[1], *maps.shape[2:])


def _scatter(windows: Tensor, group: WindowGroup, maps: Tensor) -> None:
    """Write windows (B * n, N, ...) to their places in maps (B, prod(S), ...)."""
    maps.index_copy_(1, group.tokens.flatten(), windows.to(maps.dtype).reshape(len(maps), -1, *maps.shape[2:]))


def _scale(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    return logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp().squeeze(-1)


def _normalize(tokens: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Make unit vectors of queries and keys, and scale the queries, in place: (n, N, 3, heads, head_dim).

    Returns:
        The tokens, and the norms of queries and keys (n, N, 2, heads, 1), 1 instead of 0.
    """
    norms = torch.linalg.vector_norm(tokens[:, :, :2], dim=-1, keepdim=True, dtype=_exact(tokens.dtype))
    norms = torch.where(norms < 1e-12, 1.0, norms)
    tokens[:, :, 0].mul_(_scale(logit_scale, norms.dtype) / norms[:, :, 0])
    tokens[:, :, 1].div_(norms[:, :, 1])
    return tokens, norms


def _normalize_backward(grads: Tensor, tokens: Tensor, norms: Tensor, logit_scale: Tensor) -> Tensor:
    """Turn gradients of the results of `_normalize` into those of its tokens, in place; return that of `logit_scale`.

    The gradient of a vector is orthogonal to it, since its length has no effect.
    """
    scale = _scale(logit_scale, grads.dtype)
    (grad_q, grad_k, _), (q, k, _) = grads.unbind(2), tokens.unbind(2)
    along = (q * grad_q).sum(-1, keepdim=True)
    grad_q.mul_(scale).sub_(q * (along / scale)).div_(norms[:, :, 0])
    grad_k.sub_(k * (k * grad_k).sum(-1, keepdim=True)).div_(norms[:, :, 1])
    return along.sum((0, 1))[..., None]


def _bias_of(group: WindowGroup, bias: Tensor) -> Tensor:
    """Bias and mask of a group's windows (heads, N, N), from the bias of a whole window."""
    if group.positions is not None:
        bias = bias[:, group.positions[:, None], group.positions]
    return bias if group.mask is None else bias + group.mask


def _add_to_bias_of(group: WindowGroup, bias: Tensor, addend: Tensor) -> None:
    """Add what concerns a group's windows to the bias of a whole window."""
    if group.positions is None:
        bias += addend
    else:
        bias[:, group.positions[:, None], group.positions] += addend


def _fused(tokens: Tensor, bias: Tensor) -> Tensor:
    """Attend within windows of normalized tokens (n, N, 3, heads, head_dim): (n, N, heads, head_dim)."""
    parts = [
        F.scaled_dot_product_attention(*part.permute(2, 0, 3, 1, 4), attn_mask=bias[None], scale=1.0)
        for part in tokens.split(MAX_BATCH)
    ]
    return torch.cat(parts).transpose(1, 2) if len(parts) > 1 else parts[0].transpose(1, 2)


def _unfused_backward(grad_out: Tensor, tokens: Tensor, grads: Tensor, bias: Tensor) -> Tensor:
    """Write the gradient of `_fused` for its tokens to `grads`, and return that for its bias."""
    grad_bias = torch.zeros_like(bias)
    for windows in _slices(len(tokens), bias.numel(), bias.device):
        q, k, v = tokens[windows].permute(2, 0, 3, 1, 4)
        grad_q, grad_k, grad_v = grads[windows].permute(2, 0, 3, 1, 4)
        given = grad_out[windows].transpose(1, 2)
        weights = (q @ k.mT).add_(bias).softmax(-1)
        grad_v.copy_(weights.mT @ given)
        grad_logits = torch.ops.aten._softmax_backward_data(given @ v.mT, weights, -1, weights.dtype)
        grad_q.copy_(grad_logits @ k)
        grad_k.copy_(grad_logits.mT @ q)
        grad_bias += grad_logits.sum(0)
    return grad_bias

"""Window attention by `F.scaled_dot_product_attention` (SDPA), with a backward pass that recomputes the weights.

SDPA's fused kernels differ in what they can differentiate: those for the CPU and of cuDNN refuse a bias that needs a
gradient, the memory-efficient one writes that gradient for every window, and some are wrong for masks at certain sizes
(pytorch#196678). So only their forward pass is used here, without autograd. The backward pass is written with matrix
products. It takes a few windows at a time, so that only their (N, N) matrices are in memory, and accumulates the
gradient of the bias over the windows. Only the inputs are saved for it.

Shapes: `B` batch, `*S` spatial shape of the feature map, `N` tokens of a window, `n` windows of a batch and group.
"""

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from .autocast import no_autocast
from .reference import MAX_LOGIT_SCALE
from .tracing import is_compiling, is_counting_flops, is_tracing, is_transformed
from .window_groups import WindowGroup, WindowGroups, dense_bias, dense_bias_backward, window_groups
from .windows import Size, crop_bias_table, crop_bias_table_backward, fit_window

# Logits computed at a time, over heads and windows: 2 MiB in float32 stay in the cache of a CPU, 128 MiB keep a GPU
# busy
CHUNKS = {'cpu': 2**19, 'cuda': 2**25}
MAX_BATCH = 65535  # limit of a CUDA grid along one axis (pytorch#142228)
HAS_SCALE = 'scale' in (F.scaled_dot_product_attention.__doc__ or '')  # since torch 2.1


def can_run(qkv: Tensor) -> str | None:
    """Reason why this backend cannot run on `qkv`, or None if it can."""
    if is_tracing():
        return 'its custom operator cannot be exported'
    if is_transformed():
        return "torch.func and forward-mode AD support only PyTorch's own operators"
    if qkv.is_meta:
        return 'it gathers windows by index, and a tensor on the meta device has no data'
    if not HAS_SCALE:
        return f'it needs torch 2.1 or newer, this is {torch.__version__}'
    if (is_compiling() or is_counting_flops()) and not hasattr(torch.library, 'custom_op'):
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
    """See `swinv2_mm.ops.window_attention`; `sequential` has no effect: the backward pass always works in chunks."""
    if is_compiling() or is_counting_flops():
        return torch.ops.swinv2_mm.window_attention(qkv, logit_scale, bias_table, window_size, shift_size)
    return RecomputedAttention.apply(qkv, logit_scale, bias_table, window_size, shift_size)


class RecomputedAttention(torch.autograd.Function):
    """Window attention that saves only its inputs for the backward pass."""

    @staticmethod
    def forward(ctx, qkv, logit_scale, bias_table, window_size, shift_size):  # noqa: D102
        ctx.save_for_backward(qkv, logit_scale, bias_table)
        ctx.window_size, ctx.shift_size = window_size, shift_size
        return sdpa_forward(qkv, logit_scale, bias_table, window_size, shift_size)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_out):  # noqa: D102
        return *sdpa_backward(grad_out, *ctx.saved_tensors, ctx.window_size, ctx.shift_size), None, None


def sdpa_forward(qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size) -> Tensor:
    """Forward pass without autograd; arguments and result as of `swinv2_mm.ops.window_attention`."""
    window, windows = _window_groups(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    # a GPU has fused kernels for half precision, which accumulate in float32; a CPU gains nothing from it
    dtype = qkv.dtype if qkv.is_cuda else _logit_dtype(qkv.dtype)
    out = qkv.new_empty(len(qkv), math.prod(qkv.shape[1:-3]), heads, head_dim)
    with no_autocast(qkv.device):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        inputs = [_gather_qkv(qkv, group).to(dtype) for group in windows.groups]
        for tokens in inputs:
            _normalize(tokens[:, :2], _scales(logit_scale, _logit_dtype(dtype)))
        outs = [[] for _ in inputs]  # for each group, the chunks of heads
        for chunk in _chunks(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[chunk], window)
            for group, tokens, group_outs in zip(windows.groups, inputs, outs, strict=True):
                group_outs.append(_group_forward(tokens[:, :, :, chunk], _group_bias(group, bias)))
        _restore([_cat(group_outs, 2) for group_outs in outs], windows.q_restore, out)
    return out.view(*qkv.shape[:-3], heads * head_dim)


def sdpa_backward(
    grad_out: Tensor, qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `sdpa_forward` with respect to qkv, logit_scale and bias_table."""
    window, windows = _window_groups(qkv, window_size, shift_size)
    heads, head_dim = qkv.shape[-2:]
    dtype = _logit_dtype(qkv.dtype)
    grad_out = grad_out.flatten(1, -2).unflatten(-1, (heads, head_dim))
    grad_qkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    grad_scale = torch.zeros_like(logit_scale, dtype=dtype)
    with no_autocast(qkv.device):
        table = crop_bias_table(bias_table, window_size, window).to(dtype)
        grad_table = torch.empty_like(table, memory_format=torch.contiguous_format)
        scales = _scales(logit_scale, dtype)
        inputs = [_gather_qkv(qkv, group).to(dtype) for group in windows.groups]
        factors = [_normalize(tokens[:, :2], scales) for tokens in inputs]
        grad_outs = [_gather(grad_out, group.q_index).to(dtype) for group in windows.groups]
        grads = [torch.empty_like(tokens) for tokens in inputs]
        for chunk in _chunks(heads, math.prod(window) ** 2, qkv.device):
            bias = dense_bias(table[chunk], window)
            grad_bias = torch.zeros_like(bias)
            for group, do, tokens, grad_tokens in zip(windows.groups, grad_outs, inputs, grads, strict=True):
                views = do[:, :, chunk], tokens[:, :, :, chunk], grad_tokens[:, :, :, chunk]
                _accumulate_grad_bias(grad_bias, group, _group_backward(*views, _group_bias(group, bias)))
            grad_table[chunk] = dense_bias_backward(grad_bias, window)
        for tokens, grad_tokens, factor in zip(inputs, grads, factors, strict=True):
            grad_log_scales = _normalize_backward(grad_tokens[:, :2], tokens[:, :2], factor, scales)
            grad_scale += grad_log_scales[:, 0].sum((0, 1))[..., None]
        _restore(grads, windows.qkv_restore, grad_qkv.view(len(qkv), -1, heads, head_dim))
    grad_scale = torch.where(logit_scale <= MAX_LOGIT_SCALE, grad_scale, 0.0)
    grad_table = crop_bias_table_backward(grad_table, window_size, window)
    return grad_qkv, grad_scale.to(logit_scale.dtype), grad_table.to(bias_table.dtype)


def _register() -> None:
    """Register `sdpa_forward` and `sdpa_backward` as operators, opaque to torch.compile, of any spatial shape."""
    arguments = 'Tensor qkv, Tensor logit_scale, Tensor bias_table, int[] window_size, int[] shift_size'

    @torch.library.custom_op('swinv2_mm::window_attention', mutates_args=(), schema=f'({arguments}) -> Tensor')
    def forward(qkv, logit_scale, bias_table, window_size, shift_size):
        return sdpa_forward(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @forward.register_fake
    def _(qkv, *_):
        return qkv.new_empty(*qkv.shape[:-3], qkv.shape[-2] * qkv.shape[-1])

    @torch.library.custom_op(
        'swinv2_mm::window_attention_backward',
        mutates_args=(),
        schema=f'(Tensor grad_out, {arguments}) -> (Tensor, Tensor, Tensor)',
    )
    def backward(grad_out, qkv, logit_scale, bias_table, window_size, shift_size):
        return sdpa_backward(grad_out, qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size))

    @backward.register_fake
    def _(grad_out, qkv, logit_scale, bias_table, *_):
        return tuple(t.new_empty(t.shape) for t in (qkv, logit_scale, bias_table))

    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:3])
        ctx.sizes = inputs[3:]

    forward.register_autograd(
        lambda ctx, grad_out: (*backward(grad_out, *ctx.saved_tensors, *ctx.sizes), None, None),
        setup_context=setup_context,
    )


if hasattr(torch.library, 'custom_op'):
    _register()


def _window_groups(qkv: Tensor, window_size: Size, shift_size: Size) -> tuple[Size, WindowGroups]:
    """Window size in effect, and the groups of windows of the feature map `qkv`."""
    spatial_shape = tuple(qkv.shape[1:-3])
    window, shift = fit_window(spatial_shape, window_size, shift_size)
    # not cached for fake tensors: real index tensors must not mix with them, nor fake ones stay in the cache
    make = window_groups if type(qkv) is Tensor else window_groups.__wrapped__
    return window, make(spatial_shape, window, shift, qkv.device)


def _logit_dtype(dtype: torch.dtype) -> torch.dtype:
    """Type of logits and their gradients: half precision is too coarse for +-100 and for sums over many windows."""
    return torch.promote_types(dtype, torch.float32)


def _chunks(length: int, logits: int, device: torch.device) -> Iterator[slice]:
    """Slice `length` heads or windows, of so many logits each, into chunks of `CHUNKS` logits."""
    step = max(1, CHUNKS.get(device.type, CHUNKS['cuda']) // logits)
    return (slice(start, start + step) for start in range(0, length, step))


def _gather(x: Tensor, index: Tensor) -> Tensor:
    """Gather tokens (n, N) of flattened feature maps (B, prod(S), ...): (B * n, N, ...)."""
    return x.index_select(1, index.flatten()).view(-1, index.shape[1], *x.shape[2:])


def _gather_qkv(qkv: Tensor, group: WindowGroup) -> Tensor:
    """Gather the windows of a group from (B, *S, 3, heads, head_dim): (n, 3, N, heads, head_dim)."""
    return _gather(qkv.flatten(1, -3), group.qkv_index).unflatten(1, (3, -1))


def _restore(groups: list[Tensor], index: Tensor, out: Tensor) -> None:
    """Write gathered tokens of all groups to `out` (B, prod(S), ...), in the order of the feature map.

    `index` is the inverse permutation of that of `_gather`: on a CPU, reading by index is faster than writing by index.
    """
    tokens = _cat([group.to(out.dtype).reshape(len(out), -1, *out.shape[2:]) for group in groups], 1)
    torch.index_select(tokens, 1, index, out=out)


def _cat(tensors: list[Tensor], dim: int) -> Tensor:
    """Concatenate tensors, without a copy if there is only one."""
    return torch.cat(tensors, dim) if len(tensors) > 1 else tensors[0]


def _scales(logit_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Norms that `_normalize` gives to queries, the clamped scale, and to keys, 1: (2, 1, heads, 1)."""
    q_scale = logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp().view(1, -1, 1)
    return torch.stack([q_scale, torch.ones_like(q_scale)])


def _normalize(x: Tensor, scales: Tensor) -> Tensor:
    """L2-normalize queries and keys (n, 2, N, heads, head_dim) and multiply by `scales`, in place.

    Returns:
        What each vector was multiplied by, (n, 2, N, heads, 1).
    """
    norms = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=scales.dtype)
    factors = scales / torch.where(norms < 1e-12, 1.0, norms)
    x.mul_(factors)
    return factors


def _normalize_backward(grad: Tensor, x: Tensor, factors: Tensor, scales: Tensor) -> Tensor:
    """Gradient of `_normalize`: replace the gradient of its output x by that of its input, in place.

    The part of the gradient parallel to x is removed, because the norm of the input has no effect.

    Returns:
        The gradient with respect to the logarithm of the scale of each vector, (n, 2, N, heads, 1).
    """
    grad_log_scales = (x * grad).sum(-1, keepdim=True)
    grad.addcmul_(x, grad_log_scales / scales**2, value=-1).mul_(factors)
    return grad_log_scales


def _group_bias(group: WindowGroup, bias: Tensor) -> Tensor:
    """Bias and mask of the windows of a group, from the bias (heads, N, N) of a full window."""
    if group.bias_rows is not None:
        bias = bias[:, group.bias_rows[:, None], group.bias_cols]
    return bias if group.mask is None else bias + group.mask


def _accumulate_grad_bias(grad_bias: Tensor, group: WindowGroup, group_grad_bias: Tensor) -> None:
    """Add the gradient of a group's bias to that of a full window, in place."""
    if group.bias_rows is None:
        grad_bias += group_grad_bias
    else:
        grad_bias[:, group.bias_rows[:, None], group.bias_cols] += group_grad_bias


def _group_forward(tokens: Tensor, bias: Tensor) -> Tensor:
    """Attention within windows of normalized tokens (n, 3, N, heads, head_dim): (n, N, heads, head_dim)."""
    outs = [
        F.scaled_dot_product_attention(*_heads_first(batch), attn_mask=bias[None], scale=1.0).transpose(1, 2)
        for batch in tokens.split(MAX_BATCH)
    ]
    return _cat(outs, 0)


def _group_backward(grad_out: Tensor, tokens: Tensor, grad_tokens: Tensor, bias: Tensor) -> Tensor:
    """Write the gradient of `_group_forward` for its tokens to `grad_tokens`, and return that for its bias."""
    grad_bias = torch.zeros_like(bias)
    for chunk in _chunks(len(tokens), bias.numel(), bias.device):
        q, k, v = _heads_first(tokens[chunk])
        grad_q, grad_k, grad_v = _heads_first(grad_tokens[chunk])
        do = grad_out[chunk].transpose(1, 2)
        weights = (q @ k.mT).add_(bias).softmax(-1)
        grad_v.copy_(weights.mT @ do)
        grad_logits = torch.ops.aten._softmax_backward_data(do @ v.mT, weights, -1, weights.dtype)
        grad_q.copy_(grad_logits @ k)
        grad_k.copy_(grad_logits.mT @ q)
        grad_bias += grad_logits.sum(0)
    return grad_bias


def _heads_first(tokens: Tensor) -> Tensor:
    """View tokens (n, 3, N, heads, head_dim) as queries, keys and values: (3, n, heads, N, head_dim)."""
    return tokens.permute(1, 0, 3, 2, 4)

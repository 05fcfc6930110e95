"""Window attention in plain PyTorch, equal to the official code. The other backends are tested against it."""

import math

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from .autocast import no_autocast
from .tracing import is_transformed
from .windows import (
    Size,
    attention_mask,
    crop_bias_table,
    fit_window,
    pad_to_windows,
    partition,
    relative_position_index,
    reverse,
    token_regions,
)

MAX_LOGIT_SCALE = math.log(100)  # tau > 0.01 (Sec. 3.2)
# logits that sequential attention computes at a time: 128 MiB in float32, enough to keep a GPU busy
CHUNK = 2**25


def l2_normalize(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last axis.

    Equal to `F.normalize`, forward and backward, except for zero vectors: there `F.normalize` has a gradient of 1e12,
    which overflows in half precision and makes the gradient of the weights NaN.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm < 1e-12, 1.0, norm)


def reference_window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window_size: Size,
    shift_size: Size,
    sequential: bool = False,
) -> Tensor:
    """See `swinv2_mm.ops.window_attention`."""
    spatial_shape = tuple(qkv.shape[1:-3])
    axes = tuple(range(1, 1 + len(spatial_shape)))
    window, shift = fit_window(spatial_shape, window_size, shift_size)

    qkv = pad_to_windows(qkv, window)
    padded_shape = tuple(qkv.shape[1:-3])
    if any(shift):
        qkv = qkv.roll([-d for d in shift], axes)
    qkv = partition(qkv, window)  # (B * nW, N, 3, heads, head_dim)
    # also the type of the logits: half precision is too coarse for +-100, and for sums over the gradient of the table
    table = bias_table.to(torch.promote_types(qkv.dtype, torch.float32))
    bias = crop_bias_table(table, window_size, window)[:, relative_position_index(window, qkv.device)]
    regions = token_regions(spatial_shape, padded_shape, window, shift, qkv.device)
    # torch.func cannot differentiate through torch.utils.checkpoint
    attention = _chunked_attention if sequential and not is_transformed() else _attention
    out = reverse(attention(qkv, logit_scale, bias, regions), window, padded_shape)
    if any(shift):
        out = out.roll(shift, axes)
    return out[(slice(None), *(slice(s) for s in spatial_shape))]


def _attention(qkv: Tensor, logit_scale: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
    """Attention within each window: (n, N, 3, heads, head_dim) -> (n, N, heads * head_dim).

    `bias` is (heads, N, N). `regions` are the region ids (m, N) of m windows, repeated n / m times.
    """
    q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each (n, heads, N, head_dim)
    with no_autocast(qkv.device):
        logits = l2_normalize(q.to(bias.dtype)) @ l2_normalize(k.to(bias.dtype)).transpose(-2, -1)
        logits = logits * logit_scale.to(bias.dtype).clamp(max=MAX_LOGIT_SCALE).exp() + bias
        if regions is not None:
            mask = attention_mask(regions)[:, None].to(bias.dtype)
            logits = (logits.unflatten(0, (-1, len(regions))) + mask).flatten(0, 1)
        out = logits.softmax(-1).to(v.dtype) @ v
    return out.transpose(1, 2).flatten(2)


def _chunked_attention(qkv: Tensor, logit_scale: Tensor, bias: Tensor, regions: Tensor | None) -> Tensor:
    """As `_attention`, a few windows at a time, each chunk recomputed in the backward pass.

    Without recomputation, autograd would keep the attention weights of all chunks, and no memory would be saved.
    """
    chunks = qkv.split(max(1, CHUNK // bias.numel()))
    if regions is None:
        parts = [None] * len(chunks)
    else:
        parts = regions.repeat(len(qkv) // len(regions), 1).split(len(chunks[0]))
    return torch.cat(
        [
            checkpoint(_attention, chunk, logit_scale, bias, part, use_reentrant=False, preserve_rng_state=False)
            for chunk, part in zip(chunks, parts, strict=True)
        ]
    )

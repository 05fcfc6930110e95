"""The meaning of window attention, in plain PyTorch. Every other backend is tested against this one."""

import math

import torch
from torch import Tensor

from .windows import (
    Size,
    attention_mask,
    crop_bias_table,
    fit_window,
    pad_to_windows,
    partition,
    relative_position_index,
    reverse,
)

MAX_LOGIT_SCALE = math.log(100)  # tau > 0.01 (Sec. 3.2)


def unit_vectors(x: Tensor) -> Tensor:
    """Divide by the L2 norm over the last axis.

    Equal to F.normalize, forward and backward, except where the norm is zero: there F.normalize has a gradient of
    1e12, which overflows in half precision and turns the weights' gradient into NaN.
    """
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / torch.where(norm < 1e-12, 1.0, norm)


def reference_window_attention(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Size, shift_size: Size
) -> Tensor:
    """See `swinv2_mm.ops.window_attention`."""
    map_size = tuple(qkv.shape[1:-3])
    axes = tuple(range(1, 1 + len(map_size)))
    window, shift = fit_window(map_size, window_size, shift_size)

    qkv = pad_to_windows(qkv, window)
    padded_size = tuple(qkv.shape[1:-3])
    if any(shift):
        qkv = qkv.roll([-d for d in shift], axes)
    q, k, v = partition(qkv, window).permute(2, 0, 3, 1, 4)  # each (B * nW, heads, N, head_dim)

    dtype = torch.promote_types(qkv.dtype, torch.float32)
    with torch.autocast(qkv.device.type, enabled=False):  # half precision cannot hold logits of +-100
        logits = unit_vectors(q.to(dtype)) @ unit_vectors(k.to(dtype)).transpose(-2, -1)
        logits = logits * logit_scale.to(dtype).clamp(max=MAX_LOGIT_SCALE).exp()
        table = crop_bias_table(bias_table.to(dtype), window_size, window)
        logits = logits + table[:, relative_position_index(window, qkv.device)]
        mask = attention_mask(map_size, padded_size, window, shift, qkv.device)
        if mask is not None:
            logits = (logits.unflatten(0, (-1, len(mask))) + mask[:, None].to(dtype)).flatten(0, 1)
        out = logits.softmax(-1).to(v.dtype) @ v

    out = reverse(out.transpose(1, 2).flatten(2), window, padded_size)
    if any(shift):
        out = out.roll(shift, axes)
    return out[(slice(None), *(slice(s) for s in map_size))]

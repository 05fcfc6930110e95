"""Floating-point operations of this package's operators, for `torch.utils.flop_counter.FlopCounterMode`."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .windows import count_pairs, fit_window


def forward_flops(qkv_shape, scale_shape, table_shape, window_size, shift_size, **_) -> int:
    """Products of queries with keys, and of weights with values; padding is not computed."""
    batch, *map_size, _, heads, head_dim = qkv_shape
    window, shift = fit_window(tuple(map_size), tuple(window_size), tuple(shift_size))
    return 2 * 2 * batch * heads * head_dim * count_pairs(map_size, window, shift)


def backward_flops(grad_shape, qkv_shape, *shapes_and_sizes, **_) -> int:
    """Five products instead of two: the weights once more, and gradients of queries, keys, values and weights."""
    return forward_flops(qkv_shape, None, None, *shapes_and_sizes[-2:]) * 5 // 2


FORWARD = torch.ops.swinv2_mm.window_attention, torch.ops.swinv2_mm.triton_window_attention
BACKWARD = torch.ops.swinv2_mm.window_attention_backward, torch.ops.swinv2_mm.triton_window_attention_backward
register_flop_formula(FORWARD)(forward_flops)
register_flop_formula(BACKWARD)(backward_flops)


def tell(counter: Any) -> None:
    """Give the formulas to a counter that was made before they were registered."""
    counter.flop_registry.update({operator: flop_registry[operator] for operator in FORWARD + BACKWARD})

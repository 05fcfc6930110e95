"""FLOP formulas of this package's operators, for `torch.utils.flop_counter.FlopCounterMode`."""

from typing import Any

import torch
from torch.utils.flop_counter import flop_registry, register_flop_formula

from .window_groups import count_pairs
from .windows import fit_window


def forward_flops(qkv_shape, scale_shape, table_shape, window_size, shift_size, **_) -> int:
    """FLOPs of two matrix products, Q K^T and P V, without padding."""
    batch, *spatial_shape, _, heads, head_dim = qkv_shape
    window, shift = fit_window(tuple(spatial_shape), tuple(window_size), tuple(shift_size))
    return 2 * 2 * batch * heads * head_dim * count_pairs(spatial_shape, window, shift)


def backward_flops(grad_shape, qkv_shape, *shapes_and_sizes, **_) -> int:
    """FLOPs of five matrix products instead of two: Q K^T recomputed, dV, dP, dQ and dK."""
    return forward_flops(qkv_shape, None, None, *shapes_and_sizes[-2:]) * 5 // 2


FORWARD = torch.ops.swinv2_mm.window_attention, torch.ops.swinv2_mm.triton_window_attention
BACKWARD = torch.ops.swinv2_mm.window_attention_backward, torch.ops.swinv2_mm.triton_window_attention_backward
register_flop_formula(FORWARD)(forward_flops)
register_flop_formula(BACKWARD)(backward_flops)


def add_formulas(counter: Any) -> None:
    """Add the formulas to a counter that was created before this module registered them."""
    counter.flop_registry.update({operator: flop_registry[operator] for operator in FORWARD + BACKWARD})

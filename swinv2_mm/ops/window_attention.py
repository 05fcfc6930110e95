"""Shifted-window cosine attention: one function with a choice of backends."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, sdpa
from .tracing import active_flop_counter, assume_constant_result
from .triton import attention as triton
from .triton import selfcheck


class Backend(NamedTuple):
    """An implementation of window attention."""

    run: Callable[..., Tensor]
    can_run: Callable[[Tensor], str | None]  # qkv -> reason why it cannot run, or None


BACKENDS = {
    'triton': Backend(triton.triton_window_attention, triton.can_run),
    'sdpa': Backend(sdpa.sdpa_window_attention, sdpa.can_run),
    'reference': Backend(reference.reference_window_attention, lambda qkv: None),
}
AUTO = 'triton', 'sdpa', 'reference'  # 'auto' takes the first of these that can run


def check_backend(name: str) -> None:
    """Raise a ValueError unless `name` is 'auto' or a backend."""
    if name != 'auto' and name not in BACKENDS:
        raise ValueError(
            f"attention backend {name!r} is not known; use 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )


def _select_backend(name: str, qkv: Tensor, window_size: Sequence[int]) -> Backend:
    if name != 'auto':
        reason = BACKENDS[name].can_run(qkv)
        if reason:
            raise ValueError(f"attention backend {name!r} cannot run: {reason}; 'auto' takes another one")
        return BACKENDS[name]
    for candidate in AUTO:
        reason = BACKENDS[candidate].can_run(qkv)
        if reason is None and candidate == 'triton':
            reason = selfcheck.why_not(qkv, window_size)
        if reason is None:
            return BACKENDS[candidate]
        _log_skipped(candidate, reason)
    raise AssertionError('the reference runs everywhere')


@assume_constant_result  # torch.compile would break the graph at the logger
def _log_skipped(name: str, reason: str) -> None:
    _log_skipped_once(name, reason)


@functools.cache
def _log_skipped_once(name: str, reason: str) -> None:
    logging.getLogger('swinv2_mm').info('attention backend %r is not used: %s', name, reason)


def window_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window_size: Sequence[int],
    shift_size: Sequence[int],
    backend: str = 'auto',
    sequential: bool = False,
) -> Tensor:
    """Scaled cosine attention within shifted windows (Sec. 3.2 and 3.3), for any number of axes.

    A feature map whose spatial shape `*S` is no multiple of the window size is padded at the end of each axis, and no
    token attends to padding. An axis that fits into one window is not shifted. Logits and softmax are computed in
    float32, or in float64 for float64 inputs.

    Args:
        qkv: (B, *S, 3, heads, head_dim), in image order.
        logit_scale: (heads, 1, 1), the logarithm of the scale; the scale is clamped to 100.
        bias_table: (heads, prod(2 * window - 1)), added to the logits by relative position (see `LogCPB`). With qkv in
            half precision, 'triton' rounds bias - 8 to float16, which is accurate for biases from 0 to 16.
        window_size: Tokens of a window along each axis of `*S`.
        shift_size: Shift of the windows along each axis, from 0 to window size - 1.
        backend: 'triton', 'sdpa' or 'reference', or 'auto' for the first of these that can run. 'auto' takes 'triton'
            only if its kernels agree with 'reference' on this GPU, which is checked once.
        sequential: Whether 'reference' computes a few windows at a time and recomputes them in the backward pass, so
            that only their attention weights are in memory (sequential self-attention, Sec. 3.4). The other backends
            never hold the attention weights of all windows.

    Returns:
        (B, *S, heads * head_dim), in image order.

    Raises:
        ValueError: The shapes do not match, or the backend is unknown or cannot run.
    """
    check_backend(backend)
    _check_shapes(qkv, logit_scale, bias_table, window_size, shift_size)
    _add_flop_formulas(active_flop_counter())
    run = _select_backend(backend, qkv, window_size).run
    return run(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size), sequential)


def _add_flop_formulas(counter: Any) -> None:
    if counter is None or not hasattr(torch.library, 'custom_op'):
        return
    from . import flops  # not at the top: it imports Triton

    flops.add_formulas(counter)


def _check_shapes(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Sequence[int], shift_size: Sequence[int]
) -> None:
    axes = qkv.dim() - 4
    if axes < 1 or qkv.shape[-3] != 3:
        raise ValueError(f'qkv must have the shape (B, *S, 3, heads, head_dim), got {tuple(qkv.shape)}')
    if not len(window_size) == len(shift_size) == axes:
        raise ValueError(
            f'qkv of shape {tuple(qkv.shape)} has {axes} spatial axes, but window_size is {tuple(window_size)} '
            f'and shift_size is {tuple(shift_size)}'
        )
    if any(not 0 <= d < w for w, d in zip(window_size, shift_size, strict=True)):
        raise ValueError(f'shift_size {tuple(shift_size)} must lie between 0 and window_size {tuple(window_size)} - 1')
    heads = qkv.shape[-2]
    table_shape = (heads, math.prod([2 * w - 1 for w in window_size]))
    if tuple(bias_table.shape) != table_shape or tuple(logit_scale.shape) != (heads, 1, 1):
        raise ValueError(
            f'{heads} heads and window_size {tuple(window_size)} need bias_table {table_shape} and logit_scale '
            f'{(heads, 1, 1)}, got {tuple(bias_table.shape)} and {tuple(logit_scale.shape)}'
        )

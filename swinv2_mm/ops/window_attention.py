"""Shifted-window cosine attention with one signature and a choice of backends."""

import functools
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import reference, sdpa
from .recording import at_compilation, flop_counter
from .triton import attention as triton
from .triton import selfcheck


class Backend(NamedTuple):
    """A way to compute window attention."""

    run: Callable[..., Tensor]
    can_run: Callable[[Tensor], str | None]  # why it cannot for this qkv, or None


BACKENDS = {
    'triton': Backend(triton.triton_window_attention, triton.can_run),
    'sdpa': Backend(sdpa.sdpa_window_attention, sdpa.can_run),
    'reference': Backend(reference.reference_window_attention, lambda qkv: None),
}
AUTO = 'triton', 'sdpa', 'reference'  # what 'auto' asks, in this order


def check_backend(name: str) -> None:
    """Raise a ValueError unless `name` is 'auto' or a backend."""
    if name != 'auto' and name not in BACKENDS:
        raise ValueError(
            f"attention backend {name!r} is not known; use 'auto' or one of {', '.join(map(repr, BACKENDS))}"
        )


def _choose(name: str, qkv: Tensor, window_size: Sequence[int]) -> Backend:
    if name != 'auto':
        reason = BACKENDS[name].can_run(qkv)
        if reason:
            raise ValueError(f"attention backend {name!r} cannot run: {reason}; 'auto' takes another one")
        return BACKENDS[name]
    for other in AUTO:
        reason = BACKENDS[other].can_run(qkv)
        if reason is None and other == 'triton':
            reason = selfcheck.why_not(qkv, window_size)
        if reason is None:
            return BACKENDS[other]
        _tell(other, reason)
    raise AssertionError('the reference runs everywhere')


@at_compilation
def _tell(name: str, reason: str) -> None:
    _tell_once(name, reason)


@functools.cache
def _tell_once(name: str, reason: str) -> None:
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
    """Scaled cosine attention within the shifted windows of a map (Sec. 3.2 and 3.3), for any number of axes.

    A map that the windows do not divide is padded at the end of each axis, and no token attends to padding. An axis
    that fits into one window is not shifted. Logits and softmax are computed in float32, or in float64 for float64.

    Args:
        qkv: (B, *S, 3, heads, head_dim), in image order.
        logit_scale: (heads, 1, 1), the logarithm of the scale; its exponential is cut off at 100.
        bias_table: (heads, prod(2 * window - 1)), added to the logits by relative position (see `LogCPB`). For maps in
            half precision, 'triton' is made for biases from 0 to 16: it rounds their distance to 8 to float16.
        window_size: Tokens of a window along each axis of `*S`.
        shift_size: How far the windows are shifted along each axis, from 0 to the window size less 1.
        backend: 'triton', 'sdpa' or 'reference', or 'auto' for the first of these that can run. It takes 'triton' only
            if its kernels agree with 'reference' on this GPU, which is checked once.
        sequential: Whether to attend in a few windows at a time, and to compute them again in the backward pass, so
            that the attention weights of those alone are in memory (sequential self-attention, Sec. 3.4). The backends
            'triton' and 'sdpa' do so in any case.

    Returns:
        (B, *S, heads * head_dim), in image order.

    Raises:
        ValueError: The shapes do not fit each other, or the backend is not known or cannot run.
    """
    check_backend(backend)
    _check_shapes(qkv, logit_scale, bias_table, window_size, shift_size)
    _give_formulas(flop_counter())
    run = _choose(backend, qkv, window_size).run
    return run(qkv, logit_scale, bias_table, tuple(window_size), tuple(shift_size), sequential)


def _give_formulas(counter: Any) -> None:
    if counter is None or not hasattr(torch.library, 'custom_op'):
        return
    from . import flops  # not at the top: it imports Triton

    flops.tell(counter)


def _check_shapes(
    qkv: Tensor, logit_scale: Tensor, bias_table: Tensor, window_size: Sequence[int], shift_size: Sequence[int]
) -> None:
    axes = qkv.dim() - 4
    if axes < 1 or qkv.shape[-3] != 3:
        raise ValueError(f'qkv must have the shape (B, *S, 3, heads, head_dim), got {tuple(qkv.shape)}')
    if not len(window_size) == len(shift_size) == axes:
        raise ValueError(
            f'qkv of shape {tuple(qkv.shape)} has {axes} map axes, but window_size is {tuple(window_size)} '
            f'and shift_size is {tuple(shift_size)}'
        )
    if any(not 0 <= d < w for w, d in zip(window_size, shift_size, strict=True)):
        raise ValueError(
            f'shift_size {tuple(shift_size)} must lie between 0 and window_size {tuple(window_size)} less 1'
        )
    heads = qkv.shape[-2]
    table_shape = (heads, math.prod([2 * w - 1 for w in window_size]))
    if tuple(bias_table.shape) != table_shape or tuple(logit_scale.shape) != (heads, 1, 1):
        raise ValueError(
            f'{heads} heads and window_size {tuple(window_size)} need bias_table {table_shape} and logit_scale '
            f'{(heads, 1, 1)}, got {tuple(bias_table.shape)} and {tuple(logit_scale.shape)}'
        )

"""Random inputs of window attention, and its output by a loop over token pairs, for any number of axes."""

import functools
import itertools
import math

import torch
from torch import Tensor

NAMES = 'out', 'qkv', 'logit_scale', 'bias_table'  # the output, and the inputs that have gradients
MASKED = -100.0  # between tokens that are neighbours only because of the shift (official code)


def draw(size, heads=3, window=(4, 4), dtype=torch.float32, head_dim=32):
    """One sample: qkv, logit_scale with values at and beyond its clamp, bias_table."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(1, *size, 3, heads, head_dim, generator=generator, dtype=dtype)
    # float32 rounds ln 100, where the gradient of the clamp ends: stay below it
    clamp = math.log(100) if dtype == torch.float64 else 4.605
    scale = torch.tensor([clamp, 2.3, 5.0, 0.0][:heads], dtype=dtype).view(-1, 1, 1)
    table = 16 * torch.rand(heads, math.prod(2 * w - 1 for w in window), generator=generator, dtype=dtype)
    return qkv, scale, table


def draw_small(size, window, heads=2, dim=3, batch=1, dtype=torch.float64, seed=0):
    """Like `draw`, but in float64 and small enough for `brute_force_attention`."""
    generator = torch.Generator().manual_seed(seed)
    qkv = torch.randn(batch, *size, 3, heads, dim, dtype=dtype, generator=generator)
    logit_scale = torch.tensor([1.0, 5.0], dtype=dtype)[:heads].view(-1, 1, 1)  # the second exceeds ln 100
    table = torch.rand(heads, math.prod(2 * w - 1 for w in window), dtype=dtype, generator=generator) * 16
    return qkv, logit_scale, table


def brute_force_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    extra_windows: int = 0,
) -> Tensor:
    """One sample: qkv (*S, 3, heads, D) -> (*S, heads * D). `extra_windows` is added padding of each axis."""
    size = qkv.shape[:-3]
    shift = tuple(0 if s <= w else d for s, w, d in zip(size, window, shift, strict=True))
    padded = tuple(math.ceil(s / w) * w + extra_windows * w for s, w in zip(size, window, strict=True))
    table = bias_table.view(-1, *(2 * w - 1 for w in window))
    tokens = list(itertools.product(*map(range, size)))
    out = torch.zeros(*size, *qkv.shape[-2:], dtype=torch.float64)
    for query in tokens:
        keys, logits = [], []
        for key in tokens:
            if place(query, padded, window, shift)[0] != place(key, padded, window, shift)[0]:
                continue
            offset = tuple(
                a - b
                for a, b in zip(
                    place(query, padded, window, shift)[2], place(key, padded, window, shift)[2], strict=True
                )
            )
            q, k = qkv[query][0], qkv[key][1]
            cosine = (q * k).sum(-1) / (q.norm(dim=-1) * k.norm(dim=-1))
            logit = cosine * logit_scale.flatten().exp().clamp(max=100.0)
            logit = logit + table[(slice(None), *(o + w - 1 for o, w in zip(offset, window, strict=True)))]
            if place(query, padded, window, shift)[1] != place(key, padded, window, shift)[1]:
                logit = logit + MASKED
            keys.append(key)
            logits.append(logit)
        weights = torch.stack(logits).softmax(0)  # (keys, heads)
        out[query] = sum(w[:, None] * qkv[key][2] for w, key in zip(weights, keys, strict=True))
    return out.flatten(-2)


def place(token: tuple[int, ...], padded: tuple[int, ...], window: tuple[int, ...], shift: tuple[int, ...]):
    """The window of a token, whether the shift wraps it around each axis, and its position in the window."""
    rolled = [(t - d) % p for t, d, p in zip(token, shift, padded, strict=True)]
    return (
        [r // w for r, w in zip(rolled, window, strict=True)],
        [t < d for t, d in zip(token, shift, strict=True)],
        [r % w for r, w in zip(rolled, window, strict=True)],
    )


@functools.cache
def expected_of_pairs(size, window, shift):
    """Expected output of a batch of two, cached because the loop over token pairs is slow."""
    qkv, scale, table = draw_small(size, window, batch=2)
    return torch.stack([brute_force_attention(sample, scale, table, window, shift) for sample in qkv])

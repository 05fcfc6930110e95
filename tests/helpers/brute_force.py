"""Window attention by its definition: a loop over pairs of tokens, in float64, for any number of axes."""

import itertools
import math

import torch
from torch import Tensor

MASKED = -100.0  # between tokens that the shift brought together (official code)


def brute_force_attention(
    qkv: Tensor,
    logit_scale: Tensor,
    bias_table: Tensor,
    window: tuple[int, ...],
    shift: tuple[int, ...],
    extra_windows: int = 0,
) -> Tensor:
    """One sample: qkv (*S, 3, heads, D) -> (*S, heads * D). `extra_windows` pads each axis by so many windows more."""
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
    """Window of a token, whether the roll carried it over the end of each axis, and where in the window it lies."""
    rolled = [(t - d) % p for t, d, p in zip(token, shift, padded, strict=True)]
    return (
        [r // w for r, w in zip(rolled, window, strict=True)],
        [t < d for t, d in zip(token, shift, strict=True)],
        [r % w for r, w in zip(rolled, window, strict=True)],
    )

"""Triton kernels of the post-norm residual: x + drop_path(LayerNorm(branch)), and its gradients.

A program takes ROWS tokens of one sample at a time, with all their channels. Statistics and sums are float32.
"""

import triton
import triton.language as tl


@triton.jit
def _tile_of_tokens(tile, tokens, C: tl.constexpr, BLOCK_C: tl.constexpr, ROWS: tl.constexpr):
    """Sample of a tile, its tokens counted over the batch and which of them exist, its elements and their mask."""
    tiles = tl.cdiv(tokens, ROWS)  # of a sample
    sample = tile // tiles
    place = tile % tiles * ROWS + tl.arange(0, ROWS)
    rows = sample.to(tl.int64) * tokens + place
    cols = tl.arange(0, BLOCK_C)
    valid = place < tokens
    return sample, rows, valid, rows[:, None] * C + cols[None, :], valid[:, None] & (cols < C)[None, :]


@triton.jit
def _drop_path(values, kept, sample, keep_prob):
    """Drop the branch of a sample, or its gradient, or divide it by `keep_prob`."""
    if kept is not None:
        values *= tl.load(kept + sample).to(tl.float32) / keep_prob
    return values


@triton.jit
def post_norm_forward(
    x,
    branch,
    weight,
    bias,
    kept,
    out,
    statistics,
    tokens,
    keep_prob,
    eps,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Sum, and mean and reciprocal standard deviation of each token of the branch. Programs: tiles."""
    sample, rows, valid, offs, mask = _tile_of_tokens(tl.program_id(0), tokens, C, BLOCK_C, ROWS)
    cols = tl.arange(0, BLOCK_C)
    values = tl.load(branch + offs, mask=mask, other=0.0).to(tl.float32)
    mu = tl.sum(values, 1) / C
    centred = tl.where(mask, values - mu[:, None], 0.0)
    r = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / C + eps)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    b = tl.load(bias + cols, mask=cols < C, other=0.0).to(tl.float32)
    normed = centred * r[:, None] * w[None, :] + b[None, :]
    result = tl.load(x + offs, mask=mask, other=0.0).to(tl.float32) + _drop_path(normed, kept, sample, keep_prob)
    tl.store(out + offs, result.to(out.dtype.element_ty), mask=mask)
    tl.store(statistics + 2 * rows, mu, mask=valid)
    tl.store(statistics + 2 * rows + 1, r, mask=valid)


@triton.jit
def post_norm_backward(
    grad_out,
    branch,
    weight,
    kept,
    statistics,
    grad_branch,
    grad_weight,
    grad_bias,
    tokens,
    tiles,
    keep_prob,
    C: tl.constexpr,
    BLOCK_C: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Gradient of the branch, and each program's part of those of weight and bias, (programs, C)."""
    cols = tl.arange(0, BLOCK_C)
    w = tl.load(weight + cols, mask=cols < C, other=0.0).to(tl.float32)
    sum_w = tl.zeros([ROWS, BLOCK_C], tl.float32)
    sum_b = tl.zeros([ROWS, BLOCK_C], tl.float32)
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        sample, rows, valid, offs, mask = _tile_of_tokens(tile, tokens, C, BLOCK_C, ROWS)
        grad = tl.load(grad_out + offs, mask=mask, other=0.0).to(tl.float32)
        grad = _drop_path(grad, kept, sample, keep_prob)
        values = tl.load(branch + offs, mask=mask, other=0.0).to(tl.float32)
        mu = tl.load(statistics + 2 * rows, mask=valid, other=0.0)
        r = tl.load(statistics + 2 * rows + 1, mask=valid, other=0.0)
        unit = (values - mu[:, None]) * r[:, None]  # not zero beyond the channels, where `grad` is
        sum_w += grad * unit
        sum_b += grad
        grad *= w[None, :]
        along_ones = tl.sum(grad, 1) / C
        along_unit = tl.sum(grad * unit, 1) / C
        grad = r[:, None] * (grad - along_ones[:, None] - unit * along_unit[:, None])
        tl.store(grad_branch + offs, grad.to(grad_branch.dtype.element_ty), mask=mask)
    part = tl.program_id(0) * C + cols
    tl.store(grad_weight + part, tl.sum(sum_w, 0), mask=cols < C)
    tl.store(grad_bias + part, tl.sum(sum_b, 0), mask=cols < C)

"""Triton kernels of window attention: the forward pass and all gradients, none of which writes an N x N matrix.

Maps stay in image order: a program computes where the tokens of its window lie, whether they are padding, and which of
them the roll carried from the other end of an axis. The bias is read from its table. Maps of one or two axes have
leading axes of one token. Sizes in capitals are known to the compiler.

Names: `q`, `k`, `v` and `given`, the gradient of the result, are tiles (tokens, BLOCK_DIM); `logits`, `weights` and
their gradients are tiles (tokens, tokens). The tokens of a tile are described by `rows`: where they are in the map;
`known`: whether they are part of it, and of the window; `regions`: a number that differs between tokens which the roll
brought together; and `entries`: that of a query less that of a key is the place in the bias table.

Logits are multiplied by log2(e) where they are made, so that the softmax is exp2(logits - largest). If the product came
there, compilers would make it and the difference one multiply-add that rounds once: logits of what is no key, which are
huge, would then not be equal.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # ln 100
CROSSING = tl.constexpr(-100.0)
# Logits of what is no key. Finite, so that the first tiles of a row may hold no key at all: what they leave in its sum
# is multiplied by zero at the first real one.
NEVER = tl.constexpr(-1e30)


@triton.jit
def _along_axis(position, window, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr):
    """Coordinate of tokens in the map, and whether the roll carried them over its end."""
    padded = tl.cdiv(size, WINDOW) * WINDOW
    place = window * WINDOW + position + SHIFT
    wrapped = place >= padded
    return tl.where(wrapped, place - padded, place), wrapped


@triton.jit
def _tokens(p0, p1, p2, window, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, TABLE: tl.constexpr):
    """Describe tokens at the positions `p0`, `p1`, `p2` of a window, counted over all windows of the batch."""
    known = (p0 < WINDOW[0]) & (p1 < WINDOW[1]) & (p2 < WINDOW[2])
    p0, p1, p2 = tl.minimum(p0, WINDOW[0] - 1), tl.minimum(p1, WINDOW[1] - 1), tl.minimum(p2, WINDOW[2] - 1)
    n0, n1, n2 = tl.cdiv(size[0], WINDOW[0]), tl.cdiv(size[1], WINDOW[1]), tl.cdiv(size[2], WINDOW[2])
    c0, wrapped0 = _along_axis(p0, window // (n1 * n2) % n0, size[0], WINDOW[0], SHIFT[0])
    c1, wrapped1 = _along_axis(p1, window // n2 % n1, size[1], WINDOW[1], SHIFT[1])
    c2, wrapped2 = _along_axis(p2, window % n2, size[2], WINDOW[2], SHIFT[2])
    known = known & (c0 < size[0]) & (c1 < size[1]) & (c2 < size[2])
    sample = (window // (n0 * n1 * n2)).to(tl.int64)
    rows = ((sample * size[0] + c0) * size[1] + c1) * size[2] + c2
    regions = wrapped0.to(tl.int32) + 2 * wrapped1.to(tl.int32) + 4 * wrapped2.to(tl.int32)
    entries = (p0 * (2 * TABLE[1] - 1) + p1) * (2 * TABLE[2] - 1) + p2
    return rows, known, regions, entries


@triton.jit
def _run_of_tokens(
    first, window, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, TABLE: tl.constexpr, BLOCK: tl.constexpr
):
    """Describe the tokens of a window from `first` on, in their order."""
    place = first + tl.arange(0, BLOCK)
    p0 = place // (WINDOW[1] * WINDOW[2])  # beyond the last axis for what is no token
    return _tokens(p0, place // WINDOW[2] % WINDOW[1], place % WINDOW[2], window, size, WINDOW, SHIFT, TABLE)


@triton.jit
def _box_of_tokens(
    b0, b1, b2, window, size, WINDOW: tl.constexpr, SHIFT: tl.constexpr, TABLE: tl.constexpr, BOX: tl.constexpr
):
    """Describe the tokens of one box of a window that is cut into boxes."""
    place = tl.arange(0, BOX[0] * BOX[1] * BOX[2])
    p0 = b0 * BOX[0] + place // (BOX[1] * BOX[2])
    p1 = b1 * BOX[1] + place // BOX[2] % BOX[1]
    return _tokens(p0, p1, b2 * BOX[2] + place % BOX[2], window, size, WINDOW, SHIFT, TABLE)


@triton.jit
def _block_of_program(heads, TOKENS: tl.constexpr, BLOCK: tl.constexpr):
    """Head, first token and window of a program of (windows, blocks of BLOCK tokens, heads)."""
    BLOCKS: tl.constexpr = (TOKENS + BLOCK - 1) // BLOCK
    program = tl.program_id(0)
    return program % heads, program // heads % BLOCKS * BLOCK, program // (heads * BLOCKS)


@triton.jit
def _maps_of(qkv, head, heads, DIM: tl.constexpr):
    """Addresses of the queries, keys and values of a head, or of their gradients."""
    return qkv + head * DIM, qkv + (heads + head) * DIM, qkv + (2 * heads + head) * DIM


@triton.jit
def _load(maps, rows, known, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Tokens of a map, zero where there is none."""
    dims = tl.arange(0, BLOCK_DIM)
    mask = known[:, None] & (dims < DIM)[None, :]
    return tl.load(maps + rows[:, None] * stride + dims[None, :], mask=mask, other=0.0)


@triton.jit
def _store(maps, tile, rows, known, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    dims = tl.arange(0, BLOCK_DIM)
    mask = known[:, None] & (dims < DIM)[None, :]
    tl.store(maps + rows[:, None] * stride + dims[None, :], tile.to(maps.dtype.element_ty), mask=mask)


@triton.jit
def _store_tile(tiles, tile, BLOCK: tl.constexpr):
    """Write the gradient of logits that a program has summed up."""
    place = tl.arange(0, BLOCK)
    tiles += tl.program_id(0).to(tl.int64) * (BLOCK * BLOCK)
    tl.store(tiles + place[:, None] * BLOCK + place[None, :], tile)


@triton.jit
def _lengths(tile):
    """Norms of tokens, 1 instead of 0."""
    tile = tile.to(tl.float32)
    norms = tl.sqrt(tl.sum(tile * tile, 1))
    return tl.where(norms < 1e-12, 1.0, norms)


@triton.jit
def _units(tile, norms):
    """Unit vectors of tokens, in their type."""
    return (tile.to(tl.float32) / norms[:, None]).to(tile.dtype)


@triton.jit
def _orthogonal(grad, tile, norms):
    """Gradient of vectors, given that of their directions: their length has no effect."""
    units = tile.to(tl.float32) / norms[:, None]
    return (grad - units * tl.sum(grad * units, 1)[:, None]) / norms[:, None]


@triton.jit
def _scale(logit_scale, head):
    return tl.exp(tl.minimum(tl.load(logit_scale + head).to(tl.float32), MAX_LOGIT_SCALE))


@triton.jit
def _table_of(bias_table, head, TABLE: tl.constexpr):
    """Address of the entry for a query and a key at the same place, in the table of a head."""
    s0, s1, s2 = 2 * TABLE[0] - 1, 2 * TABLE[1] - 1, 2 * TABLE[2] - 1
    return bias_table + head * (s0 * s1 * s2) + ((TABLE[0] - 1) * s1 + TABLE[1] - 1) * s2 + TABLE[2] - 1


@triton.jit
def _logits(
    a, b, factors_a, factors_b, table, entries, regions_a, regions_b, keys, SHIFT: tl.constexpr, PRECISION: tl.constexpr
):
    """Scaled cosines between queries and keys, in either order, and logits: with bias and mask; both times log2(e).

    `entries` of the table and `keys`, which tells whether it is a key, are of their shape.
    Tokens are divided by their norms after the product, which is exact for numbers of half precision: unit vectors of
    that type would be off by their last digit, times a scale of up to 100.
    """
    cosines = tl.dot(a, tl.trans(b), input_precision=PRECISION) * (factors_a * LOG2_E)[:, None] * factors_b[None, :]
    logits = cosines + tl.load(table + entries).to(tl.float32) * LOG2_E
    if SHIFT[0] + SHIFT[1] + SHIFT[2] > 0:
        logits += tl.where(regions_a[:, None] == regions_b[None, :], 0.0, CROSSING * LOG2_E)
    return cosines, tl.where(keys, logits, NEVER)


@triton.jit
def attend(
    qkv,
    logit_scale,
    bias_table,
    out,
    log_sums,
    size,
    heads,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of BLOCK queries, over STEP keys at a time. Programs: (windows, blocks of queries, heads)."""
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head, first, window = _block_of_program(heads, TOKENS, BLOCK)
    stride = 3 * heads * DIM
    q_map, k_map, v_map = _maps_of(qkv, head, heads, DIM)
    scale, table = _scale(logit_scale, head), _table_of(bias_table, head, TABLE)

    q_rows, q_known, q_regions, q_entries = _run_of_tokens(first, window, size, WINDOW, SHIFT, TABLE, BLOCK)
    q = _load(q_map, q_rows, q_known, stride, DIM, BLOCK_DIM)
    q_factors = scale / _lengths(q)
    largest = tl.full([BLOCK], NEVER, tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    result = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, TOKENS, STEP):
        k_rows, k_known, k_regions, k_entries = _run_of_tokens(start, window, size, WINDOW, SHIFT, TABLE, STEP)
        k = _load(k_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
        k_norms = _lengths(k)
        v = _load(v_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
        entries = q_entries[:, None] - k_entries[None, :]
        _, logits = _logits(
            q, k, q_factors, 1.0 / k_norms, table, entries, q_regions, k_regions, k_known[None, :], SHIFT, PRECISION
        )
        larger = tl.maximum(largest, tl.max(logits, 1))
        weights = tl.exp2(logits - larger[:, None])
        decay = tl.exp2(largest - larger)
        sums = sums * decay + tl.sum(weights, 1)
        result = result * decay[:, None] + tl.dot(weights.to(v.dtype), v, input_precision=PRECISION)
        largest = larger
    _store(out + head * DIM, result / sums[:, None], q_rows, q_known, heads * DIM, DIM, BLOCK_DIM)
    tl.store(log_sums + q_rows * heads + head, largest + tl.log2(sums), mask=q_known)


@triton.jit
def _load_sums(log_sums, rows, known, head, heads):
    """Logarithms of the sums of queries, so large where there is no query that its weights are zero."""
    return tl.load(log_sums + rows * heads + head, mask=known, other=-NEVER)


@triton.jit
def _load_common(given, out, rows, known, head, heads, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr):
    """Mean gradient of the weights of queries: what the softmax takes off each of them."""
    result = _load(out + head * DIM, rows, known, heads * DIM, DIM, BLOCK_DIM)
    return tl.sum(given.to(tl.float32) * result.to(tl.float32), 1)


@triton.jit
def grad_queries(
    grad_out,
    qkv,
    logit_scale,
    bias_table,
    out,
    log_sums,
    common_of,
    grad_qkv,
    grad_scale,
    size,
    heads,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of BLOCK queries, and what they add to that of `logit_scale`. Programs and loop as of `attend`.

    What is common to a query's gradients of weights is kept for the kernels that follow. It comes from the rounded
    result, whose error would add up in the gradient of the scale: there it is replaced by its sum over the keys.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head, first, window = _block_of_program(heads, TOKENS, BLOCK)
    stride = 3 * heads * DIM
    q_map, k_map, v_map = _maps_of(qkv, head, heads, DIM)
    scale, table = _scale(logit_scale, head), _table_of(bias_table, head, TABLE)

    q_rows, q_known, q_regions, q_entries = _run_of_tokens(first, window, size, WINDOW, SHIFT, TABLE, BLOCK)
    q = _load(q_map, q_rows, q_known, stride, DIM, BLOCK_DIM)
    q_norms = _lengths(q)
    given = _load(grad_out + head * DIM, q_rows, q_known, heads * DIM, DIM, BLOCK_DIM)
    common = _load_common(given, out, q_rows, q_known, head, heads, DIM, BLOCK_DIM)
    tl.store(common_of + q_rows * heads + head, common, mask=q_known)
    sums = _load_sums(log_sums, q_rows, q_known, head, heads)
    sum_of_grads = tl.zeros([BLOCK], tl.float32)
    along = tl.zeros([BLOCK], tl.float32)
    mean_cosine = tl.zeros([BLOCK], tl.float32)
    grad_q = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, TOKENS, STEP):
        k_rows, k_known, k_regions, k_entries = _run_of_tokens(start, window, size, WINDOW, SHIFT, TABLE, STEP)
        k = _load(k_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
        k_norms = _lengths(k)
        v = _load(v_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
        entries = q_entries[:, None] - k_entries[None, :]
        cosines, logits = _logits(
            q, k, scale / q_norms, 1.0 / k_norms, table, entries, q_regions, k_regions, k_known[None, :], SHIFT,
            PRECISION,
        )  # fmt: skip
        weights = tl.exp2(logits - sums[:, None])
        grad_logits = weights * (tl.dot(given, tl.trans(v), input_precision=PRECISION) - common[:, None])
        sum_of_grads += tl.sum(grad_logits, 1)
        along += tl.sum(grad_logits * cosines, 1)
        mean_cosine += tl.sum(weights * cosines, 1)
        grad_q += tl.dot(grad_logits.to(k.dtype), _units(k, k_norms), input_precision=PRECISION)
    grad_q = _orthogonal(grad_q * scale, q, q_norms)
    _store(grad_qkv + head * DIM, grad_q, q_rows, q_known, stride, DIM, BLOCK_DIM)
    tl.store(grad_scale + tl.program_id(0), tl.sum(along - sum_of_grads * mean_cosine, 0) / LOG2_E)


@triton.jit
def grad_keys(
    grad_out,
    qkv,
    logit_scale,
    bias_table,
    log_sums,
    common_of,
    grad_qkv,
    size,
    heads,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    STEP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of BLOCK keys and values, over STEP queries at a time. Programs: (windows, blocks of keys, heads).

    Its tiles of logits are (keys, queries): both products take them as they are.
    """
    TOKENS: tl.constexpr = WINDOW[0] * WINDOW[1] * WINDOW[2]
    head, first, window = _block_of_program(heads, TOKENS, BLOCK)
    stride = 3 * heads * DIM
    q_map, k_map, v_map = _maps_of(qkv, head, heads, DIM)
    scale, table = _scale(logit_scale, head), _table_of(bias_table, head, TABLE)

    k_rows, k_known, k_regions, k_entries = _run_of_tokens(first, window, size, WINDOW, SHIFT, TABLE, BLOCK)
    k = _load(k_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
    k_norms = _lengths(k)
    v = _load(v_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
    grad_k = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK, BLOCK_DIM], tl.float32)
    for start in range(0, TOKENS, STEP):
        q_rows, q_known, q_regions, q_entries = _run_of_tokens(start, window, size, WINDOW, SHIFT, TABLE, STEP)
        q = _load(q_map, q_rows, q_known, stride, DIM, BLOCK_DIM)
        q_norms = _lengths(q)
        given = _load(grad_out + head * DIM, q_rows, q_known, heads * DIM, DIM, BLOCK_DIM)
        common = tl.load(common_of + q_rows * heads + head, mask=q_known, other=0.0)
        sums = _load_sums(log_sums, q_rows, q_known, head, heads)
        entries = q_entries[None, :] - k_entries[:, None]
        _, logits = _logits(
            k, q, 1.0 / k_norms, scale / q_norms, table, entries, k_regions, q_regions, k_known[:, None], SHIFT,
            PRECISION,
        )  # fmt: skip
        weights = tl.exp2(logits - sums[None, :])
        grad_v += tl.dot(weights.to(given.dtype), given, input_precision=PRECISION)
        grad_logits = weights * (tl.dot(v, tl.trans(given), input_precision=PRECISION) - common[None, :])
        grad_k += tl.dot(grad_logits.to(q.dtype), _units(q, q_norms), input_precision=PRECISION)
    grad_k = _orthogonal(grad_k * scale, k, k_norms)
    _store(grad_qkv + (heads + head) * DIM, grad_k, k_rows, k_known, stride, DIM, BLOCK_DIM)
    _store(grad_qkv + (2 * heads + head) * DIM, grad_v, k_rows, k_known, stride, DIM, BLOCK_DIM)


@triton.jit
def grad_bias(
    grad_out,
    qkv,
    logit_scale,
    bias_table,
    log_sums,
    common_of,
    grad_tiles,
    size,
    heads,
    windows,
    splits,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BOX: tl.constexpr,
    BOXES: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the logits between boxes of a window, summed over pairs of boxes that lie equally far apart.

    Such pairs have the entries of the table in common, token by token, so one tile in registers takes the sum over all
    of them and over all windows. Programs: (parts of these, heads, displacements along each axis); each writes its
    tile.
    """
    program = tl.program_id(0)
    s1, s2 = 2 * BOXES[1] - 1, 2 * BOXES[2] - 1
    d0 = program // (s1 * s2) % (2 * BOXES[0] - 1) - (BOXES[0] - 1)
    d1 = program // s2 % s1 - (BOXES[1] - 1)
    d2 = program % s2 - (BOXES[2] - 1)
    head = program // ((2 * BOXES[0] - 1) * s1 * s2) % heads
    part = program // ((2 * BOXES[0] - 1) * s1 * s2) // heads
    # pairs of boxes that lie so far apart
    n0, n1, n2 = BOXES[0] - tl.abs(d0), BOXES[1] - tl.abs(d1), BOXES[2] - tl.abs(d2)
    stride = 3 * heads * DIM
    q_map, k_map, v_map = _maps_of(qkv, head, heads, DIM)
    scale, table = _scale(logit_scale, head), _table_of(bias_table, head, TABLE)

    BLOCK: tl.constexpr = BOX[0] * BOX[1] * BOX[2]
    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    for window in range(part, windows, splits):
        for pair in range(n0 * n1 * n2):
            b0, b1, b2 = pair // (n1 * n2), pair // n2 % n1, pair % n2
            q_rows, q_known, q_regions, q_entries = _box_of_tokens(
                b0 + tl.maximum(d0, 0), b1 + tl.maximum(d1, 0), b2 + tl.maximum(d2, 0),
                window, size, WINDOW, SHIFT, TABLE, BOX,
            )  # fmt: skip
            k_rows, k_known, k_regions, k_entries = _box_of_tokens(
                b0 - tl.minimum(d0, 0), b1 - tl.minimum(d1, 0), b2 - tl.minimum(d2, 0),
                window, size, WINDOW, SHIFT, TABLE, BOX,
            )  # fmt: skip
            q = _load(q_map, q_rows, q_known, stride, DIM, BLOCK_DIM)
            k = _load(k_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
            v = _load(v_map, k_rows, k_known, stride, DIM, BLOCK_DIM)
            given = _load(grad_out + head * DIM, q_rows, q_known, heads * DIM, DIM, BLOCK_DIM)
            common = tl.load(common_of + q_rows * heads + head, mask=q_known, other=0.0)
            sums = _load_sums(log_sums, q_rows, q_known, head, heads)
            entries = q_entries[:, None] - k_entries[None, :]
            _, logits = _logits(
                q, k, scale / _lengths(q), 1.0 / _lengths(k), table, entries, q_regions, k_regions, k_known[None, :],
                SHIFT, PRECISION,
            )  # fmt: skip
            weights = tl.exp2(logits - sums[:, None])
            total += weights * (tl.dot(given, tl.trans(v), input_precision=PRECISION) - common[:, None])
    _store_tile(grad_tiles, total, BLOCK)


@triton.jit
def grad_all(
    grad_out,
    qkv,
    logit_scale,
    bias_table,
    out,
    log_sums,
    grad_qkv,
    grad_scale,
    grad_tiles,
    size,
    heads,
    windows,
    splits,
    WINDOW: tl.constexpr,
    SHIFT: tl.constexpr,
    TABLE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients at once where a window fits into one tile. Programs: (parts of the windows, heads)."""
    program = tl.program_id(0)
    head, part = program % heads, program // heads
    stride = 3 * heads * DIM
    q_map, k_map, v_map = _maps_of(qkv, head, heads, DIM)
    scale, table = _scale(logit_scale, head), _table_of(bias_table, head, TABLE)

    total = tl.zeros([BLOCK, BLOCK], tl.float32)
    total_along = tl.zeros([BLOCK], tl.float32)
    for window in range(part, windows, splits):
        rows, known, regions, entries = _run_of_tokens(0, window, size, WINDOW, SHIFT, TABLE, BLOCK)
        q, k = _load(q_map, rows, known, stride, DIM, BLOCK_DIM), _load(k_map, rows, known, stride, DIM, BLOCK_DIM)
        q_norms, k_norms = _lengths(q), _lengths(k)
        v = _load(v_map, rows, known, stride, DIM, BLOCK_DIM)
        given = _load(grad_out + head * DIM, rows, known, heads * DIM, DIM, BLOCK_DIM)
        common = _load_common(given, out, rows, known, head, heads, DIM, BLOCK_DIM)
        sums = _load_sums(log_sums, rows, known, head, heads)
        offsets = entries[:, None] - entries[None, :]
        cosines, logits = _logits(
            q, k, scale / q_norms, 1.0 / k_norms, table, offsets, regions, regions, known[None, :], SHIFT, PRECISION
        )
        weights = tl.exp2(logits - sums[:, None])
        grad_v = tl.dot(tl.trans(weights.to(given.dtype)), given, input_precision=PRECISION)
        _store(grad_qkv + (2 * heads + head) * DIM, grad_v, rows, known, stride, DIM, BLOCK_DIM)
        grad_logits = weights * (tl.dot(given, tl.trans(v), input_precision=PRECISION) - common[:, None])
        total += grad_logits
        rounded = grad_logits.to(k.dtype)
        grad_q = tl.dot(rounded, _units(k, k_norms), input_precision=PRECISION) * scale
        grad_q = _orthogonal(grad_q, q, q_norms)
        _store(grad_qkv + head * DIM, grad_q, rows, known, stride, DIM, BLOCK_DIM)
        along = tl.sum(grad_logits * cosines, 1)
        total_along += along - tl.sum(grad_logits, 1) * tl.sum(weights * cosines, 1)  # as in `grad_queries`
        grad_k = tl.dot(tl.trans(rounded), _units(q, q_norms), input_precision=PRECISION) * scale
        grad_k = _orthogonal(grad_k, k, k_norms)
        _store(grad_qkv + (heads + head) * DIM, grad_k, rows, known, stride, DIM, BLOCK_DIM)
    tl.store(grad_scale + program, tl.sum(total_along, 0) / LOG2_E)
    _store_tile(grad_tiles, total, BLOCK)

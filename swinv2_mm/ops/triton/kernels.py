"""Triton kernels of window attention: the forward pass and all gradients.

The feature map stays in image order. `layout.py` numbers the tokens of a window by slots and gives the kernels tables:
`rows`, the index of a slot's token in the feature map (-1 for none), and `regions`, equal for tokens that lay together
before the roll (-1 for none). So no kernel computes with coordinates, and none depends on the number of axes.

Windows of up to 64 tokens fit into one tile (`window_forward`, `window_backward`): a program keeps the bias of a head
and goes over windows. Larger ones are taken in tiles of BLOCK_M queries and BLOCK_N keys as in FlashAttention-2, and
their N x N matrices are never written. There, two numbers per slot add up to the place of a query and a key in the
bias. The loops read unit vectors that `normalize` has made, in float16 for half-precision maps: unit vectors in
bfloat16 would be off in the third digit, times a scale of up to 100.

Logits are in units of log2(e), so that the softmax is exp2(logits - m_i): the factor is in the scale and in the bias
before they meet. Slots without a key have the logit -inf. EDGE is for windows at the edges of a rolled or padded
feature map, the only ones with a mask; the others are launched apart from them.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
MAX_LOGIT_SCALE = tl.constexpr(4.605170185988092)  # ln 100
SHIFT_MASK = tl.constexpr(-100.0 * 1.4426950408889634)
# Start of a running maximum. Finite, so that its difference to the logit -inf is -inf and not NaN.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def _clamped_exp(logit_scale):
    """Scale of logits; NaN stays NaN, which `tl.minimum` would replace."""
    logit_scale = logit_scale.to(tl.float32)
    return tl.exp(tl.where(logit_scale > MAX_LOGIT_SCALE, MAX_LOGIT_SCALE, logit_scale))


@triton.jit
def _scale(logit_scale, head):
    return _clamped_exp(tl.load(logit_scale + head))


@triton.jit
def _inverse_norm(tile):
    """1 / L2 norm of each row, 1 for a row of zeros."""
    squares = tl.sum(tile * tile, 1)
    return tl.rsqrt(tl.where(squares < 1e-24, 1.0, squares))


@triton.jit
def _project_out(grad, tile, inverse_norm):
    """Project gradients on what is orthogonal to the vectors; 1 / norm times it is the l2 norm's backward pass."""
    along = tl.sum(grad * tile, 1) * inverse_norm * inverse_norm
    return grad - tile * along[:, None]


@triton.jit
def _offsets(rows, stride, LARGE: tl.constexpr):
    """Where rows begin: in 64 bits if a sample has more numbers than 32 bits count."""
    return rows.to(tl.int64) * stride if LARGE else rows * stride


@triton.jit
def _load_rows(
    ptr, rows, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, LARGE: tl.constexpr, MASKED: tl.constexpr
):
    """Tokens of a feature map, (len(rows), BLOCK_DIM); zero where there is none."""
    dims = tl.arange(0, BLOCK_DIM)
    ptrs = ptr + _offsets(rows, stride, LARGE)[:, None] + dims[None, :]
    if MASKED and DIM < BLOCK_DIM:
        return tl.load(ptrs, mask=(rows >= 0)[:, None] & (dims < DIM)[None, :], other=0.0)
    if MASKED:
        return tl.load(ptrs, mask=(rows >= 0)[:, None], other=0.0)
    if DIM < BLOCK_DIM:
        return tl.load(ptrs, mask=(dims < DIM)[None, :], other=0.0)
    return tl.load(ptrs)


@triton.jit
def _load_norms(ptr, rows, stride, LARGE: tl.constexpr, MASKED: tl.constexpr):
    """Inverse norms of the tokens of a map; zero where there is none."""
    ptrs = ptr + _offsets(rows, stride, LARGE)
    return tl.load(ptrs, mask=rows >= 0, other=0.0) if MASKED else tl.load(ptrs)


@triton.jit
def _store_rows(
    ptr, tile, rows, stride, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr, LARGE: tl.constexpr,
    MASKED: tl.constexpr = True,
):  # fmt: skip
    dims = tl.arange(0, BLOCK_DIM)
    mask = (dims < DIM)[None, :]
    if MASKED:
        mask &= (rows >= 0)[:, None]
    tl.store(ptr + _offsets(rows, stride, LARGE)[:, None] + dims[None, :], tile.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _load_bias(bias, q_places, k_places, RUN: tl.constexpr):
    """Bias of a tile of logits (queries, keys). RUN keys that follow each other are a run of memory."""
    offs = q_places[:, None] + k_places[None, :]
    offs = tl.max_contiguous(tl.multiple_of(offs, (1, RUN)), (1, RUN))
    return tl.load(bias + offs).to(tl.float32)


@triton.jit
def _mask(logits, q_regions, k_regions):
    """Mask of a window at an edge, for (queries, keys) in any shape that broadcasts to that of the logits."""
    masked = tl.where(q_regions == k_regions, logits, logits + SHIFT_MASK)
    return tl.where(k_regions >= 0, masked, float('-inf'))


@triton.jit
def _logits(a, b, bias, a_regions, b_regions, KEYS: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """Logits of unit vectors, times log2(e): queries and keys, or keys and queries. Keys are along dimension KEYS."""
    logits = tl.dot(a, tl.trans(b), bias, input_precision=PRECISION)
    if EDGE and KEYS == 1:
        logits = _mask(logits, a_regions[:, None], b_regions[None, :])
    elif EDGE:
        logits = _mask(logits, b_regions[None, :], a_regions[:, None])
    return logits


@triton.jit
def _window_logits(q, k, q_factor, k_factor, bias, regions, EDGE: tl.constexpr, PRECISION: tl.constexpr):
    """Cosines times `q_factor`, and the logits of a whole window.

    Tokens are divided by their norms after the product, which is exact for numbers of half precision.
    """
    cosines = tl.dot(q, tl.trans(k), input_precision=PRECISION) * q_factor[:, None] * k_factor[None, :]
    logits = cosines + bias
    return cosines, _mask(logits, regions[:, None], regions[None, :]) if EDGE else logits


@triton.jit
def _divide(a, b):
    """Quotient and remainder of numbers that are not negative, for which that takes fewer instructions."""
    a, b = tl.cast(a, tl.uint32), tl.cast(b, tl.uint32)
    return (a // b).to(tl.int32), (a % b).to(tl.int32)


@triton.jit
def _block_of_program(heads, KEYS: tl.constexpr, BLOCK_M: tl.constexpr):
    """Head, block of BLOCK_M tokens and place of the window of a program of (windows, blocks, heads)."""
    BLOCKS: tl.constexpr = (KEYS + BLOCK_M - 1) // BLOCK_M
    program = tl.program_id(0)
    blocks, head = _divide(program, heads)
    return head, blocks % BLOCKS, blocks // BLOCKS


@triton.jit
def _window_of(place, window_ids, num_windows, tokens, heads):
    """Window of a program or of a turn of its loop, and where its sample begins, in tokens times heads.

    Counted over samples, and for each of them over the windows in `window_ids`.
    """
    index, number = _divide(place, num_windows)
    return tl.load(window_ids + number), index.to(tl.int64) * (tokens * heads)


@triton.jit
def _first_slot(place, window, head, num_windows, all_windows, heads, SLOTS: tl.constexpr):
    """Where the slots of a window and head begin in `lse` and `delta`."""
    index, _ = _divide(place, num_windows)
    return ((index * all_windows + window) * heads + head).to(tl.int64) * SLOTS


@triton.jit
def expand_bias(
    bias_table, entries, bias, heads, places, stride_head, stride_entry, CENTER: tl.constexpr, BLOCK_M: tl.constexpr
):
    """Write `bias` (heads, places): entries of the table less CENTER, -inf where the entry is -1.

    Programs: (blocks of places, heads). A constant takes nothing from a softmax; with it, numbers of both signs use the
    precision of half a type.
    """
    program = tl.program_id(0)
    head = program % heads
    offs = program // heads * BLOCK_M + tl.arange(0, BLOCK_M)
    entry = tl.load(entries + offs, mask=offs < places, other=-1)
    ptrs = bias_table + head * stride_head + entry * stride_entry
    values = (tl.load(ptrs, mask=entry >= 0, other=0.0).to(tl.float32) - CENTER) * LOG2_E
    if bias.dtype.element_ty == tl.float16:
        values = tl.where(values > 65504.0, 65504.0, tl.where(values < -65504.0, -65504.0, values))
    values = tl.where(entry >= 0, values, float('-inf'))
    tl.store(bias + head.to(tl.int64) * places + offs, values.to(bias.dtype.element_ty), mask=offs < places)


@triton.jit
def normalize(
    qkv,
    logit_scale,
    units,
    rounded_units,
    inverse_norms,
    vectors,
    heads,
    PARTS: tl.constexpr,
    ROUNDED: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Write `units` (tokens, PARTS, heads, DIM): unit vectors of scaled queries and of keys, or of keys only.

    ROUNDED: they are also written to `rounded_units`, in the type of the feature map. With queries, `inverse_norms`
    (tokens, PARTS, heads) are written for the gradients. Programs: blocks of `vectors` = tokens * PARTS * heads.
    """
    first = tl.program_id(0).to(tl.int64) * BLOCK_M
    place = (first % (PARTS * heads)).to(tl.int32) + tl.arange(0, BLOCK_M)  # of the first one's token and on
    token, place = first // (PARTS * heads) + place // (PARTS * heads), place % (PARTS * heads)
    dims = tl.arange(0, BLOCK_DIM)
    mask = (first + tl.arange(0, BLOCK_M) < vectors)[:, None] & (dims < DIM)[None, :]
    ptrs = qkv + ((token * 3 + (2 - PARTS)) * heads + place)[:, None] * DIM + dims[None, :]
    tile = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
    factor = _inverse_norm(tile)
    if PARTS == 2:
        offs = first + tl.arange(0, BLOCK_M)
        tl.store(inverse_norms + offs, factor, mask=offs < vectors)
        scale = _clamped_exp(tl.load(logit_scale + place, mask=place < heads, other=0.0))
        factor *= tl.where(place < heads, scale * LOG2_E, 1.0)
    tile *= factor[:, None]
    offs = (token * (PARTS * heads) + place)[:, None] * DIM + dims[None, :]
    tl.store(units + offs, tile.to(units.dtype.element_ty), mask=mask)
    if ROUNDED:
        tl.store(rounded_units + offs, tile.to(rounded_units.dtype.element_ty), mask=mask)


@triton.jit
def forward(
    qkv,
    units,
    logit_scale,
    bias,
    rows,
    regions,
    q_places,
    k_places,
    window_ids,
    out,
    lse,
    num_windows,
    all_windows,
    tokens,
    heads,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention of BLOCK_M queries. Programs: (windows, blocks of queries, heads)."""
    MASKED: tl.constexpr = EDGE or not WHOLE
    head, block, place = _block_of_program(heads, KEYS, BLOCK_M)
    window, sample = _window_of(place, window_ids, num_windows, tokens, heads)
    first_slot = _first_slot(place, window, head, num_windows, all_windows, heads, SLOTS)
    stride = 3 * heads * DIM
    rows += window * SLOTS
    regions += window * SLOTS
    q_ptr, v_ptr = qkv + (3 * sample + head) * DIM, qkv + (3 * sample + 2 * heads + head) * DIM
    k_ptr = units + (sample + head) * DIM
    bias += head.to(tl.int64) * PLACES

    q_slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = tl.load(rows + q_slots)
    q = _load_rows(q_ptr, q_rows, stride, DIM, BLOCK_DIM, LARGE, True).to(tl.float32)
    q = (q * (_inverse_norm(q) * (_scale(logit_scale, head) * LOG2_E))[:, None]).to(units.dtype.element_ty)
    q_place = tl.load(q_places + q_slots)
    q_region = tl.load(regions + q_slots) if EDGE else q_rows
    m_i = tl.full([BLOCK_M], LOWEST, tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        k_slots = start + tl.arange(0, BLOCK_N)
        k_rows = tl.load(rows + k_slots)
        k = _load_rows(k_ptr, k_rows, heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        v = _load_rows(v_ptr, k_rows, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        tile_bias = _load_bias(bias, q_place, tl.load(k_places + k_slots), RUN)
        k_region = tl.load(regions + k_slots) if EDGE else k_rows
        logits = _logits(q, k, tile_bias, q_region, k_region, 1, EDGE, PRECISION)
        m_new = tl.maximum(m_i, tl.max(logits, 1))
        p = tl.exp2(logits - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        l_i = l_i * alpha + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * alpha[:, None], input_precision=PRECISION)
        m_i = m_new
    _store_rows(out + (sample + head) * DIM, acc * (1.0 / l_i)[:, None], q_rows, heads * DIM, DIM, BLOCK_DIM, LARGE)
    # what is no query has no weights in the backward pass
    tl.store(lse + first_slot + q_slots, tl.where(q_rows >= 0, m_i + tl.log2(l_i), float('inf')))


@triton.jit
def bwd_dq(
    grad_out,
    qkv,
    units,
    rounded_units,
    inverse_norms,
    logit_scale,
    bias,
    rows,
    regions,
    q_places,
    k_places,
    window_ids,
    out,
    lse,
    delta,
    grad_qkv,
    grad_scale,
    num_windows,
    all_windows,
    tokens,
    heads,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    ROUNDED: tl.constexpr,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of BLOCK_M queries, what they add to that of `logit_scale`, and `delta` for the kernels that follow.

    delta is the row sum of grad_out * out. `out` is rounded, and the error of delta would add up in the gradient of the
    scale. The loop corrects it: the gradients of a query's logits must have the sum zero.
    Programs and loop as in `forward`.
    """
    MASKED: tl.constexpr = EDGE or not WHOLE
    PARTIAL: tl.constexpr = MASKED or KEYS % BLOCK_M > 0  # a block with what is no token
    head, block, place = _block_of_program(heads, KEYS, BLOCK_M)
    window, sample = _window_of(place, window_ids, num_windows, tokens, heads)
    first_slot = _first_slot(place, window, head, num_windows, all_windows, heads, SLOTS)
    stride = 3 * heads * DIM
    rows += window * SLOTS
    regions += window * SLOTS
    v_ptr = qkv + (3 * sample + 2 * heads + head) * DIM
    k_ptr = units + (2 * sample + heads + head) * DIM
    rounded_ptr = rounded_units + (2 * sample + heads + head) * DIM
    bias += head.to(tl.int64) * PLACES
    scale = _scale(logit_scale, head)

    q_slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    q_rows = tl.load(rows + q_slots)
    q_ptr = units + (2 * sample + head) * DIM
    q = _load_rows(q_ptr, q_rows, 2 * heads * DIM, DIM, BLOCK_DIM, LARGE, PARTIAL)
    do = _load_rows(grad_out + (sample + head) * DIM, q_rows, heads * DIM, DIM, BLOCK_DIM, LARGE, PARTIAL)
    o = _load_rows(out + (sample + head) * DIM, q_rows, heads * DIM, DIM, BLOCK_DIM, LARGE, PARTIAL)
    lse_i = tl.load(lse + first_slot + q_slots)
    delta_i = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    q_place = tl.load(q_places + q_slots)
    q_region = tl.load(regions + q_slots) if EDGE else q_rows
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    mean_k = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    grad_q = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        k_slots = start + tl.arange(0, BLOCK_N)
        k_rows = tl.load(rows + k_slots)
        k = _load_rows(k_ptr, k_rows, 2 * heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        v = _load_rows(v_ptr, k_rows, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        tile_bias = _load_bias(bias, q_place, tl.load(k_places + k_slots), RUN)
        k_region = tl.load(regions + k_slots) if EDGE else k_rows
        logits = _logits(q, k, tile_bias, q_region, k_region, 1, EDGE, PRECISION)
        p = tl.exp2(logits - lse_i[:, None])
        mean_k = tl.dot(p.to(k.dtype), k, mean_k, input_precision=PRECISION)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta_i[:, None])
        row_sum += tl.sum(ds, 1)
        if ROUNDED:  # float16 might not hold the gradients of logits, which bfloat16 holds
            k = _load_rows(rounded_ptr, k_rows, 2 * heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        grad_q = tl.dot(ds.to(k.dtype), k, grad_q, input_precision=PRECISION)
    tl.store(delta + first_slot + q_slots, delta_i + row_sum)
    grad_q -= row_sum[:, None] * mean_k
    q = q.to(tl.float32)  # times scale * log2(e), which is its norm; a tiny one is rounded to zero with its vector
    inverse_scale = 1.0 / tl.maximum(scale * LOG2_E, 1e-8)
    tl.store(grad_scale + tl.program_id(0), tl.sum(tl.sum(grad_q * q, 1), 0) * (1 / LOG2_E))
    norm_ptr = inverse_norms + 2 * sample + head
    inverse_norm = _load_norms(norm_ptr, q_rows, 2 * heads, LARGE, PARTIAL)
    grad_q = _project_out(grad_q, q, inverse_scale) * (inverse_norm * scale)[:, None]
    _store_rows(grad_qkv + (3 * sample + head) * DIM, grad_q, q_rows, stride, DIM, BLOCK_DIM, LARGE, PARTIAL)


@triton.jit
def bwd_dk_dv(
    grad_out,
    qkv,
    units,
    rounded_units,
    inverse_norms,
    bias,
    rows,
    regions,
    q_places,
    k_places,
    window_ids,
    lse,
    delta,
    grad_qkv,
    num_windows,
    all_windows,
    tokens,
    heads,
    SLOTS: tl.constexpr,
    KEYS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    ROUNDED: tl.constexpr,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradients of BLOCK_M keys and values, over BLOCK_N queries at a time. Programs: (windows, blocks of keys, heads).

    Its tiles of logits are (keys, queries): both products take them as they are.
    """
    MASKED: tl.constexpr = EDGE or not WHOLE
    PARTIAL: tl.constexpr = MASKED or KEYS % BLOCK_M > 0  # a block with what is no token
    head, block, place = _block_of_program(heads, KEYS, BLOCK_M)
    window, sample = _window_of(place, window_ids, num_windows, tokens, heads)
    first_slot = _first_slot(place, window, head, num_windows, all_windows, heads, SLOTS)
    stride, unit_stride = 3 * heads * DIM, 2 * heads * DIM
    rows += window * SLOTS
    regions += window * SLOTS
    q_ptr = units + (2 * sample + head) * DIM
    k_ptr, v_ptr = q_ptr + heads * DIM, qkv + (3 * sample + 2 * heads + head) * DIM
    rounded_ptr = rounded_units + (2 * sample + head) * DIM
    do_ptr = grad_out + (sample + head) * DIM
    bias += head.to(tl.int64) * PLACES

    k_slots = block * BLOCK_M + tl.arange(0, BLOCK_M)
    k_rows = tl.load(rows + k_slots)
    k = _load_rows(k_ptr, k_rows, unit_stride, DIM, BLOCK_DIM, LARGE, PARTIAL)
    v = _load_rows(v_ptr, k_rows, stride, DIM, BLOCK_DIM, LARGE, PARTIAL)
    k_place = tl.load(k_places + k_slots)
    k_region = tl.load(regions + k_slots) if EDGE else k_rows
    grad_k = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    grad_v = tl.zeros([BLOCK_M, BLOCK_DIM], tl.float32)
    for start in range(0, KEYS, BLOCK_N):
        q_slots = start + tl.arange(0, BLOCK_N)
        q_rows = tl.load(rows + q_slots)
        q = _load_rows(q_ptr, q_rows, unit_stride, DIM, BLOCK_DIM, LARGE, MASKED)
        do = _load_rows(do_ptr, q_rows, heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        lse_i, delta_i = tl.load(lse + first_slot + q_slots), tl.load(delta + first_slot + q_slots)
        tile_bias = tl.trans(_load_bias(bias, tl.load(q_places + q_slots), k_place, RUN))
        q_region = tl.load(regions + q_slots) if EDGE else q_rows
        logits = _logits(k, q, tile_bias, k_region, q_region, 0, EDGE, PRECISION)
        p = tl.exp2(logits - lse_i[None, :])
        grad_v = tl.dot(p.to(do.dtype), do, grad_v, input_precision=PRECISION)
        ds = p * (tl.dot(v, tl.trans(do), input_precision=PRECISION) - delta_i[None, :])
        if ROUNDED:  # float16 might not hold the gradients of logits, which bfloat16 holds
            q = _load_rows(rounded_ptr, q_rows, unit_stride, DIM, BLOCK_DIM, LARGE, MASKED)
        grad_k = tl.dot(ds.to(q.dtype), q, grad_k, input_precision=PRECISION)
    grad_ptr = grad_qkv + (3 * sample + heads + head) * DIM
    _store_rows(grad_ptr + heads * DIM, grad_v, k_rows, stride, DIM, BLOCK_DIM, LARGE, PARTIAL)
    k_rows = tl.load(rows + k_slots)  # again, and the unit vectors: kept, they would take registers from the loop
    k = _load_rows(k_ptr, k_rows, unit_stride, DIM, BLOCK_DIM, LARGE, PARTIAL).to(tl.float32)
    norm_ptr = inverse_norms + 2 * sample + heads + head
    inverse_norm = _load_norms(norm_ptr, k_rows, 2 * heads, LARGE, PARTIAL)
    grad_k = _project_out(grad_k, k, 1.0) * (inverse_norm * (1 / LOG2_E))[:, None]
    _store_rows(grad_ptr, grad_k, k_rows, stride, DIM, BLOCK_DIM, LARGE, PARTIAL)


@triton.jit
def bwd_dbias(
    grad_out,
    qkv,
    units,
    bias,
    rows,
    regions,
    q_places,
    k_places,
    window_ids,
    pairs,
    first_pairs,
    lse,
    delta,
    grad_tiles,
    num_windows,
    all_windows,
    tokens,
    heads,
    windows,
    splits,
    first_tile,
    all_tiles,
    SLOTS: tl.constexpr,
    PLACES: tl.constexpr,
    RUN: tl.constexpr,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Gradient of the logits between boxes of BLOCK_M slots, summed over pairs of boxes that lie equally far apart.

    Such pairs have their entries of the bias in common, so one tile in registers takes the sum over all of them and
    over all windows. `pairs` (pairs, 2) are the first slots of a box of queries and one of keys; those of a
    displacement begin at `first_pairs`. Programs: (displacements, heads, parts of the windows); each writes its tile.
    """
    MASKED: tl.constexpr = EDGE or not WHOLE
    program = tl.program_id(0)
    part, head, displacement = program % splits, program // splits % heads, program // splits // heads
    first, last = tl.load(first_pairs + displacement), tl.load(first_pairs + displacement + 1) - 1
    stride, unit_stride = 3 * heads * DIM, 2 * heads * DIM
    bias += head.to(tl.int64) * PLACES

    offs = tl.arange(0, BLOCK_M)
    total = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    q_place = tl.load(q_places + tl.load(pairs + 2 * first) + offs)
    k_place = tl.load(k_places + tl.load(pairs + 2 * first + 1) + offs)
    tile_bias = _load_bias(bias, q_place, k_place, RUN)
    place, pair = part, first
    for _ in range(((windows - part + splits - 1) // splits) * (last - first + 1)):
        window, sample = _window_of(place, window_ids, num_windows, tokens, heads)
        first_slot = _first_slot(place, window, head, num_windows, all_windows, heads, SLOTS)
        q_slots, k_slots = tl.load(pairs + 2 * pair) + offs, tl.load(pairs + 2 * pair + 1) + offs
        place = tl.where(pair == last, place + splits, place)
        pair = tl.where(pair == last, first, pair + 1)
        q_rows, k_rows = tl.load(rows + (window * SLOTS + q_slots)), tl.load(rows + (window * SLOTS + k_slots))
        q_ptr = units + (2 * sample + head) * DIM
        q = _load_rows(q_ptr, q_rows, unit_stride, DIM, BLOCK_DIM, LARGE, MASKED)
        k = _load_rows(q_ptr + heads * DIM, k_rows, unit_stride, DIM, BLOCK_DIM, LARGE, MASKED)
        v_ptr = qkv + (3 * sample + 2 * heads + head) * DIM
        v = _load_rows(v_ptr, k_rows, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        do_ptr = grad_out + (sample + head) * DIM
        do = _load_rows(do_ptr, q_rows, heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        lse_i, delta_i = tl.load(lse + first_slot + q_slots), tl.load(delta + first_slot + q_slots)
        if not WHOLE:  # boxes at the end of a window hold places that are no tokens
            tile_bias = _load_bias(bias, tl.load(q_places + q_slots), tl.load(k_places + k_slots), RUN)
        q_region = tl.load(regions + window * SLOTS + q_slots) if EDGE else q_rows
        k_region = tl.load(regions + window * SLOTS + k_slots) if EDGE else k_rows
        logits = _logits(q, k, tile_bias, q_region, k_region, 1, EDGE, PRECISION)
        p = tl.exp2(logits - lse_i[:, None])
        total += p * (tl.dot(do, tl.trans(v), input_precision=PRECISION) - delta_i[:, None])
    _store_tile(grad_tiles, total, (displacement * heads + head) * all_tiles + first_tile + part, BLOCK_M)


@triton.jit
def _store_tile(grad_tiles, tile, number, BLOCK: tl.constexpr):
    """Write the sum of a program."""
    offs = tl.arange(0, BLOCK)
    grad_tiles += number.to(tl.int64) * (BLOCK * BLOCK)
    tl.store(grad_tiles + offs[:, None] * BLOCK + offs[None, :], tile)


@triton.jit
def fold_bias(
    grad_tiles, members, grad_table, heads, splits, entries, TILE: tl.constexpr, MEMBERS: tl.constexpr,
    BLOCK_M: tl.constexpr,
):  # fmt: skip
    """Sum gradients of logits (tiles, heads, splits, TILE) onto the bias table (heads, entries).

    `members` (entries, MEMBERS) are the numbers over (tiles, TILE) that an entry belongs to, -1 for none. Programs:
    (blocks of entries, heads). Without atomic additions: the order of the sum is always the same.
    """
    program = tl.program_id(0)
    head = program % heads
    offs = program // heads * BLOCK_M + tl.arange(0, BLOCK_M)
    ptrs = members + offs[:, None] * MEMBERS + tl.arange(0, MEMBERS)[None, :]
    member = tl.load(ptrs, mask=(offs < entries)[:, None], other=-1)
    mask = member >= 0
    first = ((member // TILE) * heads + head).to(tl.int64) * splits
    ptrs = grad_tiles + first * TILE + member % TILE
    total = tl.zeros([BLOCK_M, MEMBERS], tl.float32)
    for split in range(splits):
        total += tl.load(ptrs + split * TILE, mask=mask, other=0.0)
    tl.store(grad_table + head * entries + offs, tl.sum(total, 1), mask=offs < entries)


@triton.jit
def window_forward(
    qkv,
    logit_scale,
    bias,
    rows,
    regions,
    window_ids,
    out,
    num_windows,
    tokens,
    heads,
    windows,
    splits,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Attention in windows of one tile. Programs: (parts of the windows, heads)."""
    MASKED: tl.constexpr = EDGE or not WHOLE
    program = tl.program_id(0)
    head, part = program % heads, program // heads
    stride = 3 * heads * DIM
    offs = tl.arange(0, BLOCK_M)
    tile_bias = tl.load(bias + (head * BLOCK_M + offs)[:, None] * BLOCK_M + offs[None, :])
    scale = _scale(logit_scale, head) * LOG2_E
    for turn in range(part, windows, splits):
        window, sample = _window_of(turn, window_ids, num_windows, tokens, heads)
        slots = window * BLOCK_M + offs
        row = tl.load(rows + slots)
        q_ptr = qkv + (3 * sample + head) * DIM
        q = _load_rows(q_ptr, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        k = _load_rows(q_ptr + heads * DIM, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        v = _load_rows(q_ptr + 2 * heads * DIM, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        q_factor, k_factor = _inverse_norm(q.to(tl.float32)) * scale, _inverse_norm(k.to(tl.float32))
        region = tl.load(regions + slots) if EDGE else row
        _, logits = _window_logits(q, k, q_factor, k_factor, tile_bias, region, EDGE, PRECISION)
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        l_i = tl.sum(p, 1)
        result = tl.dot(p.to(v.dtype), v, input_precision=PRECISION) * (1.0 / l_i)[:, None]
        _store_rows(out + (sample + head) * DIM, result, row, heads * DIM, DIM, BLOCK_DIM, LARGE)


@triton.jit
def window_backward(
    grad_out,
    qkv,
    logit_scale,
    bias,
    rows,
    regions,
    window_ids,
    grad_qkv,
    grad_scale,
    grad_tiles,
    num_windows,
    tokens,
    heads,
    windows,
    splits,
    first_tile,
    all_tiles,
    WHOLE: tl.constexpr,
    EDGE: tl.constexpr,
    DIM: tl.constexpr,
    BLOCK_DIM: tl.constexpr,
    LARGE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """All gradients of windows of one tile. Programs: (parts of the windows, heads)."""
    MASKED: tl.constexpr = EDGE or not WHOLE
    program = tl.program_id(0)
    head, part = program % heads, program // heads
    stride = 3 * heads * DIM
    offs = tl.arange(0, BLOCK_M)
    bias += (head * BLOCK_M + offs)[:, None] * BLOCK_M + offs[None, :]
    scale = _scale(logit_scale, head)
    total = tl.zeros([BLOCK_M, BLOCK_M], tl.float32)
    total_scale = tl.zeros([BLOCK_M], tl.float32)
    for turn in range(part, windows, splits):
        window, sample = _window_of(turn, window_ids, num_windows, tokens, heads)
        slots = window * BLOCK_M + offs
        row = tl.load(rows + slots)
        q_ptr = qkv + (3 * sample + head) * DIM
        q = _load_rows(q_ptr, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        k = _load_rows(q_ptr + heads * DIM, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        v = _load_rows(q_ptr + 2 * heads * DIM, row, stride, DIM, BLOCK_DIM, LARGE, MASKED)
        do = _load_rows(grad_out + (sample + head) * DIM, row, heads * DIM, DIM, BLOCK_DIM, LARGE, MASKED)
        q_norm, k_norm = _inverse_norm(q.to(tl.float32)), _inverse_norm(k.to(tl.float32))
        region = tl.load(regions + slots) if EDGE else row
        q_factor = q_norm * (scale * LOG2_E)
        cosines, logits = _window_logits(q, k, q_factor, k_norm, tl.load(bias), region, EDGE, PRECISION)
        p = tl.exp2(logits - tl.max(logits, 1)[:, None])
        p *= (1.0 / tl.sum(p, 1))[:, None]
        grad_v = tl.dot(tl.trans(p.to(do.dtype)), do, input_precision=PRECISION)
        grad_ptr = grad_qkv + (3 * sample + head) * DIM
        _store_rows(grad_ptr + 2 * heads * DIM, grad_v, row, stride, DIM, BLOCK_DIM, LARGE)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - tl.sum(p * dp, 1)[:, None])
        if MASKED:  # of what is no query
            ds = tl.where((row >= 0)[:, None], ds, 0.0)
        total += ds
        total_scale += tl.sum(ds * cosines, 1)
        rounded = ds.to(k.dtype)
        k_unit = (k.to(tl.float32) * k_norm[:, None]).to(k.dtype)
        grad_q = tl.dot(rounded, k_unit, input_precision=PRECISION) * scale
        grad_q = _project_out(grad_q, q.to(tl.float32), q_norm) * q_norm[:, None]
        _store_rows(grad_ptr, grad_q, row, stride, DIM, BLOCK_DIM, LARGE)
        q_unit = (q.to(tl.float32) * q_norm[:, None]).to(q.dtype)
        grad_k = tl.dot(tl.trans(rounded), q_unit, input_precision=PRECISION) * scale
        grad_k = _project_out(grad_k, k.to(tl.float32), k_norm) * k_norm[:, None]
        _store_rows(grad_ptr + heads * DIM, grad_k, row, stride, DIM, BLOCK_DIM, LARGE)
    tl.store(grad_scale + program, tl.sum(total_scale, 0) * (1 / LOG2_E))
    _store_tile(grad_tiles, total, head * all_tiles + first_tile + part, BLOCK_M)

"""The two passes over a row of logits: its statistics, online, and the gradient.

The second reads the row again, the last tile first because that one is most likely still in a cache.
"""

from vgpo_kernels._triton import tanh, tl, triton
from vgpo_kernels.vocabulary.triton.row_helpers import (
    bounded,
    edges,
    finite,
    first_vector,
    load_words,
    scores,
    tile_columns,
    tile_vectors,
    unpacked,
)


@triton.jit
def _take(b_max, b_sum, b_dot, b_u, m_r, scale2, ENTROPY: tl.constexpr):
    """Takes scores [R, N] of lanes m_r into maximum, sum of e = exp2((u - maximum) * scale2) and sum of e * log2(e)."""
    b_new = tl.maximum(b_max, tl.where(m_r, tl.max(b_u, axis=1), -float("inf")))
    b_base = finite(b_new)
    b_shift = (b_max - b_base) * scale2
    b_decay = tl.exp2(b_shift)
    b_log2 = (b_u - b_base[:, None]) * scale2
    b_e = tl.exp2(b_log2)
    if ENTROPY:
        b_taken = tl.where(m_r, tl.sum(b_e * bounded(b_log2), axis=1), 0.0)
        b_dot = b_decay * (b_dot + b_sum * bounded(b_shift)) + b_taken
    return b_new, b_decay * b_sum + tl.where(m_r, tl.sum(b_e, axis=1), 0.0), b_dot


@triton.jit
def _log_of_sum(units, rest):
    """log(units + rest), to the last digits where that is 1 and a little."""
    # As 2 artanh(rest / (2 + rest)), whose series ends here in fp32 for rest <= 0.25.
    s = rest / (2.0 + rest)
    square = s * s
    series = 1.0 + square * (0.33333333 + square * (0.2 + square * (0.14285714 + square * 0.11111111)))
    return tl.where((units == 1.0) & (rest <= 0.25), 2.0 * s * series, tl.log(units + rest))


@triton.jit
def row_statistics(
    p_row,
    head,
    n_vectors,
    vocabulary,
    target_score,
    scale2,
    inverse_cap,
    SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Pass 1: maximum of the row, sum of e, its logarithm, and sum of e * log2(e)."""
    b_max = tl.full([R], -float("inf"), tl.float32)
    b_sum = tl.zeros([R], tl.float32)
    b_dot = tl.zeros([R], tl.float32)
    o_e, m_e = edges(head, n_vectors, vocabulary, R, VEC)
    b_edge = scores(tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32), inverse_cap, SOFTCAP)
    b_max, b_sum, b_dot = _take(b_max, b_sum, b_dot, b_edge[:, None], m_e, scale2, ENTROPY)

    p_vectors = first_vector(p_row, head, VEC, True)
    b_words = load_words(p_vectors, 0, n_vectors, "", R)
    for tile in range(0, tl.cdiv(n_vectors, R)):
        # Asked for a tile ahead: bytes are always under way.
        b_next = load_words(p_vectors, tile + 1, n_vectors, "", R)
        m_r = tile_vectors(tile, n_vectors, R)
        b_u = scores(unpacked(b_words, p_row.dtype.element_ty, R, VEC), inverse_cap, SOFTCAP)
        b_max, b_sum, b_dot = _take(b_max, b_sum, b_dot, b_u, m_r, scale2, ENTROPY)
        b_words = b_next

    # The target's score takes part: so every thread has it before any thread writes in place.
    row_max = tl.max(tl.maximum(b_max, target_score), axis=0)
    b_shift = (b_max - finite(row_max)) * scale2
    b_decay = tl.exp2(b_shift)
    row_dot = tl.sum(b_decay * (b_dot + b_sum * bounded(b_shift)), axis=0) if ENTROPY else 0.0
    # The maxima, each 1, are counted apart from the rest, whose last digits they would take.
    b_unit = tl.where(b_max == row_max, 1.0, 0.0)
    units = tl.sum(b_unit, axis=0)
    rest = tl.sum(b_decay * b_sum - b_unit, axis=0)
    return row_max, units + rest, _log_of_sum(units, rest), row_dot


@triton.jit
def _gradient(b_u, u_scale, center, scale2, factor, entropy_factor, inverse_cap, SOFTCAP: tl.constexpr):
    """e * (factor + entropy_factor * log2(e)) by fp32 logits, and du/dx; e = exp2((u * u_scale - center) * scale2)."""
    if SOFTCAP:
        b_u = tanh(b_u * inverse_cap)
    b_log2 = (b_u * u_scale - center) * scale2
    b_dx = tl.exp2(b_log2)
    if entropy_factor is None:
        b_dx *= factor
    else:
        b_dx *= factor + entropy_factor * bounded(b_log2)
    b_slope = 1.0
    if SOFTCAP:
        b_slope = 1.0 - b_u * b_u
        b_dx *= b_slope
    return b_dx, b_slope


@triton.jit
def write_gradient(
    p_row,
    p_out,
    head,
    n_vectors,
    vocabulary,
    target,
    u_scale,
    center,
    scale2,
    factor,
    entropy_factor,
    at_target,
    inverse_cap,
    SOFTCAP: tl.constexpr,
    OUT_ALIGNED: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    """Pass 2. An element is read once more, and then written."""
    OUT: tl.constexpr = p_out.dtype.element_ty
    o_e, m_e = edges(head, n_vectors, vocabulary, R, VEC)
    b_edge = tl.load(p_row + o_e, mask=m_e, other=0.0).to(tl.float32)
    b_edge, b_edge_slope = _gradient(b_edge, u_scale, center, scale2, factor, entropy_factor, inverse_cap, SOFTCAP)
    b_edge += tl.where(o_e == target, at_target * b_edge_slope, 0.0)
    tl.store(p_out + o_e, b_edge.to(OUT), mask=m_e)

    n_tiles = tl.cdiv(n_vectors, R)
    p_vectors = first_vector(p_row, head, VEC, True)
    p_out_vectors = first_vector(p_out, head, VEC, OUT_ALIGNED)
    b_words = load_words(p_vectors, n_tiles - 1, n_vectors, "evict_first", R)
    for index in range(0, n_tiles):
        tile = n_tiles - 1 - index
        b_next = load_words(p_vectors, tile - 1, n_vectors, "evict_first", R)
        b_x = unpacked(b_words, p_row.dtype.element_ty, R, VEC)
        b_dx, b_slope = _gradient(b_x, u_scale, center, scale2, factor, entropy_factor, inverse_cap, SOFTCAP)
        o_v = tile_columns(tile, R, VEC)  # [R, VEC]
        # One tile of the row has the target; no other looks for it.
        if (target - head) // (R * VEC) == tile:
            b_dx += tl.where(o_v == target - head, at_target * b_slope, 0.0)
        m_r = tile_vectors(tile, n_vectors, R)
        tl.store(p_out_vectors + o_v, b_dx.to(OUT), mask=m_r[:, None], eviction_policy="evict_first")
        b_words = b_next


@triton.jit
def write_zeros(p_out, head, vocabulary, OUT_ALIGNED: tl.constexpr, R: tl.constexpr, VEC: tl.constexpr):
    OUT: tl.constexpr = p_out.dtype.element_ty
    n_vectors = (vocabulary - head) // VEC
    o_v, m_v = edges(head, n_vectors, vocabulary, R, VEC)
    tl.store(p_out + o_v, tl.zeros([R], OUT), mask=m_v)
    p_vectors = first_vector(p_out, head, VEC, OUT_ALIGNED)
    for tile in range(0, tl.cdiv(n_vectors, R)):
        m_r = tile_vectors(tile, n_vectors, R)
        tl.store(p_vectors + tile_columns(tile, R, VEC), tl.zeros([R, VEC], OUT), mask=m_r[:, None])

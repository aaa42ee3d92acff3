"""The divergence of two rows of logits over the whole vocabulary, in one pass over both: a program owns a row."""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels._tuning import Tiles
from vgpo_kernels.vocabulary.triton.row_helpers import (
    VECTOR,
    bounded,
    edges,
    finite,
    first_vector,
    row_threads,
    row_tiles,
    scores,
    softcap_scales,
    tile_columns,
    tile_vectors,
    vectors_match,
    whole_vectors,
)

RUN_TIME = ("vocabulary", "p_stride", "q_stride")


@triton.jit
def _log2_of_q(b_u, b_base, scale2):
    """log2 of q's e, finite: where q is 0 it is as good as any, since the result is 0 or infinite there."""
    b_log2 = tl.maximum((b_u - b_base) * scale2, -1e38)
    return tl.where(b_u == -float("inf"), 0.0, b_log2)


@triton.jit
def _take(b_p_max, b_p_sum, b_q_max, b_q_sum, b_dot, b_p, b_q, scale2):
    """Takes scores [R, N] of p and q into the lanes [R].

    Those are: maximum and sum of e = exp2((u - maximum) * scale2) of p and of q, and p's sum of e * (log2 of p's e -
    log2 of q's e).
    """
    b_p_new = tl.maximum(b_p_max, tl.max(b_p, axis=1))
    b_q_new = tl.maximum(b_q_max, tl.max(b_q, axis=1))
    b_p_base = finite(b_p_new)
    b_q_base = finite(b_q_new)
    b_p_shift = (b_p_max - b_p_base) * scale2
    b_q_decay = tl.exp2((b_q_max - b_q_base) * scale2)
    b_p_log2 = (b_p - b_p_base[:, None]) * scale2
    b_q_e = tl.exp2((b_q - b_q_base[:, None]) * scale2)
    b_e = tl.exp2(b_p_log2)

    b_moved = bounded(b_p_shift) - _log2_of_q(b_q_max, b_q_base, scale2)
    b_taken = tl.sum(b_e * (bounded(b_p_log2) - _log2_of_q(b_q, b_q_base[:, None], scale2)), axis=1)
    b_p_decay = tl.exp2(b_p_shift)
    b_dot = b_p_decay * (b_dot + b_p_sum * b_moved) + b_taken
    b_p_sum = b_p_decay * b_p_sum + tl.sum(b_e, axis=1)
    return b_p_new, b_p_sum, b_q_new, b_q_decay * b_q_sum + tl.sum(b_q_e, axis=1), b_dot


@triton.jit
def _scores(b_x, m_x, inverse_cap, SOFTCAP: tl.constexpr):
    """Scores of loaded logits, -inf where there is none."""
    b_u = scores(b_x.to(tl.float32), inverse_cap, SOFTCAP)
    return tl.where(m_x, b_u, -float("inf")) if SOFTCAP else b_u


@triton.jit
def _without(b_p, b_q):
    """1 where q is 0 and p is not."""
    return ((b_q == -float("inf")) & (b_p > -float("inf"))).to(tl.int32)


@triton.jit(do_not_specialize=RUN_TIME)
def logits_kl_kernel(
    p_ptr,  # (n, V), last stride 1
    q_ptr,  # (n, V), last stride 1
    kl_ptr,  # (n,)
    score_scale,
    inverse_cap,
    vocabulary,
    p_stride,
    q_stride,
    SOFTCAP: tl.constexpr,
    Q_ALIGNED: tl.constexpr,
    R: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    p_p = p_ptr + row * p_stride
    p_q = q_ptr + row * q_stride
    scale2 = score_scale * 1.4426950408889634
    head, n_vectors = whole_vectors(p_p, vocabulary, VEC)
    b_p_max = tl.full([R], -float("inf"), tl.float32)
    b_q_max = tl.full([R], -float("inf"), tl.float32)
    b_p_sum = tl.zeros([R], tl.float32)
    b_q_sum = tl.zeros([R], tl.float32)
    b_dot = tl.zeros([R], tl.float32)
    o_e, m_e = edges(head, n_vectors, vocabulary, R, VEC)
    b_p_edge = _scores(tl.load(p_p + o_e, mask=m_e, other=-float("inf")), m_e, inverse_cap, SOFTCAP)
    b_q_edge = _scores(tl.load(p_q + o_e, mask=m_e, other=-float("inf")), m_e, inverse_cap, SOFTCAP)
    b_without = _without(b_p_edge, b_q_edge)
    b_p_max, b_p_sum, b_q_max, b_q_sum, b_dot = _take(
        b_p_max, b_p_sum, b_q_max, b_q_sum, b_dot, b_p_edge[:, None], b_q_edge[:, None], scale2
    )

    p_p_tile = first_vector(p_p, head, VEC, True) + tile_columns(0, R, VEC)
    p_q_tile = first_vector(p_q, head, VEC, Q_ALIGNED) + tile_columns(0, R, VEC)
    m_r = tile_vectors(0, n_vectors, R)
    b_p = tl.load(p_p_tile, mask=m_r[:, None], other=-float("inf"))
    b_q = tl.load(p_q_tile, mask=m_r[:, None], other=-float("inf"))
    for tile in range(0, tl.cdiv(n_vectors, R)):
        # Asked for a tile ahead: bytes are always under way.
        p_p_tile += R * VEC
        p_q_tile += R * VEC
        m_next = tile_vectors(tile + 1, n_vectors, R)
        b_p_next = tl.load(p_p_tile, mask=m_next[:, None], other=-float("inf"))
        b_q_next = tl.load(p_q_tile, mask=m_next[:, None], other=-float("inf"))
        b_p_score = _scores(b_p, m_r[:, None], inverse_cap, SOFTCAP)
        b_q_score = _scores(b_q, m_r[:, None], inverse_cap, SOFTCAP)
        b_without = tl.maximum(b_without, tl.max(_without(b_p_score, b_q_score), axis=1))
        b_p_max, b_p_sum, b_q_max, b_q_sum, b_dot = _take(
            b_p_max, b_p_sum, b_q_max, b_q_sum, b_dot, b_p_score, b_q_score, scale2
        )
        b_p = b_p_next
        b_q = b_q_next
        m_r = m_next

    p_base = finite(tl.max(b_p_max, axis=0))
    q_base = finite(tl.max(b_q_max, axis=0))
    b_p_shift = (b_p_max - p_base) * scale2
    b_p_decay = tl.exp2(b_p_shift)
    b_moved = bounded(b_p_shift) - _log2_of_q(b_q_max, q_base, scale2)
    dot = tl.sum(b_p_decay * (b_dot + b_p_sum * b_moved), axis=0)
    p_sum = tl.sum(b_p_decay * b_p_sum, axis=0)
    q_sum = tl.sum(tl.exp2((b_q_max - q_base) * scale2) * b_q_sum, axis=0)
    # Exact divisions: a GPU's own makes of equal sums a quotient beside 1, and of equal rows a divergence.
    kl = tl.div_rn(dot, p_sum) * 0.6931471805599453 + tl.log(tl.div_rn(q_sum, p_sum))
    # Infinite where q forbids what p may say. NaN, of a row of nothing, stays.
    kl = tl.where(tl.max(b_without, axis=0) > 0, kl + float("inf"), kl)
    # Only rounding brings it below 0: where the rows are nearly equal, both terms are small and cancel.
    tl.store(kl_ptr + row, tl.where(kl < 0.0, 0.0, kl))


def kl_tiles(vocabulary: int, itemsize: int, target: str, *, softcap: bool) -> Tiles:
    """Returns tiles of one vector a thread of either row."""
    return row_tiles(row_threads(vocabulary, itemsize, softcap), 1, target)


def logits_kl(logits_p: Tensor, logits_q: Tensor, temperature: float, softcap: float | None) -> Tensor:
    """Returns KL(softmax(p) || softmax(q)) of each row, (n,), of two (n, V) logits, last stride 1."""
    rows, vocabulary = logits_p.shape
    kl = torch.empty(rows, dtype=torch.float32, device=logits_p.device)
    if rows:
        logits_kl_kernel[(rows,)](
            p_ptr=logits_p,
            q_ptr=logits_q,
            kl_ptr=kl,
            **softcap_scales(temperature, softcap),
            vocabulary=vocabulary,
            p_stride=logits_p.stride(0),
            q_stride=logits_q.stride(0),
            Q_ALIGNED=vectors_match(logits_p, logits_q),
            VEC=VECTOR // logits_p.element_size(),
            **kl_tiles(vocabulary, logits_p.element_size(), target_of(logits_p), softcap=softcap is not None),
        )
    return kl


def compile_cases() -> list[CompileCase]:
    """Returns both widths of an element, the wider one with a soft-cap and with rows that begin differently."""
    return [
        _compile_case("logits kl bf16", "bf16", softcap=False, aligned=True),
        _compile_case("logits kl softcap fp32", "fp32", softcap=True, aligned=False),
    ]


def _compile_case(name: str, dtype: str, *, softcap: bool, aligned: bool) -> CompileCase:
    signature = {"p_ptr": f"*{dtype}", "q_ptr": f"*{dtype}", "kl_ptr": "*fp32"}
    signature |= dict.fromkeys(RUN_TIME, "i32") | {"score_scale": "fp32", "inverse_cap": "fp32"}
    itemsize = 4 if dtype == "fp32" else 2
    return CompileCase(
        name,
        logits_kl_kernel,
        signature,
        {"SOFTCAP": softcap, "Q_ALIGNED": aligned, "VEC": VECTOR // itemsize},
        tiles=lambda target: kl_tiles(152064, itemsize, target, softcap=softcap),
    )

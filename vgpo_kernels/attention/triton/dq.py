"""The gradient of Q: a program owns a block of queries and walks the keys that they see."""

from typing import Any

from vgpo_kernels._triton import CompileCase, tl, triton
from vgpo_kernels.attention.triton.configs import dq_tiles
from vgpo_kernels.attention.triton.dkdv import PADDED_TILE, STRIDES, compile_case, probabilities
from vgpo_kernels.attention.triton.key_blocks import cut_steps, cut_tile, key_ranges, load_tile, products, whole_tile


@triton.jit
def _dq(
    b_dq,  # [BM, BD] fp32
    b_q,  # [BM, BD]
    b_grad,  # [BM, BD]
    p_rows,  # [BM] pointers to the rows of b_q
    p_grad_rows,  # [BM] pointers to the rows of b_grad
    m_rows,  # [BM] which of them are read
    b_delta,  # [BM] fp32
    b_lse2,  # [BM] fp32
    b_grad_mass,  # [BM] fp32
    b_start,  # [BM] int32
    b_end,  # [BM] int32
    p_k,
    p_v,
    p_weight,
    stride_kl,
    stride_vl,
    begin,
    whole_begin,
    whole_end,
    end,
    inner,
    outer,
    CUT: tl.constexpr,
    WITH_MASS: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Walks the tiles of keys that every query sees whole, or (CUT) the others."""
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < HEAD
    o_k = o_n.to(tl.int64)[:, None] * stride_kl + o_d[None, :]  # [BN, BD]
    o_v = o_n.to(tl.int64)[:, None] * stride_vl + o_d[None, :]  # [BN, BD]
    steps = (whole_end - whole_begin) // BLOCK_N
    if CUT:
        steps = cut_steps(begin, whole_begin, whole_end, end, BLOCK_N)
    for step in range(0, steps):
        first = whole_tile(step, whole_begin, BLOCK_N)
        if CUT:
            first = cut_tile(step, begin, whole_begin, whole_end, BLOCK_N)
        m_n = o_n >= 0
        if CUT or WITH_MASS:
            b_weight = tl.load(p_weight + first + o_n)  # [BN]
            m_n = b_weight >= 0
        b_k = load_tile(p_k + first.to(tl.int64) * stride_kl + o_k, m_n, m_d, CUT, HEAD < BLOCK_D)  # [BN, BD]
        b_v = load_tile(p_v + first.to(tl.int64) * stride_vl + o_v, m_n, m_d, CUT, HEAD < BLOCK_D)  # [BN, BD]
        o_row = (first + o_n).to(tl.int64)  # [BN]
        b_s = tl.zeros([b_q.shape[0], BLOCK_N], tl.float32)  # [BM, BN]
        b_s = products(b_q, p_rows, m_rows, b_k, p_k + o_row * stride_kl, m_n, b_s, HEAD)
        # What dP is less by is where its product begins: the mass costs no instruction more.
        b_dp = tl.broadcast_to(-b_delta[:, None], b_s.shape)  # [BM, BN]
        if WITH_MASS:
            b_dp = b_grad_mass[:, None] * b_weight[None, :] - b_delta[:, None]
        b_dp = products(b_grad, p_grad_rows, m_rows, b_v, p_v + o_row * stride_vl, m_n, b_dp, HEAD)
        b_p, b_slope = probabilities(b_s, b_lse2[:, None], inner, outer, SOFTCAP)  # [BM, BN]
        if CUT:
            o_key = first + o_n[None, :]  # [1, BN]
            m_visible = (b_start[:, None] <= o_key) & (o_key < b_end[:, None]) & m_n[None, :]
            b_p = tl.where(m_visible, b_p, 0.0)
        b_ds = b_p * b_dp * b_slope  # [BM, BN]
        b_dq = tl.dot(b_ds.to(b_k.dtype), b_k, b_dq, input_precision="ieee")
    return b_dq


@triton.jit(do_not_specialize=["Hq", "group", "Lq", "Lk", "padded_tiles", *STRIDES, "inner", "outer", "scale"])
def dq_kernel(
    q_ptr,  # (B, Hq, Lq, D)
    k_ptr,  # (B, Hkv, Lk, D)
    v_ptr,  # (B, Hkv, Lk, D)
    grad_out_ptr,  # (B, Hq, Lq, D)
    grad_mass_ptr,  # (B, Hq, L_padded) fp32, or None
    lse2_ptr,  # (B, Hq, L_padded) fp32
    delta_ptr,  # (B, Hq, L_padded) fp32
    weight_ptr,  # (B, blocks * KEYS_BLOCK) fp32
    kind_ptr,  # (B, blocks) int8
    start_ptr,  # (B, L_padded) int32
    end_ptr,  # (B, L_padded) int32
    dq_ptr,  # (B, Hq, Lq, D) contiguous
    Hq,
    group,
    Lq,
    Lk,
    padded_tiles,
    stride_qb_units,
    stride_qh_units,
    stride_ql_units,
    stride_kb_units,
    stride_kh_units,
    stride_kl_units,
    stride_vb_units,
    stride_vh_units,
    stride_vl_units,
    stride_gb_units,
    stride_gh_units,
    stride_gl_units,
    inner,
    outer,
    scale,
    SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    KEYS_BLOCK: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CUT_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of queries of one head and walks the keys that they see."""
    L_padded = padded_tiles * PADDED_TILE
    n_blocks = tl.cdiv(Lq, BLOCK_M)
    # The last queries first: under a causal mask they see the most keys.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    row_head = tl.program_id(0) // n_blocks
    row = (row_head // Hq).to(tl.int64)
    head = (row_head % Hq).to(tl.int64)
    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < HEAD
    b_start = tl.load(start_ptr + row * L_padded + o_m)  # [BM]
    b_end = tl.load(end_ptr + row * L_padded + o_m)  # [BM]
    o_row = row_head.to(tl.int64) * L_padded + o_m  # [BM]
    b_lse2 = tl.load(lse2_ptr + o_row)  # [BM]
    b_delta = tl.load(delta_ptr + o_row)  # [BM]
    m_seen = b_lse2 != float("inf")
    WITH_MASS: tl.constexpr = grad_mass_ptr is not None
    b_grad_mass = b_delta
    if WITH_MASS:
        b_grad_mass = tl.load(grad_mass_ptr + o_row)  # [BM]
    p_q = q_ptr + (row * stride_qb_units + head * stride_qh_units) * UNIT
    p_grad = grad_out_ptr + (row * stride_gb_units + head * stride_gh_units) * UNIT
    p_rows = p_q + o_m.to(tl.int64) * stride_ql_units * UNIT  # [BM]
    p_grad_rows = p_grad + o_m.to(tl.int64) * stride_gl_units * UNIT  # [BM]
    b_q = load_tile(p_rows[:, None] + o_d[None, :], m_seen, m_d, True, HEAD < BLOCK_D)  # [BM, BD]
    b_grad = load_tile(p_grad_rows[:, None] + o_d[None, :], m_seen, m_d, True, HEAD < BLOCK_D)  # [BM, BD]
    p_kind = kind_ptr + row * tl.cdiv(Lk, KEYS_BLOCK)
    begin, whole_begin, whole_end, end = key_ranges(b_start, b_end, p_kind, KEYS_BLOCK, BLOCK_N, CUT_N)
    b_dq = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Cut tiles first: with Triton 3.6, whole ones first would serialise the matrix products of sm_90 (ptxas C7515).
    for WHOLE in tl.static_range(2):
        b_dq = _dq(
            b_dq,
            b_q,
            b_grad,
            p_rows,
            p_grad_rows,
            m_seen,
            b_delta,
            b_lse2,
            b_grad_mass,
            b_start,
            b_end,
            k_ptr + (row * stride_kb_units + (head // group) * stride_kh_units) * UNIT,
            v_ptr + (row * stride_vb_units + (head // group) * stride_vh_units) * UNIT,
            weight_ptr + row * tl.cdiv(Lk, KEYS_BLOCK) * KEYS_BLOCK,
            stride_kl_units.to(tl.int64) * UNIT,
            stride_vl_units.to(tl.int64) * UNIT,
            begin,
            whole_begin,
            whole_end,
            end,
            inner,
            outer,
            WHOLE == 0,
            WITH_MASS,
            SOFTCAP,
            HEAD,
            BLOCK_N if WHOLE == 1 else CUT_N,
            BLOCK_D,
        )
    b_dq = tl.where(m_seen[:, None], b_dq * scale, 0.0).to(dq_ptr.dtype.element_ty)
    first_query = block * BLOCK_M
    o_tile = tl.arange(0, BLOCK_M)[:, None] * HEAD + o_d[None, :]  # [BM, BD]
    m_out = (tl.arange(0, BLOCK_M) < Lq - first_query)[:, None] & m_d[None, :]
    tl.store(dq_ptr + (row_head.to(tl.int64) * Lq + first_query) * HEAD + o_tile, b_dq, mask=m_out)


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at the head sizes and types in use, with soft-cap and without mass once each."""
    return [
        _compile_case("bf16", 64),
        _compile_case("bf16", 128),
        _compile_case("bf16", 256),
        _compile_case("fp16", 80),
        _compile_case("fp32", 64),
        _compile_case("fp32", 256),
        _compile_case("bf16", 256, softcap=True),
        _compile_case("bf16", 512),
        _compile_case("bf16", 320, softcap=True),
        _compile_case("fp32", 512),
        _compile_case("bf16", 128, mass=False),
    ]


def _compile_case(dtype: str, D: int, **options: Any) -> CompileCase:
    arguments = {"dq_ptr": f"*{dtype}", "kind_ptr": "*i8", "Hq": "i32", "Lq": "i32"}
    return compile_case("dq", dq_kernel, dq_tiles, arguments, dtype, D, KEYS_BLOCK=128, **options)

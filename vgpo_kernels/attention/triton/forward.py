"""Attention with the mass on visual keys: it rides in the softmax loop as one more sum, rescaled like the others."""

from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.attention.triton import decode, hopper_forward
from vgpo_kernels.attention.triton.configs import forward_tiles
from vgpo_kernels.attention.triton.key_blocks import (
    MIXED_BLOCK,
    VISUAL_BLOCK,
    cut_steps,
    cut_tile,
    find_keys,
    key_ranges,
    load_tile,
    products,
    row_intervals,
    whole_tile,
)
from vgpo_kernels.attention.triton.primitives import (
    VECTOR,
    log2_scores,
    padded_head,
    score_scales,
    strides_in_units,
    with_loadable_rows,
    with_whole_rows,
)

STRIDES = tuple(f"stride_{name}{axis}_units" for name in "qkv" for axis in "bhl")


@triton.jit
def _attend(
    b_acc,  # [BM, BD] fp32
    b_max,  # [BM] fp32, in powers of two
    b_sum,  # [BM] fp32
    b_mass,  # [BM] fp32
    b_q,  # [BM, BD]
    p_rows,  # [BM] pointers to the rows of b_q
    m_rows,  # [BM] which of them are read
    b_start,  # [BM] int32
    b_end,  # [BM] int32
    p_k,
    p_v,
    p_weight,
    p_kind,
    stride_kl,
    stride_vl,
    begin,
    whole_begin,
    whole_end,
    end,
    inner,
    outer,
    CUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    WITH_MASS: tl.constexpr,
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
    p_whole_kind = p_kind + whole_begin // BLOCK_N
    steps = (whole_end - whole_begin) // BLOCK_N
    if CUT:
        steps = cut_steps(begin, whole_begin, whole_end, end, BLOCK_N)
    for step in range(0, steps):
        m_n = o_n >= 0
        if CUT:
            first = cut_tile(step, begin, whole_begin, whole_end, BLOCK_N)
            b_weight = tl.load(p_weight + first + o_n)  # [BN]
            m_n = b_weight >= 0
        else:
            first = whole_tile(step, whole_begin, BLOCK_N)
        b_k = load_tile(p_k + first.to(tl.int64) * stride_kl + o_k, m_n, m_d, CUT, HEAD < BLOCK_D)  # [BN, BD]
        p_keys = p_k + (first + o_n).to(tl.int64) * stride_kl  # [BN]
        b_s = tl.zeros([b_q.shape[0], BLOCK_N], tl.float32)  # [BM, BN]
        b_s = products(b_q, p_rows, m_rows, b_k, p_keys, m_n, b_s, HEAD)
        if CUT or SOFTCAP:
            b_s = log2_scores(b_s, inner, outer, SOFTCAP)
            if CUT:
                o_key = first + o_n[None, :]  # [1, BN]
                m_visible = (b_start[:, None] <= o_key) & (o_key < b_end[:, None]) & m_n[None, :]
                b_s = tl.where(m_visible, b_s, -float("inf"))
            b_larger = tl.maximum(b_max, tl.max(b_s, axis=1))  # [BM]
        else:
            b_larger = tl.maximum(b_max, tl.max(b_s, axis=1) * inner)  # [BM]
        # Queries without a finite score yet subtract 0: two infinities would make NaN.
        b_shift = tl.where(b_larger == -float("inf"), 0.0, b_larger)
        b_p = tl.exp2((b_s if CUT or SOFTCAP else b_s * inner) - b_shift[:, None])  # [BM, BN]
        b_rescale = tl.exp2(b_max - b_shift)  # [BM]
        b_max = b_larger
        b_part = tl.sum(b_p, axis=1)  # [BM]
        b_sum = b_sum * b_rescale + b_part
        if WITH_MASS:
            if CUT:
                b_part = tl.sum(b_p * b_weight[None, :], axis=1)
            else:
                # Of tiles whose keys are all visual the mass is the tile's sum, of those without any 0.
                kind = tl.load(p_whole_kind + step)
                if kind == MIXED_BLOCK:
                    b_weight = tl.load(p_weight + first + o_n)  # [BN]
                    b_part = tl.sum(b_p * b_weight[None, :], axis=1)
                else:
                    b_part = tl.where(kind == VISUAL_BLOCK, b_part, 0.0)
            b_mass = b_mass * b_rescale + b_part
        b_v = load_tile(p_v + first.to(tl.int64) * stride_vl + o_v, m_n, m_d, CUT, HEAD < BLOCK_D)  # [BN, BD]
        b_acc = b_acc * b_rescale[:, None]
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc, input_precision="ieee")
    return b_acc, b_max, b_sum, b_mass


@triton.jit(do_not_specialize=["Hq", "group", "Lq", "Lk", *STRIDES, "inner", "outer"])
def forward_kernel(
    q_ptr,  # (B, Hq, Lq, D)
    k_ptr,  # (B, Hkv, Lk, D)
    v_ptr,  # (B, Hkv, Lk, D)
    weight_ptr,  # (B, blocks * BLOCK_N) fp32
    kind_ptr,  # (B, blocks) int8
    start_ptr,  # (B, Lq) int32
    end_ptr,  # (B, Lq) int32
    out_ptr,  # (B, Hq, Lq, D) contiguous
    mass_ptr,  # (B, Hq, Lq) fp32 contiguous, or None
    lse_ptr,  # (B, Hq, Lq) fp32 contiguous
    Hq,
    group,
    Lq,
    Lk,
    stride_qb_units,
    stride_qh_units,
    stride_ql_units,
    stride_kb_units,
    stride_kh_units,
    stride_kl_units,
    stride_vb_units,
    stride_vh_units,
    stride_vl_units,
    inner,
    outer,
    SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CUT_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of queries of one head and walks the keys that they see."""
    WITH_MASS: tl.constexpr = mass_ptr is not None
    n_blocks = tl.cdiv(Lq, BLOCK_M)
    # The last queries first: under a causal mask they see the most keys.
    block = n_blocks - 1 - tl.program_id(0) % n_blocks
    row_head = tl.program_id(0) // n_blocks
    row = (row_head // Hq).to(tl.int64)
    head = (row_head % Hq).to(tl.int64)
    o_m = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    b_start, b_end = row_intervals(start_ptr + row * Lq, end_ptr + row * Lq, o_m, Lq)
    m_seen = b_start < b_end  # [BM]

    stride_ql = stride_ql_units.to(tl.int64) * UNIT
    stride_kl = stride_kl_units.to(tl.int64) * UNIT
    stride_vl = stride_vl_units.to(tl.int64) * UNIT
    p_q = q_ptr + (row * stride_qb_units + head * stride_qh_units) * UNIT
    p_k = k_ptr + (row * stride_kb_units + (head // group) * stride_kh_units) * UNIT
    p_v = v_ptr + (row * stride_vb_units + (head // group) * stride_vh_units) * UNIT
    p_kind = kind_ptr + row * tl.cdiv(Lk, BLOCK_N)
    p_weight = weight_ptr + row * tl.cdiv(Lk, BLOCK_N) * BLOCK_N
    p_rows = p_q + o_m.to(tl.int64) * stride_ql  # [BM]
    b_q = load_tile(p_rows[:, None] + o_d[None, :], m_seen, o_d < HEAD, True, HEAD < BLOCK_D)  # [BM, BD]

    begin, whole_begin, whole_end, end = key_ranges(b_start, b_end, p_kind, BLOCK_N, BLOCK_N, CUT_N)
    b_acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_M], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_M], tl.float32)
    b_mass = tl.zeros([BLOCK_M], tl.float32)
    # Cut tiles first: with Triton 3.6, whole ones first would serialise the matrix products of sm_90 (ptxas C7515).
    for WHOLE in tl.static_range(2):
        b_acc, b_max, b_sum, b_mass = _attend(
            b_acc,
            b_max,
            b_sum,
            b_mass,
            b_q,
            p_rows,
            m_seen,
            b_start,
            b_end,
            p_k,
            p_v,
            p_weight,
            p_kind,
            stride_kl,
            stride_vl,
            begin,
            whole_begin,
            whole_end,
            end,
            inner,
            outer,
            WHOLE == 0,
            SOFTCAP,
            WITH_MASS,
            HEAD,
            BLOCK_N if WHOLE == 1 else CUT_N,
            BLOCK_D,
        )

    # The sum is tested, not the maximum, which ignores NaN: NaN that a query sees must reach the output.
    m_seen = m_seen & (b_sum != 0.0)
    b_inverse = 1.0 / tl.where(m_seen, b_sum, 1.0)
    b_lse = (b_max + tl.log2(tl.where(m_seen, b_sum, 1.0))) * 0.6931471805599453
    first_query = block * BLOCK_M
    o_tile = tl.arange(0, BLOCK_M)  # [BM]
    m_m = o_tile < Lq - first_query
    o_row = row_head.to(tl.int64) * Lq + first_query
    tl.store(lse_ptr + o_row + o_tile, tl.where(m_seen, b_lse, -float("inf")), mask=m_m)
    if WITH_MASS:
        tl.store(mass_ptr + o_row + o_tile, tl.where(m_seen, b_mass * b_inverse, 0.0), mask=m_m)
    b_out = tl.where(m_seen[:, None], b_acc * b_inverse[:, None], 0.0).to(out_ptr.dtype.element_ty)
    p_out = out_ptr + o_row * HEAD + o_tile[:, None] * HEAD + o_d[None, :]
    tl.store(p_out, b_out, mask=m_m[:, None] & (o_d < HEAD)[None, :])


def visual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    scale: float,
    softcap: float | None,
    with_mass: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns the output, the attention on visual keys and the LSE; arguments as in the reference.

    Args:
        with_mass: False leaves the mass out, and None in its place.
    """
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    if scale < 0:
        # The largest score is found from the largest product.
        q, scale = -q, -scale
    if decode.takes(Lq, Hq // Hkv, D):
        q, k, v = with_loadable_rows(q), with_loadable_rows(k), with_loadable_rows(v)
        return decode.split_attention(q, k, v, mask, scale, softcap, with_mass)
    q, k, v = with_whole_rows(q), with_whole_rows(k), with_whole_rows(v)
    if hopper_forward.takes(q, k, v, scale, softcap):
        return hopper_forward.visual_attention(q, k, v, mask, scale, with_mass)
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, Hq, Lq), dtype=torch.float32)
    mass = torch.empty_like(lse) if with_mass else None
    head = padded_head(D)
    tiles = forward_tiles(target_of(q), q.element_size(), head)
    keys = find_keys(mask, tiles["BLOCK_N"])
    forward_kernel[(B * Hq * triton.cdiv(Lq, tiles["BLOCK_M"]),)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        weight_ptr=keys.weight,
        kind_ptr=keys.kind,
        start_ptr=mask.start.contiguous(),
        end_ptr=mask.end.contiguous(),
        out_ptr=out,
        mass_ptr=mass,
        lse_ptr=lse,
        Hq=Hq,
        group=Hq // Hkv,
        Lq=Lq,
        Lk=Lk,
        HEAD=D,
        BLOCK_D=head,
        **strides_in_units(q=q, k=k, v=v),
        **score_scales(scale, softcap),
        **tiles,
    )
    return out, mass, lse


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at the head sizes and types in use, with soft-cap and without mass once each."""
    return [
        _compile_case("bf16", 64),
        _compile_case("bf16", 128),
        _compile_case("bf16", 256),
        _compile_case("bf16", 80),
        _compile_case("fp16", 128),
        _compile_case("fp32", 64),
        _compile_case("fp32", 128),
        _compile_case("fp32", 256),
        _compile_case("bf16", 128, softcap=True),
        _compile_case("bf16", 256, softcap=True),
        _compile_case("bf16", 512),
        _compile_case("bf16", 320, softcap=True),
        _compile_case("fp32", 512),
        _compile_case("bf16", 128, mass=False),
    ]


def _compile_case(dtype: str, D: int, softcap: bool = False, mass: bool = True) -> CompileCase:
    head, itemsize = padded_head(D), 4 if dtype == "fp32" else 2
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("weight_ptr", "lse_ptr"), "*fp32") | dict.fromkeys(("start_ptr", "end_ptr"), "*i32")
    signature |= dict.fromkeys(("Hq", "group", "Lq", "Lk", *STRIDES), "i32") | {"kind_ptr": "*i8"}
    signature |= {"inner": "fp32", "outer": "fp32"}
    constexprs: dict[str, Any] = {"SOFTCAP": softcap, "HEAD": D, "UNIT": VECTOR, "BLOCK_D": head}
    if mass:
        signature["mass_ptr"] = "*fp32"
    else:
        constexprs["mass_ptr"] = None
    variant = f"{dtype} D {D}{' softcap' * softcap}{'' if mass else ' no mass'}"
    return CompileCase(
        f"attention forward {variant}",
        forward_kernel,
        signature,
        constexprs,
        tiles=lambda target: forward_tiles(target, itemsize, head),
    )

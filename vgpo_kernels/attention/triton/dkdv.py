"""The gradients of K and V: a program owns a block of keys and walks the queries that see them, in order."""

from collections.abc import Callable
from typing import Any

from vgpo_kernels._triton import CompileCase, tanh, tl, triton
from vgpo_kernels.attention.triton.configs import dkdv_tiles
from vgpo_kernels.attention.triton.key_blocks import cut_steps, cut_tile, load_tile, products, tile_ranges, whole_tile
from vgpo_kernels.attention.triton.primitives import VECTOR, padded_head

STRIDES = tuple(f"stride_{name}{axis}_units" for name in "qkvg" for axis in "bhl")
# Constants of queries are padded to a multiple of this, which tiles of queries divide: loading them takes no mask.
PADDED_TILE = tl.constexpr(128)


def apart(head: int) -> bool:
    """Whether dK and dV are made one after the other: registers hold a single accumulator of the largest heads."""
    return head > 128


@triton.jit
def probabilities(b_s, b_lse2, inner, outer, SOFTCAP: tl.constexpr):
    """Probabilities of products of q and k, and the derivative of the soft-cap there (1 without one)."""
    b_slope = 1.0
    b_s *= inner
    if SOFTCAP:
        b_tanh = tanh(b_s)
        b_slope = 1.0 - b_tanh * b_tanh
        b_s = b_tanh * outer
    return tl.exp2(b_s - b_lse2), b_slope


@triton.jit
def _dkdv(
    b_dk,  # [BN, BD] fp32
    b_dv,  # [BN, BD] fp32
    b_k,  # [BN, BD]
    b_v,  # [BN, BD]
    p_keys,  # [BN] pointers to the rows of b_k
    p_values,  # [BN] pointers to the rows of b_v
    m_keys,  # [BN] which of them are read
    b_weight,  # [BN] fp32
    o_n,  # [BN]
    p_q,
    p_grad,
    p_delta,
    p_lse2,
    p_grad_mass,
    p_start,
    p_end,
    stride_ql,
    stride_gl,
    begin,
    whole_begin,
    whole_end,
    end,
    inner,
    outer,
    CUT: tl.constexpr,
    WITH_DK: tl.constexpr,
    WITH_DV: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Walks the tiles of queries that all see the whole block of keys, or the others, of one head."""
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < HEAD
    o_m = tl.arange(0, BLOCK_M)  # [BM]
    o_q = o_m.to(tl.int64)[:, None] * stride_ql + o_d[None, :]  # [BM, BD]
    o_g = o_m.to(tl.int64)[:, None] * stride_gl + o_d[None, :]  # [BM, BD]
    steps = (whole_end - whole_begin) // BLOCK_M
    if CUT:
        steps = cut_steps(begin, whole_begin, whole_end, end, BLOCK_M)
    for step in range(0, steps):
        first = whole_tile(step, whole_begin, BLOCK_M)
        if CUT:
            first = cut_tile(step, begin, whole_begin, whole_end, BLOCK_M)
        b_lse2 = tl.load(p_lse2 + first + o_m)  # [BM]
        m_m = b_lse2 != float("inf")
        b_q = load_tile(p_q + first.to(tl.int64) * stride_ql + o_q, m_m, m_d, CUT, HEAD < BLOCK_D)  # [BM, BD]
        o_row = (first + o_m).to(tl.int64)  # [BM]
        b_s = tl.zeros([b_k.shape[0], BLOCK_M], tl.float32)  # [BN, BM]
        b_s = products(b_k, p_keys, m_keys, b_q, p_q + o_row * stride_ql, m_m, b_s, HEAD)
        b_grad = load_tile(p_grad + first.to(tl.int64) * stride_gl + o_g, m_m, m_d, CUT, HEAD < BLOCK_D)  # [BM, BD]
        if WITH_DK:
            # What dP is less by is where its product begins: the mass costs no instruction more.
            b_delta = tl.load(p_delta + first + o_m)  # [BM]
            b_dp = tl.broadcast_to(-b_delta[None, :], b_s.shape)  # [BN, BM]
            if p_grad_mass is not None:
                b_grad_mass = tl.load(p_grad_mass + first + o_m)  # [BM]
                b_dp = b_weight[:, None] * b_grad_mass[None, :] - b_delta[None, :]
            b_dp = products(b_v, p_values, m_keys, b_grad, p_grad + o_row * stride_gl, m_m, b_dp, HEAD)
        b_p, b_slope = probabilities(b_s, b_lse2[None, :], inner, outer, SOFTCAP)  # [BN, BM]
        if CUT:
            b_start = tl.load(p_start + first + o_m)  # [BM]
            b_end = tl.load(p_end + first + o_m)  # [BM]
            m_visible = (b_start[None, :] <= o_n[:, None]) & (o_n[:, None] < b_end[None, :])  # [BN, BM]
            b_p = tl.where(m_visible, b_p, 0.0)
        if WITH_DV:
            b_dv = tl.dot(b_p.to(b_grad.dtype), b_grad, b_dv, input_precision="ieee")
        if WITH_DK:
            b_ds = b_p * b_dp * b_slope  # [BN, BM]
            b_dk = tl.dot(b_ds.to(b_q.dtype), b_q, b_dk, input_precision="ieee")
    return b_dk, b_dv


@triton.jit(do_not_specialize=["Hkv", "group", "Lk", "padded_tiles", *STRIDES, "inner", "outer", "scale"])
def dkdv_kernel(
    q_ptr,  # (B, Hq, Lq, D)
    k_ptr,  # (B, Hkv, Lk, D)
    v_ptr,  # (B, Hkv, Lk, D)
    grad_out_ptr,  # (B, Hq, Lq, D)
    grad_mass_ptr,  # (B, Hq, L_padded) fp32, or None
    lse2_ptr,  # (B, Hq, L_padded) fp32
    delta_ptr,  # (B, Hq, L_padded) fp32
    weight_ptr,  # (B, blocks * BLOCK_N) fp32
    queries_ptr,  # (B, blocks, 4) int32
    start_ptr,  # (B, L_padded) int32
    end_ptr,  # (B, L_padded) int32
    dk_ptr,  # (B, Hkv, Lk, D) contiguous, or None
    dv_ptr,  # (B, Hkv, Lk, D) contiguous, or None
    Hkv,
    group,
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
    BLOCK_M: tl.constexpr,
    CUT_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a block of keys of one kv head and walks the queries of its heads that see one of them."""
    L_padded = padded_tiles * PADDED_TILE
    n_blocks = tl.cdiv(Lk, BLOCK_N)
    # The first keys first: under a causal mask the most queries see them.
    block = tl.program_id(0) % n_blocks
    row_head = tl.program_id(0) // n_blocks
    row = (row_head // Hkv).to(tl.int64)
    kv_head = (row_head % Hkv).to(tl.int64)
    o_n = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < HEAD
    b_weight = tl.load(weight_ptr + row * n_blocks * BLOCK_N + o_n)  # [BN]
    m_seen = b_weight >= 0
    stride_ql = stride_ql_units.to(tl.int64) * UNIT
    stride_gl = stride_gl_units.to(tl.int64) * UNIT
    p_k = k_ptr + (row * stride_kb_units + kv_head * stride_kh_units) * UNIT
    p_v = v_ptr + (row * stride_vb_units + kv_head * stride_vh_units) * UNIT
    p_keys = p_k + o_n.to(tl.int64) * stride_kl_units * UNIT  # [BN]
    p_values = p_v + o_n.to(tl.int64) * stride_vl_units * UNIT  # [BN]
    b_k = load_tile(p_keys[:, None] + o_d[None, :], m_seen, m_d, True, HEAD < BLOCK_D)  # [BN, BD]
    b_v = b_k
    if dk_ptr is not None:
        b_v = load_tile(p_values[:, None] + o_d[None, :], m_seen, m_d, True, HEAD < BLOCK_D)  # [BN, BD]
    p_queries = queries_ptr + (row * n_blocks + block) * 4
    begin, whole_begin, whole_end, end = tile_ranges(
        tl.load(p_queries), tl.load(p_queries + 1), tl.load(p_queries + 2), tl.load(p_queries + 3), BLOCK_M, CUT_M
    )
    b_dk = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_D], tl.float32)
    # One walk after the other, through all heads, so that what both hoist is not held at once.
    for CUT in tl.static_range(2):
        for member in range(0, group):
            head = kv_head * group + member
            first = (row * Hkv * group + head) * L_padded
            p_grad_mass = None
            if grad_mass_ptr is not None:
                p_grad_mass = grad_mass_ptr + first
            b_dk, b_dv = _dkdv(
                b_dk,
                b_dv,
                b_k,
                b_v,
                p_keys,
                p_values,
                m_seen,
                b_weight,
                o_n,
                q_ptr + (row * stride_qb_units + head * stride_qh_units) * UNIT,
                grad_out_ptr + (row * stride_gb_units + head * stride_gh_units) * UNIT,
                delta_ptr + first,
                lse2_ptr + first,
                p_grad_mass,
                start_ptr + row * L_padded,
                end_ptr + row * L_padded,
                stride_ql,
                stride_gl,
                begin,
                whole_begin,
                whole_end,
                end,
                inner,
                outer,
                CUT == 1,
                dk_ptr is not None,
                dv_ptr is not None,
                SOFTCAP,
                HEAD,
                CUT_M if CUT == 1 else BLOCK_M,
                BLOCK_D,
            )
    first_key = block * BLOCK_N
    o_tile = tl.arange(0, BLOCK_N)[:, None] * HEAD + o_d[None, :]  # [BN, BD]
    o_out = (row_head.to(tl.int64) * Lk + first_key) * HEAD
    m_out = (tl.arange(0, BLOCK_N) < Lk - first_key)[:, None] & m_d[None, :]
    if dk_ptr is not None:
        b_dk = tl.where(m_seen[:, None], b_dk * scale, 0.0).to(dk_ptr.dtype.element_ty)
        tl.store(dk_ptr + o_out + o_tile, b_dk, mask=m_out)
    if dv_ptr is not None:
        b_dv = tl.where(m_seen[:, None], b_dv, 0.0).to(dv_ptr.dtype.element_ty)
        tl.store(dv_ptr + o_out + o_tile, b_dv, mask=m_out)


def compile_case(
    name: str,
    kernel: Any,
    tiles: Callable[[str, int, int], dict[str, int]],
    arguments: dict[str, str],
    dtype: str,
    D: int,
    softcap: bool = False,
    mass: bool = True,
    **constexprs: Any,
) -> CompileCase:
    """Returns the case of a kernel with `arguments` beside those that both kernels have."""
    head, itemsize = padded_head(D), 4 if dtype == "fp32" else 2
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "grad_out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("delta_ptr", "lse2_ptr", "weight_ptr"), "*fp32")
    signature |= dict.fromkeys(("start_ptr", "end_ptr"), "*i32")
    signature |= dict.fromkeys(("group", "Lk", "padded_tiles", *STRIDES), "i32")
    signature |= dict.fromkeys(("inner", "outer", "scale"), "fp32") | arguments
    constexprs |= {"SOFTCAP": softcap, "HEAD": D, "UNIT": VECTOR, "BLOCK_D": head}
    if mass:
        signature["grad_mass_ptr"] = "*fp32"
    else:
        constexprs["grad_mass_ptr"] = None
    variant = f"{dtype} D {D}{' softcap' * softcap}{'' if mass else ' no mass'}"
    return CompileCase(
        f"attention {name} {variant}",
        kernel,
        signature,
        constexprs,
        tiles=lambda target: tiles(target, itemsize, head),
    )


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at the head sizes and types in use, with soft-cap and without mass once each."""
    return [
        _compile_case("bf16", 64),
        _compile_case("bf16", 128),
        _compile_case("bf16", 256, wanted="dk"),
        _compile_case("bf16", 256, wanted="dv"),
        _compile_case("fp16", 80),
        _compile_case("fp32", 64),
        _compile_case("fp32", 256, wanted="dk"),
        _compile_case("bf16", 256, wanted="dk", softcap=True),
        _compile_case("bf16", 512, wanted="dk"),
        _compile_case("bf16", 512, wanted="dv"),
        _compile_case("bf16", 320, wanted="dk", softcap=True),
        _compile_case("fp32", 512, wanted="dk"),
        _compile_case("fp32", 512, wanted="dv"),
        _compile_case("bf16", 128, mass=False),
    ]


def _compile_case(dtype: str, D: int, wanted: str = "", **options: Any) -> CompileCase:
    arguments = {"queries_ptr": "*i32", "Hkv": "i32"}
    for name in ("dk", "dv"):
        if wanted in name:
            arguments[f"{name}_ptr"] = f"*{dtype}"
        else:
            options[f"{name}_ptr"] = None
    name = wanted or "dkdv"
    return compile_case(name, dkdv_kernel, dkdv_tiles, arguments, dtype, D, **options)

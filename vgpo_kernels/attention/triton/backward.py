"""Gradients of attention and of its mass on visual keys, without a matrix product or an atomic for the mass.

With m_i = sum_j P_ij vis_j, a gradient g of the mass is dP_ij = dO_i.v_j + g_i vis_j, and the row's constant becomes
delta_i = dO_i.O_i + g_i m_i - dlse_i, so that dS_ij = P_ij (dP_ij - delta_i).
"""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.intervals import KeyMask
from vgpo_kernels.attention.triton import dkdv
from vgpo_kernels.attention.triton.configs import dkdv_tiles, dq_tiles, preprocess_tiles
from vgpo_kernels.attention.triton.dq import compile_cases as compile_dq_cases
from vgpo_kernels.attention.triton.dq import dq_kernel
from vgpo_kernels.attention.triton.key_blocks import find_keys, load_tile, row_intervals
from vgpo_kernels.attention.triton.primitives import (
    padded_head,
    score_scales,
    strides_in_units,
    with_whole_rows,
)

PADDED_TILE = dkdv.PADDED_TILE.value


class Constants(NamedTuple):
    """What the gradients need of each query, padded with queries that see nothing to whole tiles.

    Args:
        start, end: (B, L_padded) int32.
        lse2: (B, Hq, L_padded) fp32, the LSE in powers of two, inf for a query that sees nothing.
        delta: (B, Hq, L_padded) fp32.
        grad_mass: (B, Hq, L_padded) fp32, or None.
    """

    start: Tensor
    end: Tensor
    lse2: Tensor
    delta: Tensor
    grad_mass: Tensor | None


@triton.jit(do_not_specialize=["H", "L", "L_padded", "stride_gb_units", "stride_gh_units", "stride_gl_units"])
def preprocess_kernel(
    start_ptr,  # (B, L) int32
    end_ptr,  # (B, L) int32
    out_ptr,  # (B, H, L, D) contiguous
    grad_out_ptr,  # (B, H, L, D)
    mass_ptr,  # (B, H, L) fp32 contiguous, or None
    grad_mass_ptr,  # (B, H, L) fp32 contiguous, or None
    grad_lse_ptr,  # (B, H, L) fp32 contiguous, or None
    lse_ptr,  # (B, H, L) fp32 contiguous
    padded_start_ptr,
    padded_end_ptr,
    lse2_ptr,
    delta_ptr,
    padded_grad_mass_ptr,  # or None
    H,
    L,
    L_padded,
    stride_gb_units,
    stride_gh_units,
    stride_gl_units,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program makes the constants of a block of queries of one head."""
    n_blocks = L_padded // BLOCK_M
    row_head = (tl.program_id(0) // n_blocks).to(tl.int64)
    row = row_head // H
    head = row_head % H
    o_m = (tl.program_id(0) % n_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_m = o_m < L
    o_row = row_head * L + o_m
    o_padded = row_head * L_padded + o_m
    b_lse = tl.load(lse_ptr + o_row, mask=m_m, other=-float("inf"))  # [BM]
    # A query that sees nothing may hold anything: its probabilities and its constants are 0.
    m_seen = b_lse != -float("inf")
    p_grad = grad_out_ptr + (row * stride_gb_units + head * stride_gh_units) * UNIT
    p_grad += (o_m.to(tl.int64) * stride_gl_units)[:, None] * UNIT + o_d[None, :]
    b_grad = load_tile(p_grad, m_seen, o_d < HEAD, True, HEAD < BLOCK_D).to(tl.float32)  # [BM, BD]
    p_out = out_ptr + o_row[:, None] * HEAD + o_d[None, :]
    b_out = load_tile(p_out, m_seen, o_d < HEAD, True, HEAD < BLOCK_D).to(tl.float32)  # [BM, BD]
    b_delta = tl.sum(b_grad * b_out, axis=1)  # [BM]
    if grad_mass_ptr is not None:
        b_grad_mass = tl.load(grad_mass_ptr + o_row, mask=m_seen, other=0.0)
        b_delta += b_grad_mass * tl.load(mass_ptr + o_row, mask=m_seen, other=0.0)
        tl.store(padded_grad_mass_ptr + o_padded, b_grad_mass)
    if grad_lse_ptr is not None:
        b_delta -= tl.load(grad_lse_ptr + o_row, mask=m_seen, other=0.0)
    tl.store(delta_ptr + o_padded, b_delta)
    tl.store(lse2_ptr + o_padded, tl.where(m_seen, b_lse * 1.4426950408889634, float("inf")))
    if head == 0:
        b_start, b_end = row_intervals(start_ptr + row * L, end_ptr + row * L, o_m, L)
        tl.store(padded_start_ptr + row * L_padded + o_m, b_start)
        tl.store(padded_end_ptr + row * L_padded + o_m, b_end)


def visual_attention_backward(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    out: Tensor,
    mass: Tensor | None,
    lse: Tensor,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of q, k and v in their dtypes; arguments as in the reference."""
    Hq, Lq, D = q.shape[1:]
    Hkv, Lk = k.shape[1:3]
    target, head, itemsize = target_of(q), padded_head(D), q.element_size()
    q, k, v, grad_out = (with_whole_rows(x) for x in (q, k, v, grad_out.to(q.dtype)))
    constants = _constants(grad_out, grad_mass, grad_lse, mask, out, mass, lse)
    dq, dk, dv = q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)
    key_tiles = dkdv_tiles(target, itemsize, head)
    query_tiles = dq_tiles(target, itemsize, head)
    keys = find_keys(mask, key_tiles["BLOCK_N"])
    shared = {
        "q_ptr": q,
        "k_ptr": k,
        "v_ptr": v,
        "grad_out_ptr": grad_out,
        "grad_mass_ptr": constants.grad_mass,
        "lse2_ptr": constants.lse2,
        "delta_ptr": constants.delta,
        "weight_ptr": keys.weight,
        "start_ptr": constants.start,
        "end_ptr": constants.end,
        "group": Hq // Hkv,
        "Lk": Lk,
        "padded_tiles": constants.start.shape[1] // PADDED_TILE,
        "scale": scale,
        "HEAD": D,
        "BLOCK_D": head,
        **strides_in_units(q=q, k=k, v=v, g=grad_out),
        **score_scales(scale, softcap),
    }
    for wanted in ((dk, None), (None, dv)) if dkdv.apart(head) else ((dk, dv),):
        dkdv.dkdv_kernel[(len(k) * Hkv * triton.cdiv(Lk, keys.block),)](
            queries_ptr=keys.queries, dk_ptr=wanted[0], dv_ptr=wanted[1], Hkv=Hkv, **shared, **key_tiles
        )
    dq_kernel[(len(q) * Hq * triton.cdiv(Lq, query_tiles["BLOCK_M"]),)](
        kind_ptr=keys.kind, dq_ptr=dq, Hq=Hq, Lq=Lq, KEYS_BLOCK=keys.block, **shared, **query_tiles
    )
    return dq, dk, dv


def _constants(
    grad_out: Tensor,
    grad_mass: Tensor | None,
    grad_lse: Tensor | None,
    mask: KeyMask,
    out: Tensor,
    mass: Tensor | None,
    lse: Tensor,
) -> Constants:
    B, H, L, D = out.shape
    L_padded = triton.cdiv(L, PADDED_TILE) * PADDED_TILE
    lse2 = lse.new_empty((B, H, L_padded))
    start = mask.start.new_empty((B, L_padded))
    padded = None if grad_mass is None else torch.empty_like(lse2)
    constants = Constants(start, torch.empty_like(start), lse2, torch.empty_like(lse2), padded)
    tiles = preprocess_tiles()
    preprocess_kernel[(B * H * (L_padded // tiles["BLOCK_M"]),)](
        start_ptr=mask.start.contiguous(),
        end_ptr=mask.end.contiguous(),
        out_ptr=out.contiguous(),
        grad_out_ptr=grad_out,
        mass_ptr=None if grad_mass is None or mass is None else mass.contiguous(),
        grad_mass_ptr=None if grad_mass is None else grad_mass.contiguous(),
        grad_lse_ptr=None if grad_lse is None else grad_lse.contiguous(),
        lse_ptr=lse.contiguous(),
        padded_start_ptr=constants.start,
        padded_end_ptr=constants.end,
        lse2_ptr=constants.lse2,
        delta_ptr=constants.delta,
        padded_grad_mass_ptr=constants.grad_mass,
        H=H,
        L=L,
        L_padded=L_padded,
        HEAD=D,
        BLOCK_D=padded_head(D),
        **strides_in_units(g=grad_out),
        **tiles,
    )
    return constants


def compile_cases() -> list[CompileCase]:
    """Returns the cases of the three kernels."""
    constants = [_compile_constants("bf16", 128, 8), _compile_constants("fp32", 80, 1)]
    return [*constants, *dkdv.compile_cases(), *compile_dq_cases()]


def _compile_constants(dtype: str, D: int, unit: int) -> CompileCase:
    signature = dict.fromkeys(("out_ptr", "grad_out_ptr"), f"*{dtype}")
    signature |= dict.fromkeys(("start_ptr", "end_ptr", "padded_start_ptr", "padded_end_ptr"), "*i32")
    floats = ("mass_ptr", "grad_mass_ptr", "grad_lse_ptr", "lse_ptr", "lse2_ptr", "delta_ptr", "padded_grad_mass_ptr")
    signature |= dict.fromkeys(floats, "*fp32")
    signature |= dict.fromkeys(("H", "L", "L_padded", "stride_gb_units", "stride_gh_units", "stride_gl_units"), "i32")
    constexprs = {"HEAD": D, "UNIT": unit, "BLOCK_D": padded_head(D)}
    name = f"attention preprocess {dtype} D {D}"
    return CompileCase(name, preprocess_kernel, signature, constexprs, tiles=lambda _: preprocess_tiles())

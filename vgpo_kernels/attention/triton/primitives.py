"""What kernels share: scores in powers of two, strides in whole vectors."""

import math

import torch
from torch import Tensor

from vgpo_kernels._triton import tanh, tl, triton, with_unit_columns
from vgpo_kernels.attention.triton.wide_heads import WIDE

# Elements in the widest load, 16 bytes at two bytes an element.
VECTOR = 8
# Columns of an fp32 product at a time.
CHUNK = 32
LOG2E = math.log2(math.e)


@triton.jit
def log2_scores(b_products, inner, outer, SOFTCAP: tl.constexpr):
    """Scores times log2(e), so that exp2 makes the probabilities.

    inner, outer: as `score_scales` returns them.
    """
    if SOFTCAP:
        return outer * tanh(b_products * inner)
    return b_products * inner


@triton.jit
def lse_to_subtract(b_lse, EXACT: tl.constexpr):
    """The LSE in the units of `probabilities`; +inf where it is -inf, so that a query that sees nothing gives 0."""
    b_lse = tl.where(b_lse == float("-inf"), float("inf"), b_lse)
    return b_lse if EXACT else b_lse * 1.4426950408889634


@triton.jit
def probabilities(b_products, b_lse, inner, outer, SOFTCAP: tl.constexpr, EXACT: tl.constexpr):
    """exp(score - LSE), with one multiplication more where `EXACT`: it keeps the difference's last bits.

    b_lse: as `lse_to_subtract` returns it, broadcast against the products.
    inner, outer: as `probability_scales` returns them.
    """
    b_difference = log2_scores(b_products, inner, outer, SOFTCAP) - b_lse
    return tl.exp2(b_difference * 1.4426950408889634 if EXACT else b_difference)


@triton.jit
def load_rows(p_rows, m_rows, D: tl.constexpr, D_PAD: tl.constexpr):
    """Rows [N, D_PAD] at pointers [N]: those in `m_rows`, or all of them where that is None; 0 elsewhere."""
    o_d = tl.arange(0, D_PAD)  # [D]
    p_tile = p_rows[:, None] + o_d[None, :]  # [N, D]
    if m_rows is not None:
        return tl.load(p_tile, mask=m_rows[:, None] & (o_d < D)[None, :], other=0.0)
    if D == D_PAD:
        return tl.load(p_tile)
    return tl.load(p_tile, mask=(o_d < D)[None, :], other=0.0)


@triton.jit
def chunked_products(p_a, m_a, p_b, m_b, D: tl.constexpr, CHUNK: tl.constexpr):
    """Products [M, N] of rows at pointers [M] and [N], a few columns at a time: fp32 rows would fill the registers."""
    M: tl.constexpr = p_a.shape[0]
    N: tl.constexpr = p_b.shape[0]
    b_s = tl.zeros([M, N], tl.float32)  # [M, N]
    for start in range(0, D, CHUNK):
        o_d = start + tl.arange(0, CHUNK)  # [C]
        m_d = (o_d < D)[None, :]
        b_a = tl.load(p_a[:, None] + o_d[None, :], mask=m_a[:, None] & m_d, other=0.0)  # [M, C]
        b_b = tl.load(p_b[:, None] + o_d[None, :], mask=m_b[:, None] & m_d, other=0.0)  # [N, C]
        b_s = tl.dot(b_a, tl.trans(b_b), b_s, input_precision="ieee")
    return b_s


def score_scales(scale: float, softcap: float | None) -> dict[str, float | bool]:
    """Returns the kernels' arguments `inner`, `outer` and `SOFTCAP`."""
    if softcap is None:
        return {"inner": scale * LOG2E, "outer": 1.0, "SOFTCAP": False}
    return {"inner": scale / softcap, "outer": softcap * LOG2E, "SOFTCAP": True}


def probability_scales(scale: float, softcap: float | None, dtype: torch.dtype) -> dict[str, float | bool]:
    """Returns the arguments `inner`, `outer`, `SOFTCAP` and `EXACT` of kernels that are given the LSE.

    Products of fp32 are worth exact differences of natural logarithms; those of narrower types are not.
    """
    exact = dtype == torch.float32
    scales = score_scales(scale, softcap) | {"EXACT": exact}
    if exact:
        scales |= {"inner": scale, "outer": 1.0} if softcap is None else {"outer": softcap}
    return scales


def strides_in_units(**tensors: Tensor) -> dict[str, int]:
    """Returns `stride_{name}{b,h,l}_units` of (B, H, L, D) tensors, and the UNIT that multiplies all of them.

    UNIT is VECTOR where that divides every stride and all begin at a whole vector, which the compiler then knows; a
    dimension of one has stride 0.
    """
    strides = {
        f"stride_{name}{axis}_units": x.stride(dim) if x.shape[dim] > 1 else 0
        for name, x in tensors.items()
        for dim, axis in enumerate("bhl")
    }
    begin_whole = all(x.data_ptr() % 16 == 0 for x in tensors.values())
    unit = VECTOR if begin_whole and all(stride % VECTOR == 0 for stride in strides.values()) else 1
    return {name: stride // unit for name, stride in strides.items()} | {"UNIT": unit}


def with_whole_rows(x: Tensor) -> Tensor:
    """Returns `x` with rows that begin at 16 bytes, copied only if they do not: each is read many times."""
    strides = x.stride()
    if strides[3] == 1 and all(stride % VECTOR == 0 for stride in strides[:3]) and x.data_ptr() % 16 == 0:
        return x
    B, H, L, D = x.shape
    rows = x.new_empty((B, H, L, triton.cdiv(D, VECTOR) * VECTOR))[..., :D]
    return rows.copy_(x)


def with_loadable_rows(x: Tensor) -> Tensor:
    """Returns `x` as kernels of any strides take it; of wide heads, registers do not hold an address an element."""
    return with_whole_rows(x) if x.shape[-1] > WIDE else with_unit_columns(x)


def padded_head(D: int) -> int:
    """Returns the head size of the tiles: the next power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(D)))

"""Attention that keys received, given the LSE: probabilities summed (or the largest) over the queries, no atomics.

A program keeps the keys of a block of positions and walks the queries that see any of them, in two loops: the
blocks of queries that need a look at every element, then those where every query sees every key of the block.
"""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.intervals import MaskRule
from vgpo_kernels.attention.triton.configs import column_tiles
from vgpo_kernels.attention.triton.primitives import (
    CHUNK,
    VECTOR,
    chunked_products,
    load_rows,
    lse_to_subtract,
    padded_head,
    probabilities,
    probability_scales,
    strides_in_units,
    with_loadable_rows,
)
from vgpo_kernels.attention.triton.query_blocks import find_query_blocks

# Programs below which the queries are split among several, and the least blocks of queries each gets.
PROGRAMS = 512
SPLIT_BLOCKS = 8
MERGE = {"BLOCK": 1024, "num_warps": 4}  # results of a program that merges

_RUN_TIME = ["heads", "group", "n_positions", "Lq", "splits", "stride_lb", "stride_lh", "stride_ll"]
_STRIDES = [f"stride_{name}{axis}_units" for name in "qk" for axis in "bhl"]


@triton.jit
def _nan_maximum(a, b):
    return tl.maximum(a, b, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _products(p_q, m_q, b_k, p_k, m_k, D: tl.constexpr, D_PAD: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr):
    """Products [BM, BN] of the queries at pointers [BM], all of them there where `m_q` is None, with the keys."""
    if EXACT:
        m_queries = tl.full(p_q.shape, 1, tl.int1) if m_q is None else m_q
        b_s = chunked_products(p_q, m_queries, p_k, m_k, D, CHUNK)
    else:
        b_s = tl.dot(load_rows(p_q, m_q, D, D_PAD), b_k)
    return b_s


@triton.jit(do_not_specialize=[*_RUN_TIME, *_STRIDES])
def column_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    positions_ptr,
    start_ptr,
    end_ptr,
    entries_ptr,
    counts_ptr,
    column_ptr,
    heads,
    group,
    n_positions,
    Lq,
    splits,
    inner,
    outer,
    stride_qb_units,
    stride_qh_units,
    stride_ql_units,
    stride_kb_units,
    stride_kh_units,
    stride_kl_units,
    stride_lb,
    stride_lh,
    stride_ll,
    D: tl.constexpr,
    D_PAD: tl.constexpr,
    MAX: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
    CHUNK: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns a block of positions of one head, and one of the splits of the queries."""
    n_blocks = tl.cdiv(Lq, BLOCK_M)
    n_lists = tl.cdiv(n_positions, BLOCK_N)
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits % n_lists
    of_head = (tl.program_id(0) // splits // n_lists).to(tl.int64)
    row = of_head // heads
    head = of_head % heads
    of_list = row * n_lists + block
    o_slot = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    p_column = column_ptr + (of_head * splits + split) * n_positions
    n_cut = tl.load(counts_ptr + of_list * 2)
    n_full = tl.load(counts_ptr + of_list * 2 + 1)

    o_d = tl.arange(0, D_PAD)  # [D]
    b_position = tl.load(positions_ptr + row * n_positions + o_slot, mask=o_slot < n_positions, other=-1)  # [BN]
    m_position = b_position >= 0
    p_k = k_ptr + (row * stride_kb_units + head // group * stride_kh_units) * UNIT
    p_k += b_position.to(tl.int64) * stride_kl_units * UNIT  # [BN]
    b_k = None
    if not EXACT:
        m_k = m_position[None, :] & (o_d < D)[:, None]
        b_k = tl.load(p_k[None, :] + o_d[:, None], mask=m_k, other=0.0)  # [D, BN]

    o_m = tl.arange(0, BLOCK_M)  # [BM]
    stride_ql = stride_ql_units.to(tl.int64) * UNIT
    p_q = q_ptr + (row * stride_qb_units + head * stride_qh_units) * UNIT + o_m * stride_ql  # [BM]
    p_lse = lse_ptr + row * stride_lb + head * stride_lh
    # Reduced over the queries of a block at the very end: across threads that is dear.
    b_received = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)  # [BM, BN]

    p_entries = entries_ptr + of_list * 2 * n_blocks
    last = n_cut * (split + 1) // splits
    entry = tl.load(p_entries + n_cut * split // splits, mask=n_cut * split // splits < last, other=0)
    for index in range(n_cut * split // splits, last):
        # Asked for a block ahead, so that the queries do not wait for it.
        next_entry = tl.load(p_entries + index + 1, mask=index + 1 < last, other=0)
        o_query = entry * BLOCK_M + o_m  # [BM]
        b_start = tl.load(start_ptr + row * Lq + o_query, mask=o_query < Lq, other=0)  # [BM]
        b_end = tl.load(end_ptr + row * Lq + o_query, mask=o_query < Lq, other=0)  # [BM]
        b_lse = tl.load(p_lse + o_query.to(tl.int64) * stride_ll, mask=o_query < Lq, other=0.0)  # [BM]
        p_tile = p_q + (entry * BLOCK_M).to(tl.int64) * stride_ql
        b_s = _products(p_tile, o_query < Lq, b_k, p_k, m_position, D, D_PAD, EXACT, CHUNK)  # [BM, BN]
        b_lse = lse_to_subtract(b_lse, EXACT)
        b_p = probabilities(b_s, b_lse[:, None], inner, outer, SOFTCAP, EXACT)  # [BM, BN]
        # One comparison: unsigned, what lies before the start, as empty slots do, is beyond every length.
        b_inside = (b_position[None, :] - b_start[:, None]).to(tl.uint32, bitcast=True)  # [BM, BN]
        b_length = tl.maximum(b_end - b_start, 0).to(tl.uint32, bitcast=True)  # [BM]
        b_p = tl.where(b_inside < b_length[:, None], b_p, 0.0)
        b_received = _nan_maximum(b_received, b_p) if MAX else b_received + b_p
        entry = next_entry

    p_entries += n_blocks
    last = n_full * (split + 1) // splits
    entry = tl.load(p_entries + n_full * split // splits, mask=n_full * split // splits < last, other=0)
    for index in range(n_full * split // splits, last):
        next_entry = tl.load(p_entries + index + 1, mask=index + 1 < last, other=0)
        p_tile = p_q + (entry * BLOCK_M).to(tl.int64) * stride_ql
        b_lse = tl.load(p_lse + (entry * BLOCK_M + o_m).to(tl.int64) * stride_ll)  # [BM]
        b_s = _products(p_tile, None, b_k, p_k, m_position, D, D_PAD, EXACT, CHUNK)  # [BM, BN]
        b_lse = lse_to_subtract(b_lse, EXACT)
        b_p = probabilities(b_s, b_lse[:, None], inner, outer, SOFTCAP, EXACT)  # [BM, BN]
        b_received = _nan_maximum(b_received, b_p) if MAX else b_received + b_p
        entry = next_entry

    if MAX:
        # The largest of a column ignores NaN; the sum of NaN alone brings it back.
        b_nan = tl.where(b_received != b_received, b_received, 0.0)  # [BM, BN]
        b_column = tl.max(b_received, axis=0) + tl.sum(b_nan, axis=0)  # [BN]
    else:
        b_column = tl.sum(b_received, axis=0)
    tl.store(p_column + o_slot, tl.where(m_position, b_column, 0.0), mask=o_slot < n_positions)


@triton.jit(do_not_specialize=["heads", "n_positions", "n", "Lq", "splits", "stride_lb", "stride_lh", "stride_ll"])
def merge_kernel(
    column_ptr,  # (B, Hq, splits, n_positions) fp32
    slots_ptr,  # (B, n) int32, or None: n is n_positions
    lse_ptr,
    start_ptr,  # (B, Lq) int32
    end_ptr,
    received_ptr,  # (B, Hq, n) fp32
    heads,
    n_positions,
    n,
    Lq,
    splits,
    stride_lb,
    stride_lh,
    stride_ll,
    MAX: tl.constexpr,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """A program reduces the splits of a block of one head's results, in their order, and puts keys in their places."""
    n_blocks = tl.cdiv(n, BLOCK)
    of_head = (tl.program_id(0) // n_blocks).to(tl.int64)
    row = of_head // heads
    o_n = tl.program_id(0) % n_blocks * BLOCK + tl.arange(0, BLOCK)  # [B]
    m_n = o_n < n
    b_slot = o_n
    if slots_ptr is not None:
        b_slot = tl.load(slots_ptr + row * n + o_n, mask=m_n, other=-1)  # [B]
    m_slot = m_n & (b_slot >= 0)
    p_column = column_ptr + of_head * splits * n_positions + b_slot  # [B]
    b_received = tl.zeros([BLOCK], tl.float32)
    for _ in range(0, splits):
        b_part = tl.load(p_column, mask=m_slot, other=0.0)
        b_received = _nan_maximum(b_received, b_part) if MAX else b_received + b_part
        p_column += n_positions
    if MEAN:
        b_count = tl.zeros([BLOCK], tl.int32)
        for first in range(0, Lq, BLOCK):
            o_q = first + tl.arange(0, BLOCK)  # [B]
            m_q = o_q < Lq
            b_start = tl.load(start_ptr + row * Lq + o_q, mask=m_q, other=0)
            b_end = tl.load(end_ptr + row * Lq + o_q, mask=m_q, other=0)
            p_lse = lse_ptr + row * stride_lb + of_head % heads * stride_lh + o_q.to(tl.int64) * stride_ll
            b_lse = tl.load(p_lse, mask=m_q, other=float("-inf"))
            b_count += ((b_start < b_end) & (b_lse != float("-inf"))).to(tl.int32)
        b_received = b_received / tl.maximum(tl.sum(b_count, axis=0), 1).to(tl.float32)
    tl.store(received_ptr + of_head * n + o_n, b_received, mask=m_n)


def attention_column_sum(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    positions: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    reduction: str,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Returns (B, Hq, n) fp32, what the keys received; arguments as in the reference, q and k not float64."""
    rule = MaskRule((q.shape[2], k.shape[2]), 0, key_start=key_start, key_end=key_end)
    return columns(q, k, lse, positions, rule, reduction, scale, softcap)


def columns(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    keys: Tensor,
    rule: MaskRule,
    reduction: str,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Returns what `attention_column_sum` does, in three launches.

    Args:
        q, k, lse, reduction, scale, softcap: as there.
        keys: (B, n) positions, or (B, Lk) bool: the result is then (B, Hq, Lk), 0 at keys that are not wanted.
        rule: the mask.
    """
    B, Hq, Lq, D = q.shape
    n = keys.shape[1]
    if B * Hq * n == 0 or Lq == 0:
        return torch.zeros((B, Hq, n), dtype=torch.float32, device=q.device)
    q, k, lse = with_loadable_rows(q), with_loadable_rows(k), lse.float()
    strides = strides_in_units(q=q, k=k)
    tiles = column_tiles(
        target_of(q), q.element_size(), padded_head(D), unit=strides["UNIT"], softcap=softcap is not None
    )
    found = find_query_blocks(keys, rule, tiles["BLOCK_M"], tiles["BLOCK_N"])
    blocks = B * Hq * triton.cdiv(n, tiles["BLOCK_N"])
    splits = _splits(blocks, triton.cdiv(Lq, tiles["BLOCK_M"]))
    parts = torch.empty((B, Hq, splits, n), dtype=torch.float32, device=q.device)
    shared = {
        "lse_ptr": lse,
        "start_ptr": found.key_start,
        "end_ptr": found.key_end,
        "column_ptr": parts,
        "heads": Hq,
        "n_positions": n,
        "Lq": Lq,
        "splits": splits,
        "stride_lb": lse.stride(0),
        "stride_lh": lse.stride(1),
        "stride_ll": lse.stride(2),
        "MAX": reduction == "max",
    }
    column_kernel[(blocks * splits,)](
        q_ptr=q,
        k_ptr=k,
        positions_ptr=found.positions,
        entries_ptr=found.entries,
        counts_ptr=found.counts,
        group=Hq // k.shape[1],
        D=D,
        D_PAD=padded_head(D),
        CHUNK=CHUNK,
        **shared,
        **probability_scales(scale, softcap, q.dtype),
        **strides,
        **tiles,
    )
    if splits == 1 and found.slots is None and reduction != "mean":
        return parts.view(B, Hq, n)
    received = torch.empty((B, Hq, n), dtype=torch.float32, device=q.device)
    merge_kernel[(B * Hq * triton.cdiv(n, MERGE["BLOCK"]),)](
        slots_ptr=found.slots, received_ptr=received, n=n, MEAN=reduction == "mean", **shared, **MERGE
    )
    return received


def _splits(programs: int, blocks: int) -> int:
    """Returns among how many programs the queries are split: by shapes only, so that sums never change their order."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), blocks // SPLIT_BLOCKS))


def compile_cases() -> list[CompileCase]:
    """Returns the kernels: the column one at every dtype and kind of head size, reduction, softcap and stride."""
    return [
        _compile_merge("sum", slots_ptr="*i32"),
        _compile_merge("mean"),
        _compile_merge("max", slots_ptr="*i32"),
        *(_compile_case("bf16", D) for D in (64, 80, 128, 256)),
        _compile_case("bf16", 128, largest=True),
        _compile_case("bf16", 256, softcap=True),
        _compile_case("bf16", 512),
        _compile_case("bf16", 320, largest=True, softcap=True),
        _compile_case("bf16", 80, largest=True, unit=1),
        _compile_case("fp16", 128),
        _compile_case("fp32", 128),
        _compile_case("fp32", 256, largest=True, softcap=True),
    ]


def _compile_case(
    dtype: str, D: int, *, largest: bool = False, softcap: bool = False, unit: int = VECTOR
) -> CompileCase:
    signature = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(("lse_ptr", "column_ptr"), "*fp32") | dict.fromkeys(("inner", "outer"), "fp32")
    signature |= dict.fromkeys(("positions_ptr", "start_ptr", "end_ptr", "entries_ptr", "counts_ptr"), "*i32")
    signature |= dict.fromkeys([*_RUN_TIME, *_STRIDES], "i32")
    constexprs = {"D": D, "D_PAD": padded_head(D), "MAX": largest, "CHUNK": CHUNK, "UNIT": unit}
    constexprs |= {"SOFTCAP": softcap, "EXACT": dtype == "fp32"}
    itemsize = 4 if dtype == "fp32" else 2
    variant = f"{' max' if largest else ''}{'' if unit == VECTOR else ' strided'}{' softcap' if softcap else ''}"
    return CompileCase(
        f"attention column {dtype} D {D}{variant}",
        column_kernel,
        signature,
        constexprs,
        tiles=lambda target: column_tiles(target, itemsize, padded_head(D), unit=unit, softcap=softcap),
    )


def _compile_merge(reduction: str, **slots: str) -> CompileCase:
    signature = dict.fromkeys(("column_ptr", "lse_ptr", "received_ptr"), "*fp32") | slots
    signature |= dict.fromkeys(("start_ptr", "end_ptr"), "*i32")
    signature |= dict.fromkeys(("heads", "n_positions", "n", "Lq", "splits"), "i32")
    signature |= dict.fromkeys(("stride_lb", "stride_lh", "stride_ll"), "i32")
    constexprs = {"MAX": reduction == "max", "MEAN": reduction == "mean"} | ({} if slots else {"slots_ptr": None})
    name = f"attention column merge {reduction}"
    return CompileCase(name, merge_kernel, signature, constexprs, tiles=lambda _: MERGE)

"""Attention that keys received, given the LSE: probabilities summed (or the largest) over the queries, no atomics.

A program keeps the keys of a block of positions and walks the queries that see any of them, in two loops: the
blocks of queries that need a look at every element, then those where every query sees every key of the block.
"""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.kernels.configs import column_tiles
from vgpo_kernels.attention.kernels.shared import (
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

# Query blocks looked at together by the kernels that make the lists.
BOUNDS = 32
LISTED = 256
# Programs below which the queries are split among several, and the least blocks of queries each gets.
PROGRAMS = 512
SPLIT_BLOCKS = 8

_RUN_TIME = ["heads", "group", "n_positions", "Lq", "splits", "stride_lb", "stride_lh", "stride_ll"]
_STRIDES = [f"stride_{name}{axis}_units" for name in "qk" for axis in "bhl"]


@triton.jit(do_not_specialize=["Lq"])
def bounds_kernel(start_ptr, end_ptr, bounds_ptr, Lq, BLOCK_M: tl.constexpr, BOUNDS: tl.constexpr):
    """A program bounds the intervals of BOUNDS query blocks: (B, 4, n) smallest start, largest end, and inner two.

    The first two are those of queries that see a key; a query that sees none, or lies beyond the last, makes the
    inner two (largest start, smallest end) such that no key is seen by the whole block.
    """
    n_blocks = tl.cdiv(Lq, BLOCK_M)
    n_programs = tl.cdiv(n_blocks, BOUNDS)
    row = (tl.program_id(0) // n_programs).to(tl.int64)
    o_b = (tl.program_id(0) % n_programs) * BOUNDS + tl.arange(0, BOUNDS)  # [B]
    o_m = o_b[:, None] * BLOCK_M + tl.arange(0, BLOCK_M)[None, :]  # [B, BM]
    b_start = tl.load(start_ptr + row * Lq + o_m, mask=o_m < Lq, other=0)  # [B, BM]
    b_end = tl.load(end_ptr + row * Lq + o_m, mask=o_m < Lq, other=0)  # [B, BM]
    m_seen = b_start < b_end
    p_bounds = bounds_ptr + row * 4 * n_blocks + o_b
    m_b = o_b < n_blocks
    tl.store(p_bounds, tl.min(tl.where(m_seen, b_start, 2147483647), axis=1), mask=m_b)
    tl.store(p_bounds + n_blocks, tl.max(tl.where(m_seen, b_end, 0), axis=1), mask=m_b)
    tl.store(p_bounds + 2 * n_blocks, tl.max(b_start, axis=1), mask=m_b)
    tl.store(p_bounds + 3 * n_blocks, tl.min(tl.where(m_seen, b_end, 0), axis=1), mask=m_b)


@triton.jit(do_not_specialize=["n_positions", "n_blocks"])
def block_list_kernel(
    positions_ptr,
    bounds_ptr,
    entries_ptr,
    counts_ptr,
    n_positions,
    n_blocks,
    BLOCK_N: tl.constexpr,
    LISTED: tl.constexpr,
):
    """A program lists the query blocks that a block of positions visits: those cut by an interval, and full ones."""
    n_lists = tl.cdiv(n_positions, BLOCK_N)
    program = tl.program_id(0).to(tl.int64)
    row = program // n_lists
    o_n = (tl.program_id(0) % n_lists) * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
    b_position = tl.load(positions_ptr + row * n_positions + o_n, mask=o_n < n_positions, other=-1)  # [BN]
    low = tl.min(tl.where(b_position >= 0, b_position, 2147483647), axis=0)
    high = tl.max(b_position, axis=0)
    p_bounds = bounds_ptr + row * 4 * n_blocks
    p_cut = entries_ptr + program * 2 * n_blocks
    p_full = p_cut + n_blocks
    n_cut = tl.full([], 0, tl.int32)
    n_full = tl.full([], 0, tl.int32)
    # No block is looked at where every slot is empty.
    for start in range(0, tl.where(high >= 0, n_blocks, 0), LISTED):
        o_b = start + tl.arange(0, LISTED)  # [L]
        m_b = o_b < n_blocks
        # Unseen: no interval of the block reaches from the lowest position to the highest.
        b_first = tl.load(p_bounds + o_b, mask=m_b, other=2147483647)  # [L]
        b_last = tl.load(p_bounds + n_blocks + o_b, mask=m_b, other=0)  # [L]
        b_inner_first = tl.load(p_bounds + 2 * n_blocks + o_b, mask=m_b, other=0)  # [L]
        b_inner_last = tl.load(p_bounds + 3 * n_blocks + o_b, mask=m_b, other=0)  # [L]
        m_full = (b_inner_first <= low) & (b_inner_last > high)  # [L]
        m_cut = (b_first <= high) & (b_last > low) & (m_full == 0)  # [L]
        b_full = m_full.to(tl.int32)
        b_cut = m_cut.to(tl.int32)
        tl.store(p_full + n_full + tl.cumsum(b_full, axis=0) - 1, o_b, mask=m_full)
        tl.store(p_cut + n_cut + tl.cumsum(b_cut, axis=0) - 1, o_b, mask=m_cut)
        n_full += tl.sum(b_full, axis=0)
        n_cut += tl.sum(b_cut, axis=0)
    tl.store(counts_ptr + program * 2, n_cut)
    tl.store(counts_ptr + program * 2 + 1, n_full)


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
    B, Hq, Lq, D = q.shape
    n = positions.shape[1]
    if B * Hq * n == 0 or Lq == 0:
        return torch.zeros((B, Hq, n), dtype=torch.float32, device=q.device)
    q, k, lse, positions = with_loadable_rows(q), with_loadable_rows(k), lse.float(), positions.contiguous()
    strides = strides_in_units(q=q, k=k)
    tiles = column_tiles(
        target_of(q), q.element_size(), padded_head(D), unit=strides["UNIT"], softcap=softcap is not None
    )
    entries, counts = _block_lists(positions, key_start, key_end, tiles["BLOCK_M"], tiles["BLOCK_N"])
    blocks = B * Hq * triton.cdiv(n, tiles["BLOCK_N"])
    splits = _splits(blocks, triton.cdiv(Lq, tiles["BLOCK_M"]))
    columns = torch.empty((B, Hq, splits, n), dtype=torch.float32, device=q.device)
    column_kernel[(blocks * splits,)](
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        positions_ptr=positions,
        start_ptr=key_start,
        end_ptr=key_end,
        entries_ptr=entries,
        counts_ptr=counts,
        column_ptr=columns,
        heads=Hq,
        group=Hq // k.shape[1],
        n_positions=n,
        Lq=Lq,
        splits=splits,
        stride_lb=lse.stride(0),
        stride_lh=lse.stride(1),
        stride_ll=lse.stride(2),
        D=D,
        D_PAD=padded_head(D),
        CHUNK=CHUNK,
        MAX=reduction == "max",
        **probability_scales(scale, softcap, q.dtype),
        **strides,
        **tiles,
    )
    received = columns.amax(2) if reduction == "max" else columns.sum(2)
    if reduction == "mean":
        see_any_key = (key_start < key_end)[:, None] & ~lse.isneginf()  # [B, Hq, Lq]
        received /= see_any_key.sum(2).clamp(min=1)[..., None]
    return received


def _block_lists(
    positions: Tensor, key_start: Tensor, key_end: Tensor, BLOCK_M: int, BLOCK_N: int
) -> tuple[Tensor, Tensor]:
    """Returns, for each block of positions, the query blocks cut and full, and how many of each there are."""
    B, n = positions.shape
    Lq = key_start.shape[1]
    n_blocks, n_lists = triton.cdiv(Lq, BLOCK_M), triton.cdiv(n, BLOCK_N)
    empty = {"dtype": torch.int32, "device": positions.device}
    bounds = torch.empty((B, 4, n_blocks), **empty)
    entries = torch.empty((B * n_lists, 2, n_blocks), **empty)
    counts = torch.empty((B * n_lists, 2), **empty)
    bounds_kernel[(B * triton.cdiv(n_blocks, BOUNDS),)](
        start_ptr=key_start,
        end_ptr=key_end,
        bounds_ptr=bounds,
        Lq=Lq,
        BLOCK_M=BLOCK_M,
        BOUNDS=BOUNDS,
        num_warps=4,
    )
    block_list_kernel[(B * n_lists,)](
        positions_ptr=positions,
        bounds_ptr=bounds,
        entries_ptr=entries,
        counts_ptr=counts,
        n_positions=n,
        n_blocks=n_blocks,
        BLOCK_N=BLOCK_N,
        LISTED=LISTED,
        num_warps=4,
    )
    return entries, counts


def _splits(programs: int, blocks: int) -> int:
    """Returns among how many programs the queries are split: by shapes only, so that sums never change their order."""
    return max(1, min(triton.cdiv(PROGRAMS, programs), blocks // SPLIT_BLOCKS))


def compile_cases() -> list[CompileCase]:
    """Returns the kernels: the column one at every dtype and kind of head size, reduction, softcap and stride."""
    bounds = dict.fromkeys(("start_ptr", "end_ptr", "bounds_ptr"), "*i32") | {"Lq": "i32"}
    lists = dict.fromkeys(("positions_ptr", "bounds_ptr", "entries_ptr", "counts_ptr"), "*i32")
    lists |= {"n_positions": "i32", "n_blocks": "i32"}
    options = {"num_warps": 4}
    return [
        CompileCase("attention column bounds", bounds_kernel, bounds, {"BLOCK_M": 64, "BOUNDS": BOUNDS}, options),
        CompileCase("attention column lists", block_list_kernel, lists, {"BLOCK_N": 128, "LISTED": LISTED}, options),
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

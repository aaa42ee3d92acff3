"""Attention mass given the LSE: probabilities summed per segment of keys, from q and k alone.

The queries of a group of heads share a key head, so a program takes rows of (query, head in the group): each key
tile is loaded once for all of them. It walks the tiles that hold wanted keys, in two loops: those that need a look
at every element (an interval cuts them, or keys of several segments lie in them), then those that need none.
"""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tl, triton
from vgpo_kernels.attention.kernels.shared import (
    lse_to_subtract,
    padded_head,
    probabilities,
    probability_scales,
    strides_in_units,
    target_of,
    with_unit_columns,
)
from vgpo_kernels.attention.kernels.tiles import tile_lists

_RUN_TIME = ["kv_heads", "group", "Lq", "Lk", "num_segments", "capacity", "stride_lb", "stride_lh", "stride_ll"]
_STRIDES = [f"stride_{name}{axis}_units" for name in "qk" for axis in "bhl"]


def mass_tiles(D_PAD: int, itemsize: int, target: str) -> dict[str, int]:
    """Returns tiles."""
    if itemsize == 4:
        return {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    return {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}


@triton.jit
def _row_sums(
    b_q,
    p_k,
    m_k,
    b_lse,
    o_n,
    b_start,
    b_end,
    inner,
    outer,
    CUT: tl.constexpr,
    SOFTCAP: tl.constexpr,
    EXACT: tl.constexpr,
):
    """Sums [BM] of the probabilities of one key tile; where `CUT`, of its keys `o_n` [BN] in the rows' intervals."""
    if m_k is None:
        b_k = tl.load(p_k)  # [BN, D]
    else:
        b_k = tl.load(p_k, mask=m_k, other=0.0)
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision="ieee")  # [BM, BN]
    b_p = probabilities(b_s, b_lse[:, None], inner, outer, SOFTCAP, EXACT)  # [BM, BN]
    if CUT:
        b_p = tl.where((o_n[None, :] >= b_start[:, None]) & (o_n[None, :] < b_end[:, None]), b_p, 0.0)
    return tl.sum(b_p, axis=1)


@triton.jit
def _add(b_mass, b_sums, segment, S_BLOCK: tl.constexpr):
    """Adds sums [BM] to the column of a segment in [BM, S]."""
    if S_BLOCK == 1:
        return b_mass + b_sums[:, None]
    return b_mass + tl.where(tl.arange(0, S_BLOCK)[None, :] == segment, b_sums[:, None], 0.0)


@triton.jit(do_not_specialize=[*_RUN_TIME, *_STRIDES])
def mass_kernel(
    q_ptr,
    k_ptr,
    lse_ptr,
    ids_ptr,
    start_ptr,
    end_ptr,
    entries_ptr,
    offsets_ptr,
    mass_ptr,
    kv_heads,
    group,
    Lq,
    Lk,
    num_segments,
    capacity,
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
    S_BLOCK: tl.constexpr,
    SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
    EXACT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """A program owns BLOCK_M rows (query, head in the group) of one key head and one block of segments."""
    n_tiles = tl.cdiv(Lk, BLOCK_N)
    n_rows = tl.cdiv(Lq * group, BLOCK_M)
    n_segments = tl.cdiv(num_segments, S_BLOCK)
    # The last queries first: under a causal mask they have the most keys.
    block = n_rows - 1 - tl.program_id(0) % n_rows
    kv_head = tl.program_id(0) // n_rows % kv_heads
    of_lists = tl.program_id(0) // n_rows // kv_heads  # batch row and block of segments
    row = (of_lists // n_segments).to(tl.int64)
    first_segment = (of_lists % n_segments) * S_BLOCK

    o_r = block * BLOCK_M + tl.arange(0, BLOCK_M)  # [BM]
    o_query = (o_r // group).to(tl.int64)
    o_head = (kv_head * group + o_r % group).to(tl.int64)
    m_r = o_query < Lq
    b_start = tl.load(start_ptr + row * Lq + o_query, mask=m_r, other=0)  # [BM]
    b_end = tl.load(end_ptr + row * Lq + o_query, mask=m_r, other=0)  # [BM]
    m_seen = b_start < b_end
    # Tiles between the first and the last that any row sees, and those that every row sees in full.
    first = tl.min(tl.where(m_seen, b_start, 2147483647), axis=0) // BLOCK_N
    last = tl.cdiv(tl.max(tl.where(m_seen, b_end, 0), axis=0), BLOCK_N)
    first = tl.minimum(first, last)
    first_full = tl.cdiv(tl.max(tl.where(m_seen, b_start, 0), axis=0), BLOCK_N)
    last_full = tl.min(tl.where(m_seen, b_end, 2147483647), axis=0) // BLOCK_N
    first_full = tl.minimum(tl.maximum(first_full, first), last)
    last_full = tl.maximum(tl.minimum(last_full, last), first_full)

    p_mixed = offsets_ptr + of_lists.to(tl.int64) * 2 * (n_tiles + 1)
    p_whole = p_mixed + n_tiles + 1
    mixed = tl.load(p_mixed + first)
    n_mixed = tl.load(p_mixed + last) - mixed
    left = tl.load(p_whole + first)
    full = tl.load(p_whole + first_full)
    right = tl.load(p_whole + last_full)
    n_left = n_mixed + full - left
    n_cut = n_left + tl.load(p_whole + last) - right
    p_entries = entries_ptr + of_lists.to(tl.int64) * (capacity + n_tiles)

    o_d = tl.arange(0, D_PAD)  # [D]
    m_d = o_d < D
    stride_kl = stride_kl_units.to(tl.int64) * UNIT
    p_k = k_ptr + (row * stride_kb_units + kv_head.to(tl.int64) * stride_kh_units) * UNIT
    p_k += tl.arange(0, BLOCK_N)[:, None] * stride_kl + o_d[None, :]  # [BN, D]
    p_q = q_ptr + row * stride_qb_units * UNIT
    p_q += (o_head * stride_qh_units * UNIT + o_query * stride_ql_units * UNIT)[:, None] + o_d[None, :]  # [BM, D]
    p_lse = lse_ptr + row * stride_lb + o_head * stride_lh + o_query * stride_ll  # [BM]
    # A row that sees nothing has probability exp(0 - inf) everywhere, whatever it holds.
    b_q = tl.load(p_q, mask=m_seen[:, None] & m_d[None, :], other=0.0)  # [BM, D]
    b_lse = lse_to_subtract(tl.load(p_lse, mask=m_seen, other=float("inf")), EXACT)  # [BM]
    b_mass = tl.zeros([BLOCK_M, S_BLOCK], tl.float32)  # [BM, S]

    entry = tl.load(p_entries + _cut_entry(0, n_mixed, n_left, mixed, left, right, capacity), mask=n_cut > 0, other=0)
    for index in range(0, n_cut):
        # Asked for a tile ahead, so that the keys do not wait for it.
        place = _cut_entry(index + 1, n_mixed, n_left, mixed, left, right, capacity)
        next_entry = tl.load(p_entries + place, mask=index + 1 < n_cut, other=0)
        segment = entry % S_BLOCK
        o_n = entry // S_BLOCK * BLOCK_N + tl.arange(0, BLOCK_N)  # [BN]
        m_n = o_n < Lk
        b_ids = tl.load(ids_ptr + row * Lk + o_n, mask=m_n, other=-1)  # [BN]
        p_tile = p_k + (entry // S_BLOCK * BLOCK_N).to(tl.int64) * stride_kl
        # A key of another segment stands before every interval.
        o_n = tl.where(b_ids == segment + first_segment, o_n, -1)
        m_k = m_n[:, None] & m_d[None, :]
        b_sums = _row_sums(b_q, p_tile, m_k, b_lse, o_n, b_start, b_end, inner, outer, True, SOFTCAP, EXACT)
        b_mass = _add(b_mass, b_sums, segment, S_BLOCK)
        entry = next_entry

    p_entries += capacity
    m_k = None if D == D_PAD else m_d[None, :]
    entry = tl.load(p_entries + full, mask=full < right, other=0)
    for index in range(full, right):
        next_entry = tl.load(p_entries + index + 1, mask=index + 1 < right, other=0)
        p_tile = p_k + (entry // S_BLOCK * BLOCK_N).to(tl.int64) * stride_kl
        b_sums = _row_sums(b_q, p_tile, m_k, b_lse, None, None, None, inner, outer, False, SOFTCAP, EXACT)
        b_mass = _add(b_mass, b_sums, entry % S_BLOCK, S_BLOCK)
        entry = next_entry

    o_s = first_segment + tl.arange(0, S_BLOCK)  # [S]
    o_row = (row * kv_heads * group + o_head) * Lq + o_query  # [BM]
    p_mass = mass_ptr + o_row[:, None] * num_segments + o_s[None, :]  # [BM, S]
    tl.store(p_mass, b_mass, mask=m_r[:, None] & (o_s < num_segments)[None, :])


@triton.jit
def _cut_entry(index, n_mixed, n_left, mixed, left, right, capacity):
    """Where the entry of the index-th cut tile is: mixed ones, whole ones cut on the left, then on the right."""
    whole = tl.where(index < n_left, left - n_mixed, right - n_left) + capacity
    return index + tl.where(index < n_mixed, mixed, whole)


def attention_mass(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    segment_ids: Tensor,
    key_start: Tensor,
    key_end: Tensor,
    num_segments: int,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Returns the (B, Hq, Lq, S) fp32 masses; arguments as in the reference, q and k not float64."""
    B, Hq, Lq, D = q.shape
    kv_heads, Lk = k.shape[1], k.shape[2]
    mass = torch.empty((B, Hq, Lq, num_segments), dtype=torch.float32, device=q.device)
    if mass.numel() == 0 or Lk == 0:
        return mass.zero_()
    q, k = with_unit_columns(q), with_unit_columns(k)
    tiles = mass_tiles(padded_head(D), q.element_size(), target_of(q))
    s_block = segment_block(num_segments)
    lists = tile_lists(segment_ids.contiguous(), num_segments, s_block, tiles["BLOCK_N"])
    blocks = triton.cdiv(Lq * (Hq // kv_heads), tiles["BLOCK_M"])
    mass_kernel[(len(lists.entries) * kv_heads * blocks,)](
        q_ptr=q,
        k_ptr=k,
        lse_ptr=lse,
        ids_ptr=segment_ids.contiguous(),
        start_ptr=key_start,
        end_ptr=key_end,
        entries_ptr=lists.entries,
        offsets_ptr=lists.offsets,
        mass_ptr=mass,
        kv_heads=kv_heads,
        group=Hq // kv_heads,
        Lq=Lq,
        Lk=Lk,
        num_segments=num_segments,
        capacity=lists.capacity,
        stride_lb=lse.stride(0),
        stride_lh=lse.stride(1),
        stride_ll=lse.stride(2),
        D=D,
        D_PAD=padded_head(D),
        S_BLOCK=s_block,
        **probability_scales(scale, softcap, q.dtype),
        **strides_in_units(q=q, k=k),
        **tiles,
    )
    return mass


def segment_block(num_segments: int) -> int:
    """Returns how many segments a program sums: few sizes, so few compilations; more than 16 go to more programs."""
    return 1 if num_segments == 1 else 4 if num_segments <= 4 else 16


def compile_cases() -> list[CompileCase]:
    return []

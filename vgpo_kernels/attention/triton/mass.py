"""Attention mass given the LSE: probabilities summed per segment of keys, from q and k alone.

The queries of a group of heads share a key head, so a program takes rows of (query, head in the group): each key
tile is loaded once for all of them. It walks the tiles that hold wanted keys, in two loops: those that need a look
at every element (an interval cuts them, or keys of several segments lie in them), then those that need none.
"""

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.triton.block_lists import tile_lists
from vgpo_kernels.attention.triton.configs import mass_tiles
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

_RUN_TIME = ["kv_heads", "group", "Lq", "Lk", "num_segments", "capacity", "stride_lb", "stride_lh", "stride_ll"]
_STRIDES = [f"stride_{name}{axis}_units" for name in "qk" for axis in "bhl"]


@triton.jit
def _products(b_q, p_q, m_q, p_k, m_k, D: tl.constexpr, D_PAD: tl.constexpr, EXACT: tl.constexpr, CHUNK: tl.constexpr):
    """Products [BM, BN] of the rows with the keys at pointers [BN], all of them wanted where `m_k` is None."""
    if EXACT:
        m_keys = tl.full(p_k.shape, 1, tl.int1) if m_k is None else m_k
        b_s = chunked_products(p_q, m_q, p_k, m_keys, D, CHUNK)
    else:
        b_s = tl.dot(b_q, tl.trans(load_rows(p_k, m_k, D, D_PAD)))
    return b_s


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
    CHUNK: tl.constexpr,
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

    stride_kl = stride_kl_units.to(tl.int64) * UNIT
    p_k = k_ptr + (row * stride_kb_units + kv_head.to(tl.int64) * stride_kh_units) * UNIT
    p_k += tl.arange(0, BLOCK_N) * stride_kl  # [BN]
    p_q = q_ptr + (row * stride_qb_units + o_head * stride_qh_units + o_query * stride_ql_units) * UNIT  # [BM]
    p_lse = lse_ptr + row * stride_lb + o_head * stride_lh + o_query * stride_ll  # [BM]
    # A row that sees nothing has probability exp(0 - inf) everywhere, whatever it holds.
    b_q = None if EXACT else load_rows(p_q, m_seen, D, D_PAD)  # [BM, D]
    b_lse = lse_to_subtract(tl.load(p_lse, mask=m_seen, other=float("inf")), EXACT)  # [BM]
    b_length = tl.maximum(b_end - b_start, 0).to(tl.uint32, bitcast=True)  # [BM]
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
        b_s = _products(b_q, p_q, m_seen, p_tile, m_n, D, D_PAD, EXACT, CHUNK)  # [BM, BN]
        b_p = probabilities(b_s, b_lse[:, None], inner, outer, SOFTCAP, EXACT)  # [BM, BN]
        # One comparison: unsigned, what lies before the start is beyond every length.
        b_inside = (o_n[None, :] - b_start[:, None]).to(tl.uint32, bitcast=True)  # [BM, BN]
        b_p = tl.where(b_inside < b_length[:, None], b_p, 0.0)
        b_mass = _add(b_mass, tl.sum(b_p, axis=1), segment, S_BLOCK)
        entry = next_entry

    p_entries += capacity
    entry = tl.load(p_entries + full, mask=full < right, other=0)
    for index in range(full, right):
        next_entry = tl.load(p_entries + index + 1, mask=index + 1 < right, other=0)
        p_tile = p_k + (entry // S_BLOCK * BLOCK_N).to(tl.int64) * stride_kl
        b_s = _products(b_q, p_q, m_seen, p_tile, None, D, D_PAD, EXACT, CHUNK)  # [BM, BN]
        b_p = probabilities(b_s, b_lse[:, None], inner, outer, SOFTCAP, EXACT)  # [BM, BN]
        b_mass = _add(b_mass, tl.sum(b_p, axis=1), entry % S_BLOCK, S_BLOCK)
        entry = next_entry

    # A NaN among the keys that others see is none of a blind row's business.
    b_mass = tl.where((b_lse == float("inf"))[:, None], 0.0, b_mass)
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
    q, k, lse = with_loadable_rows(q), with_loadable_rows(k), lse.float()
    strides = strides_in_units(q=q, k=k)
    tiles = mass_tiles(
        target_of(q), q.element_size(), padded_head(D), unit=strides["UNIT"], softcap=softcap is not None
    )
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
        CHUNK=CHUNK,
        **probability_scales(scale, softcap, q.dtype),
        **strides,
        **tiles,
    )
    return mass


def segment_block(num_segments: int) -> int:
    """Returns how many segments a program sums: few sizes, so few compilations; more than 8 go to more programs."""
    return 1 if num_segments == 1 else 4 if num_segments <= 4 else 8


def compile_cases() -> list[CompileCase]:
    """Returns the kernel at every dtype and kind of head size, number of segments, softcap and stride."""
    return [
        *(_compile_case("bf16", D, 4) for D in (64, 80, 128, 256)),
        *(_compile_case("bf16", 128, segments) for segments in (1, 8)),
        _compile_case("bf16", 256, 8, softcap=True),
        _compile_case("bf16", 512, 4),
        _compile_case("bf16", 320, 8, softcap=True),
        _compile_case("bf16", 80, 8, unit=1),
        _compile_case("fp16", 128, 4),
        _compile_case("fp32", 128, 4),
        _compile_case("fp32", 256, 8, softcap=True),
    ]


def _compile_case(dtype: str, D: int, segments: int, *, softcap: bool = False, unit: int = VECTOR) -> CompileCase:
    signature = {"q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(("lse_ptr", "mass_ptr"), "*fp32") | dict.fromkeys(("inner", "outer"), "fp32")
    signature |= dict.fromkeys(("ids_ptr", "start_ptr", "end_ptr", "entries_ptr", "offsets_ptr"), "*i32")
    signature |= dict.fromkeys([*_RUN_TIME, *_STRIDES], "i32")
    constexprs = {"D": D, "D_PAD": padded_head(D), "S_BLOCK": segments, "CHUNK": CHUNK, "UNIT": unit}
    constexprs |= {"SOFTCAP": softcap, "EXACT": dtype == "fp32"}
    itemsize = 4 if dtype == "fp32" else 2
    variant = f"{'' if unit == VECTOR else ' strided'}{' softcap' if softcap else ''}"
    return CompileCase(
        f"attention mass {dtype} D {D}, {segments} segments{variant}",
        mass_kernel,
        signature,
        constexprs,
        tiles=lambda target: mass_tiles(target, itemsize, padded_head(D), unit=unit, softcap=softcap),
    )

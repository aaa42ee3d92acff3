"""Attention of a few queries against many keys: split over the keys, the parts merged in a fixed order."""

import functools
from typing import Any

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, target_of, tl, triton
from vgpo_kernels.attention.intervals import VISUAL, KeyMask
from vgpo_kernels.attention.triton.configs import split_tiles
from vgpo_kernels.attention.triton.key_blocks import load_tile, products
from vgpo_kernels.attention.triton.primitives import (
    log2_scores,
    padded_head,
    score_scales,
    strides_in_units,
)
from vgpo_kernels.attention.triton.wide_heads import WIDE

STRIDES = tuple(f"stride_{name}{axis}_units" for name in "qkv" for axis in "bhl")
MOST_ROWS, MOST_WIDE_ROWS = 64, 32  # of a program, for heads up to WIDE and above
_VISUAL = tl.constexpr(VISUAL)


def takes(Lq: int, group: int, D: int) -> bool:
    """Whether the queries of a group of heads of size D are so few that they share one tile."""
    return Lq * group <= (MOST_WIDE_ROWS if D > WIDE else MOST_ROWS)


def padded_rows(rows: int) -> int:
    """Returns the rows of a tile that takes `rows` queries: the next power of two that a matrix product takes."""
    return max(16, int(triton.next_power_of_2(rows)))


def merge_tiles(head: int) -> dict[str, int]:
    """Returns the tiles of the merging kernel: BLOCK_P parts are held at once."""
    return {"BLOCK_P": 16, "num_warps": 8 if head > WIDE else 4}


@triton.jit(do_not_specialize=["Hkv", "group", "Lq", "Lk", "n_splits", *STRIDES, "inner", "outer"])
def split_kernel(
    q_ptr,  # (B, Hq, Lq, D)
    k_ptr,  # (B, Hkv, Lk, D)
    v_ptr,  # (B, Hkv, Lk, D)
    kinds_ptr,  # (B, Lk) int8
    start_ptr,  # (B, Lq) int32
    end_ptr,  # (B, Lq) int32
    acc_ptr,  # (B * Hkv, splits, R, D) fp32
    stats_ptr,  # (B * Hkv, splits, 3, R) fp32: largest score, sum, mass
    Hkv,
    group,
    Lq,
    Lk,
    n_splits,
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
    ONE_QUERY: tl.constexpr,
    SOFTCAP: tl.constexpr,
    HEAD: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns one share of the keys of one kv head, for the queries of all its heads: row = query, head."""
    LARGEST: tl.constexpr = 2147483647
    split = tl.program_id(0) % n_splits
    row_head = tl.program_id(0) // n_splits
    row = (row_head // Hkv).to(tl.int64)
    head = (row_head % Hkv).to(tl.int64)
    rows = Lq * group
    o_r = tl.arange(0, BLOCK_R)  # [BR]
    o_n = tl.arange(0, BLOCK_N)  # [BN]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_r = o_r < rows
    m_d = o_d < HEAD
    o_query = o_r // group
    b_start = tl.load(start_ptr + row * Lq + o_query, mask=m_r, other=0)  # [BR]
    b_end = tl.load(end_ptr + row * Lq + o_query, mask=m_r, other=0)  # [BR]
    m_seen = b_start < b_end
    end = tl.max(tl.where(m_seen, b_end, 0), axis=0)
    begin = tl.minimum(tl.min(tl.where(m_seen, b_start, LARGEST), axis=0), end)
    # An even share of the keys that are seen, whatever the buffer's length, in whole tiles.
    tiles = tl.cdiv(tl.cdiv(end - begin, n_splits), BLOCK_N)
    begin += split * tiles * BLOCK_N
    tiles = tl.minimum(tiles, tl.cdiv(tl.maximum(end - begin, 0), BLOCK_N))

    stride_kl = stride_kl_units.to(tl.int64) * UNIT
    stride_vl = stride_vl_units.to(tl.int64) * UNIT
    p_q = q_ptr + (row * stride_qb_units + head * group * stride_qh_units) * UNIT
    o_q = o_query.to(tl.int64) * stride_ql_units + (o_r % group).to(tl.int64) * stride_qh_units  # [BR]
    p_rows = p_q + o_q * UNIT  # [BR]
    b_q = load_tile(p_rows[:, None] + o_d[None, :], m_seen, m_d, True, HEAD < BLOCK_D)  # [BR, BD]
    p_k = k_ptr + (row * stride_kb_units + head * stride_kh_units) * UNIT
    p_v = v_ptr + (row * stride_vb_units + head * stride_vh_units) * UNIT
    o_k = o_n.to(tl.int64)[:, None] * stride_kl + o_d[None, :]  # [BN, BD]
    o_v = o_n.to(tl.int64)[:, None] * stride_vl + o_d[None, :]  # [BN, BD]
    b_acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    b_max = tl.full([BLOCK_R], -float("inf"), tl.float32)
    b_sum = tl.zeros([BLOCK_R], tl.float32)
    b_mass = tl.zeros([BLOCK_R], tl.float32)
    for tile in range(0, tiles):
        first = begin + tile * BLOCK_N
        b_kind = tl.load(kinds_ptr + row * Lk + first + o_n, mask=first + o_n < end, other=0)  # [BN]
        # Keys that no query sees may hold anything.
        if ONE_QUERY:
            # A share lies within the one interval: no mask by rows is needed.
            m_n = b_kind != 0  # [BN]
            m_visible = m_n[None, :]  # [1, BN]
        else:
            o_key = first + o_n[None, :]  # [1, BN]
            m_visible = (b_start[:, None] <= o_key) & (o_key < b_end[:, None]) & (b_kind != 0)[None, :]  # [BR, BN]
            m_n = tl.max(m_visible.to(tl.int32), axis=0) != 0  # [BN]
        b_k = load_tile(p_k + first.to(tl.int64) * stride_kl + o_k, m_n, m_d, True, HEAD < BLOCK_D)  # [BN, BD]
        b_v = load_tile(p_v + first.to(tl.int64) * stride_vl + o_v, m_n, m_d, True, HEAD < BLOCK_D)  # [BN, BD]
        p_keys = p_k + (first + o_n).to(tl.int64) * stride_kl  # [BN]
        b_s = tl.zeros([BLOCK_R, BLOCK_N], tl.float32)  # [BR, BN]
        b_s = log2_scores(products(b_q, p_rows, m_seen, b_k, p_keys, m_n, b_s, HEAD), inner, outer, SOFTCAP)
        b_s = tl.where(m_visible, b_s, -float("inf"))
        b_larger = tl.maximum(b_max, tl.max(b_s, axis=1))  # [BR]
        # Queries that have seen no key yet subtract 0: two infinities would make NaN.
        b_shift = tl.where(b_larger == -float("inf"), 0.0, b_larger)
        b_p = tl.exp2(b_s - b_shift[:, None])  # [BR, BN]
        b_rescale = tl.exp2(b_max - b_shift)  # [BR]
        b_max = b_larger
        b_weight = (b_kind == _VISUAL).to(tl.float32)  # [BN]
        b_sum = b_sum * b_rescale + tl.sum(b_p, axis=1)
        b_mass = b_mass * b_rescale + tl.sum(b_p * b_weight[None, :], axis=1)
        b_acc = tl.dot(b_p.to(b_v.dtype), b_v, b_acc * b_rescale[:, None], input_precision="ieee")

    part = tl.program_id(0).to(tl.int64) * rows
    p_acc = acc_ptr + (part + o_r)[:, None] * HEAD + o_d[None, :]
    tl.store(p_acc, b_acc, mask=m_r[:, None] & m_d[None, :])
    p_stats = stats_ptr + part * 3 + o_r
    tl.store(p_stats, b_max, mask=m_r)
    tl.store(p_stats + rows, b_sum, mask=m_r)
    tl.store(p_stats + 2 * rows, b_mass, mask=m_r)


@triton.jit(do_not_specialize=["group", "Lq", "n_splits"])
def merge_kernel(
    acc_ptr,  # (B * Hkv, splits, R, D) fp32
    stats_ptr,  # (B * Hkv, splits, 3, R) fp32
    out_ptr,  # (B, Hq, Lq, D) contiguous
    mass_ptr,  # (B, Hq, Lq) fp32 contiguous, or None
    lse_ptr,  # (B, Hq, Lq) fp32 contiguous
    group,
    Lq,
    n_splits,
    HEAD: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """A program owns a query of one head and adds up its parts, in their order."""
    query = tl.program_id(0) % Lq
    row_head = tl.program_id(0) // Lq
    rows = Lq * group
    first = (row_head // group).to(tl.int64) * n_splits
    own = query * group + row_head % group
    o_p = tl.arange(0, BLOCK_P)  # [BP]
    o_d = tl.arange(0, BLOCK_D)  # [BD]
    m_d = o_d < HEAD
    b_acc = tl.zeros([BLOCK_D], tl.float32)
    largest = tl.full([], -float("inf"), tl.float32)
    total = tl.zeros([], tl.float32)
    mass = tl.zeros([], tl.float32)
    for begin in range(0, n_splits, BLOCK_P):
        m_p = begin + o_p < n_splits
        part = first + begin + o_p  # [BP]
        p_stats = stats_ptr + part * 3 * rows + own
        b_max = tl.load(p_stats, mask=m_p, other=-float("inf"))  # [BP]
        larger = tl.maximum(largest, tl.max(b_max, axis=0))
        shift = tl.where(larger == -float("inf"), 0.0, larger)
        b_scale = tl.exp2(b_max - shift)  # [BP]
        rescale = tl.exp2(largest - shift)
        largest = larger
        total = total * rescale + tl.sum(b_scale * tl.load(p_stats + rows, mask=m_p, other=0.0), axis=0)
        mass = mass * rescale + tl.sum(b_scale * tl.load(p_stats + 2 * rows, mask=m_p, other=0.0), axis=0)
        p_acc = acc_ptr + (part * rows + own)[:, None] * HEAD + o_d[None, :]
        b_part = load_tile(p_acc, m_p, m_d, True, HEAD < BLOCK_D)  # [BP, BD]
        b_acc = b_acc * rescale + tl.sum(b_part * b_scale[:, None], axis=0)
    # The sum is tested, not the maximum, which ignores NaN: NaN that a query sees must reach the output.
    seen = total != 0.0
    total = tl.where(seen, total, 1.0)
    b_out = tl.where(seen, b_acc / total, 0.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + tl.program_id(0).to(tl.int64) * HEAD + o_d, b_out, mask=m_d)
    lse = (largest + tl.log2(total)) * 0.6931471805599453
    tl.store(lse_ptr + tl.program_id(0), tl.where(seen, lse, -float("inf")))
    if mass_ptr is not None:
        tl.store(mass_ptr + tl.program_id(0), tl.where(seen, mass / total, 0.0))


def split_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: KeyMask,
    scale: float,
    softcap: float | None,
    with_mass: bool,
) -> tuple[Tensor, Tensor | None, Tensor]:
    """Returns what `visual_attention` does, for queries that `takes` accepts."""
    B, Hq, Lq, D = q.shape
    Hkv, Lk = k.shape[1:3]
    group, head = Hq // Hkv, padded_head(D)
    rows, block = Lq * group, padded_rows(Lq * group)
    out = q.new_empty(q.shape)
    lse = q.new_empty((B, Hq, Lq), dtype=torch.float32)
    mass = torch.empty_like(lse) if with_mass else None
    strides = strides_in_units(q=q, k=k, v=v)
    tiles = split_tiles(target_of(q), q.element_size(), head, block, strides["UNIT"])
    n_splits = splits(B * Hkv, Lk, tiles["BLOCK_N"], _processors(q.device))
    acc = q.new_empty((B * Hkv, n_splits, rows, D), dtype=torch.float32)
    stats = q.new_empty((B * Hkv, n_splits, 3, rows), dtype=torch.float32)
    split_kernel[(B * Hkv * n_splits,)](
        q_ptr=q,
        k_ptr=k,
        v_ptr=v,
        kinds_ptr=mask.kinds.contiguous(),
        start_ptr=mask.start.contiguous(),
        end_ptr=mask.end.contiguous(),
        acc_ptr=acc,
        stats_ptr=stats,
        Hkv=Hkv,
        group=group,
        Lq=Lq,
        Lk=Lk,
        n_splits=n_splits,
        ONE_QUERY=Lq == 1,
        HEAD=D,
        BLOCK_R=block,
        BLOCK_D=head,
        **strides,
        **score_scales(scale, softcap),
        **tiles,
    )
    merge_kernel[(B * Hq * Lq,)](
        acc_ptr=acc,
        stats_ptr=stats,
        out_ptr=out,
        mass_ptr=mass,
        lse_ptr=lse,
        group=group,
        Lq=Lq,
        n_splits=n_splits,
        HEAD=D,
        BLOCK_D=head,
        **merge_tiles(head),
    )
    return out, mass, lse


def splits(row_heads: int, Lk: int, block: int, processors: int) -> int:
    """Returns the shares of the keys, of at least a tile each: all programs run at once, two a processor."""
    return max(1, min(2 * processors // max(1, row_heads), triton.cdiv(Lk, block)))


@functools.cache
def _processors(device: torch.device) -> int:
    # Interpreted, any number will do; an H100 has this one.
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 132


def compile_cases() -> list[CompileCase]:
    """Returns the splitting kernel at the head sizes and types in use, and the merging one."""
    return [
        _compile_split("bf16", 64, 4),
        _compile_split("bf16", 128, 7),
        _compile_split("bf16", 128, 64, queries=8),
        _compile_split("bf16", 256, 8, softcap=True),
        _compile_split("fp16", 80, 32, queries=4, unit=1),
        _compile_split("fp32", 128, 4),
        _compile_split("bf16", 512, 8),
        _compile_split("bf16", 320, 32, queries=4, softcap=True),
        _compile_split("fp32", 256, 64, queries=8),
        _compile_split("fp32", 512, 32, queries=4),
        _compile_merge("bf16", 128),
        _compile_merge("fp32", 256),
        _compile_merge("bf16", 320),
    ]


def _compile_split(
    dtype: str, D: int, rows: int, queries: int = 1, softcap: bool = False, unit: int = 8
) -> CompileCase:
    head, block, itemsize = padded_head(D), padded_rows(rows), 4 if dtype == "fp32" else 2
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr"), f"*{dtype}") | {"kinds_ptr": "*i8"}
    signature |= dict.fromkeys(("start_ptr", "end_ptr"), "*i32") | dict.fromkeys(("acc_ptr", "stats_ptr"), "*fp32")
    signature |= dict.fromkeys(("Hkv", "group", "Lq", "Lk", "n_splits", *STRIDES), "i32")
    signature |= {"inner": "fp32", "outer": "fp32"}
    constexprs: dict[str, Any] = {"SOFTCAP": softcap, "HEAD": D, "UNIT": unit, "BLOCK_R": block, "BLOCK_D": head}
    constexprs["ONE_QUERY"] = queries == 1
    variant = f"{dtype} D {D} rows {rows}{' softcap' * softcap}{' any strides' * (unit == 1)}"
    return CompileCase(
        f"attention split {variant}",
        split_kernel,
        signature,
        constexprs,
        tiles=lambda target: split_tiles(target, itemsize, head, block, unit),
    )


def _compile_merge(dtype: str, D: int) -> CompileCase:
    signature = dict.fromkeys(("acc_ptr", "stats_ptr", "mass_ptr", "lse_ptr"), "*fp32") | {"out_ptr": f"*{dtype}"}
    signature |= dict.fromkeys(("group", "Lq", "n_splits"), "i32")
    head = padded_head(D)
    constexprs = {"HEAD": D, "BLOCK_D": head}
    return CompileCase(
        f"attention merge {dtype} D {D}", merge_kernel, signature, constexprs, tiles=lambda _: merge_tiles(head)
    )

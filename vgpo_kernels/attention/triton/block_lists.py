"""Lists of the key tiles that hold wanted keys, made on the device: no other tile is ever loaded."""

from typing import NamedTuple

import torch
from torch import Tensor

from vgpo_kernels._triton import CompileCase, tl, triton

# Key tiles looked at together: 16 of 64 keys are 4 ids a thread.
TILES = 16
# With 4 warps the compiler of sm_90 spills (Triton 3.8).
WARPS = 8


class TileLists(NamedTuple):
    """For each batch row and block of segments, its tiles in order: the mixed ones, then the whole ones.

    An entry is tile * S_BLOCK + segment within the block. A whole tile has all its keys in one segment; a mixed tile
    has one entry for each segment of the block that it holds a key of.

    Args:
        entries: (P, capacity + n_tiles) int32; mixed from 0 on, whole from `capacity` on.
        offsets: (P, 2, n_tiles + 1) int32: how many mixed (whole) entries come before each tile.
        capacity: mixed entries there is room for.
    """

    entries: Tensor
    offsets: Tensor
    capacity: int


@triton.jit(do_not_specialize=["Lk", "num_segments", "capacity"])
def tile_list_kernel(
    ids_ptr,
    entries_ptr,
    offsets_ptr,
    Lk,
    num_segments,
    capacity,
    S_BLOCK: tl.constexpr,
    BLOCK_N: tl.constexpr,
    TILES: tl.constexpr,
):
    """A program makes both lists of one batch row and one block of segments."""
    n_tiles = tl.cdiv(Lk, BLOCK_N)
    n_blocks = tl.cdiv(num_segments, S_BLOCK)
    program = tl.program_id(0).to(tl.int64)
    first = (tl.program_id(0) % n_blocks) * S_BLOCK
    segments = tl.minimum(num_segments - first, S_BLOCK)
    p_ids = ids_ptr + (program // n_blocks) * Lk
    p_mixed = entries_ptr + program * (capacity + n_tiles)
    p_whole = p_mixed + capacity
    p_before = offsets_ptr + program * 2 * (n_tiles + 1)
    mixed_so_far = tl.full([], 0, tl.int32)
    whole_so_far = tl.full([], 0, tl.int32)
    for start in range(0, n_tiles, TILES):
        o_t = start + tl.arange(0, TILES)  # [T]
        o_n = o_t[:, None] * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]  # [T, BN]
        b_ids = tl.load(p_ids + o_n, mask=o_n < Lk, other=-1) - first  # [T, BN]
        b_segment = tl.max(b_ids, axis=1)  # [T]
        m_whole = (tl.min(b_ids, axis=1) == b_segment) & (b_segment >= 0) & (b_segment < segments)  # [T]
        b_count = tl.zeros([TILES], tl.int32)  # [T]
        for segment in range(0, segments):
            b_count += tl.max((b_ids == segment).to(tl.int32), axis=1)
        b_whole = m_whole.to(tl.int32)  # [T]
        b_count -= b_whole
        b_mixed_before = mixed_so_far + tl.cumsum(b_count, axis=0) - b_count  # [T]
        b_whole_before = whole_so_far + tl.cumsum(b_whole, axis=0) - b_whole  # [T]
        tl.store(p_before + o_t, b_mixed_before, mask=o_t < n_tiles)
        tl.store(p_before + n_tiles + 1 + o_t, b_whole_before, mask=o_t < n_tiles)
        tl.store(p_whole + b_whole_before, o_t * S_BLOCK + b_segment, mask=m_whole)
        b_place = b_mixed_before  # [T]
        for segment in range(0, segments):
            b_held = tl.where(m_whole, 0, tl.max((b_ids == segment).to(tl.int32), axis=1))  # [T]
            tl.store(p_mixed + b_place, o_t * S_BLOCK + segment, mask=b_held != 0)
            b_place += b_held
        mixed_so_far += tl.sum(b_count, axis=0)
        whole_so_far += tl.sum(b_whole, axis=0)
    tl.store(p_before + n_tiles, mixed_so_far)
    tl.store(p_before + 2 * n_tiles + 1, whole_so_far)


def tile_lists(segment_ids: Tensor, num_segments: int, S_BLOCK: int, BLOCK_N: int) -> TileLists:
    """Returns the lists of (B, Lk) int32 segment ids; nothing waits for the device."""
    B, Lk = segment_ids.shape
    n_tiles = triton.cdiv(Lk, BLOCK_N)
    programs = B * triton.cdiv(num_segments, S_BLOCK)
    capacity = n_tiles * min(S_BLOCK, num_segments)
    entries = torch.empty((programs, capacity + n_tiles), dtype=torch.int32, device=segment_ids.device)
    offsets = torch.empty((programs, 2, n_tiles + 1), dtype=torch.int32, device=segment_ids.device)
    tile_list_kernel[(programs,)](
        ids_ptr=segment_ids,
        entries_ptr=entries,
        offsets_ptr=offsets,
        Lk=Lk,
        num_segments=num_segments,
        capacity=capacity,
        S_BLOCK=S_BLOCK,
        BLOCK_N=BLOCK_N,
        TILES=TILES,
        num_warps=WARPS,
    )
    return TileLists(entries, offsets, capacity)


def compile_cases() -> list[CompileCase]:
    """Returns the list kernel for one segment, a few, and blocks of many, with the tiles of the mass kernel."""
    signature = {"ids_ptr": "*i32", "entries_ptr": "*i32", "offsets_ptr": "*i32"}
    signature |= dict.fromkeys(("Lk", "num_segments", "capacity"), "i32")
    return [
        CompileCase(
            f"attention tiles of {size} keys, {segments} segments",
            tile_list_kernel,
            signature,
            {"S_BLOCK": segments, "BLOCK_N": size, "TILES": TILES},
            {"num_warps": WARPS},
        )
        for segments, size in ((1, 64), (4, 64), (8, 32))
    ]

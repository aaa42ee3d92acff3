"""Tiles for heads of more than 256 elements, padded to 512: whole rows are held, so there are few of them.

One choice a kernel and target, made by registers and shared memory, as in `configs`; none has been timed.
"""

from vgpo_kernels._tuning import Tiles

# Heads padded to more than this take the tiles of this file.
WIDE = 256


def mass_tiles(target: str) -> Tiles:
    """Returns the tiles of the mass in half precision: keys twice in shared memory beside the queries."""
    if target == "gfx942":
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 2}
    tiles = {"BLOCK_M": 32 if target == "sm_120" else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return tiles | {"maxnreg": 168} if target == "sm_100" else tiles


def column_tiles(target: str) -> Tiles:
    """Returns the tiles of the column sum in half precision: queries twice in shared memory beside the keys."""
    if target == "gfx942":
        return {"BLOCK_M": 32, "BLOCK_N": 16, "num_warps": 4, "num_stages": 1}
    tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    return tiles | {"maxnreg": 168} if target == "sm_100" else tiles


def forward_tiles(target: str, itemsize: int) -> Tiles:
    """Returns the tiles of the forward: 32 queries, whose accumulator takes 64 registers a thread."""
    # Eight warps spill with a soft-cap and Triton 3.6 on gfx942.
    warps = 4 if itemsize == 2 and target == "gfx942" else 8
    tiles = {"BLOCK_M": 32, "BLOCK_N": 16, "CUT_N": 16, "num_warps": warps}
    tiles["num_stages"] = 1 if itemsize == 4 or target == "gfx942" else 2
    # Without `maxnreg` the compiler of sm_100 spills rather than take more than 128 registers.
    return tiles | {"maxnreg": 255} if itemsize == 4 and target == "sm_100" else tiles


def dkdv_tiles(target: str, itemsize: int) -> Tiles:
    """Returns the tiles of dK and dV, each made by a launch of its own."""
    keys, warps = 16 if itemsize == 4 else 32, 8
    if target == "gfx942":  # masks live in scalar registers, of which there are few
        keys, warps = 16, 16 if itemsize == 4 else 4
    tiles = {"BLOCK_M": 16, "CUT_M": 16, "BLOCK_N": keys, "num_warps": warps, "num_stages": 1}
    # Without `maxnreg` the compiler of Triton 3.6 spills on sm_80 rather than take more than 128 registers.
    return tiles | {"maxnreg": 255} if itemsize == 4 and target == "sm_80" else tiles


def dq_tiles(target: str, itemsize: int) -> Tiles:
    """Returns the tiles of dQ: fewer queries in single precision, whose products are unrolled."""
    queries = 16 if itemsize == 4 else 32
    warps = 4 if itemsize == 2 and target == "gfx942" else 8
    return {"BLOCK_M": queries, "BLOCK_N": 16, "CUT_N": 16, "num_warps": warps, "num_stages": 1}


def split_tiles(target: str, itemsize: int, BLOCK_R: int) -> Tiles:
    """Returns the tiles of at most 32 rows of queries: two tiles of keys and values in flight where they fit."""
    small = itemsize == 4 or BLOCK_R > 16 or target == "gfx942"
    if small:
        return {"BLOCK_N": 16, "num_warps": 8, "num_stages": 1}
    # Without `maxnreg` the compiler of Triton 3.8 spills rather than take more than 128 registers.
    return {"BLOCK_N": 32, "num_warps": 8, "num_stages": 2, "maxnreg": 255}

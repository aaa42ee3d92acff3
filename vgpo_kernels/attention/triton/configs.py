"""Tiles: one choice a kernel and target, its reason, and the candidates worth timing against it.

Choices were made by registers and shared memory; none has been timed yet. Candidates are for half precision, heads of
128 and no soft-cap, and compile without a spill; `benchmarks/tune.py` times them.
"""

from vgpo_kernels._tuning import Tiles, listed, tunable
from vgpo_kernels.attention.triton import wide_heads
from vgpo_kernels.attention.triton.wide_heads import WIDE

_MASS = "BLOCK_M BLOCK_N num_warps num_stages maxnreg"
_FORWARD = "BLOCK_M BLOCK_N CUT_N num_warps num_stages maxnreg"
_KEYS = "BLOCK_M CUT_M BLOCK_N num_warps num_stages maxnreg"
_SPLIT = "BLOCK_N num_warps num_stages"


@tunable(
    "attention mass",
    case="attention mass bf16 D 128, 1 segments",
    candidates={
        "sm_80": listed(
            _MASS,
            (128, 64, 8, 2, None),
            (128, 64, 4, 3, None),
            (128, 128, 8, 2, None),
            (64, 64, 4, 3, None),
            (128, 32, 8, 4, None),
        ),
        "sm_90": listed(
            _MASS,
            (128, 64, 8, 3, None),
            (128, 64, 4, 3, None),
            (128, 128, 8, 2, None),
            (64, 64, 4, 3, None),
            (64, 64, 4, 4, 128),
            (64, 128, 8, 3, 128),
        ),
        "sm_100": listed(
            _MASS,
            (128, 64, 8, 4, 168),
            (128, 64, 4, 3, 255),
            (128, 128, 4, 3, 255),
            (64, 64, 4, 3, 168),
        ),
        "sm_120": listed(
            _MASS,
            (128, 64, 8, 2, None),
            (64, 64, 4, 3, None),
            (64, 64, 8, 3, None),
            (128, 32, 8, 3, None),
        ),
        "gfx942": listed(
            _MASS,
            (128, 64, 4, 2, None),
            (128, 32, 8, 2, None),
            (64, 64, 4, 2, None),
            (128, 64, 8, 1, None),
        ),
    },
)
def mass_tiles(target: str, itemsize: int, head: int, *, unit: int, softcap: bool) -> Tiles:
    """Returns the tiles for heads padded to `head`: BLOCK_M rows stay, tiles of BLOCK_N keys pass by."""
    if head > WIDE and itemsize == 2:
        return wide_heads.mass_tiles(target)
    amd = target == "gfx942"
    if itemsize == 4:
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8 if target == "sm_100" else 4, "num_stages": 2}
    elif unit == 1:  # an address an element
        tiles = {"BLOCK_M": 32 if amd else 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    else:
        small = softcap or (head > 128 and target != "sm_90")
        keys = 32 if amd and softcap and head > 128 else 64
        stages = 2 if amd else 3
        tiles = {"BLOCK_M": 64 if small else 128, "BLOCK_N": keys, "num_warps": 8, "num_stages": stages}
        if target == "sm_90" and head <= 128 and not small:
            # Room for two programs on a multiprocessor: one's exp hides behind the other's product. Without
            # `maxnreg` the compiler of Triton 3.9 takes 140 registers; held to 128 with three stages, it spills.
            tiles |= {"num_stages": 4, "maxnreg": 128}
    # Without `maxnreg` the compiler of sm_100 spills rather than take more than 128 registers.
    return tiles | {"maxnreg": 255} if target == "sm_100" else tiles


@tunable(
    "attention column",
    case="attention column bf16 D 128",
    candidates={
        "sm_80": listed(
            _MASS,
            (64, 128, 8, 2, None),
            (64, 64, 4, 3, None),
            (32, 128, 8, 3, None),
            (64, 128, 8, 4, None),
        ),
        "sm_90": listed(
            _MASS,
            (64, 128, 8, 3, None),
            (64, 128, 8, 2, 128),
            (64, 128, 8, 4, 128),
            (64, 64, 4, 3, None),
            (128, 128, 8, 2, None),
            (128, 64, 8, 2, None),
        ),
        "sm_100": listed(
            _MASS,
            (64, 128, 8, 2, 168),
            (128, 128, 8, 2, 255),
            (128, 64, 8, 3, 168),
            (64, 64, 4, 3, 168),
        ),
        "sm_120": listed(
            _MASS,
            (64, 128, 8, 2, None),
            (64, 64, 4, 3, None),
            (32, 128, 8, 3, None),
            (64, 64, 8, 3, None),
        ),
        "gfx942": listed(
            _MASS,
            (32, 64, 4, 2, None),
            (64, 64, 8, 2, None),
            (64, 64, 4, 1, None),
            (32, 64, 8, 2, None),
        ),
    },
)
def column_tiles(target: str, itemsize: int, head: int, *, unit: int, softcap: bool) -> Tiles:
    """Returns the tiles for heads padded to `head`: BLOCK_N positions stay, blocks of BLOCK_M queries pass by."""
    if head > WIDE and itemsize == 2:
        return wide_heads.column_tiles(target)
    amd = target == "gfx942"
    small = softcap or head > 128
    if amd and softcap and head > 128:
        tiles = {"BLOCK_M": 32, "BLOCK_N": 32, "num_warps": 4 if itemsize == 2 else 8, "num_stages": 2}
    elif itemsize == 4:
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    elif unit == 1:  # an address an element
        tiles = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    elif amd:
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 2}
    else:
        tiles = {"BLOCK_M": 64, "BLOCK_N": 64 if small else 128, "num_warps": 8, "num_stages": 3}
        if target == "sm_90" and head <= 128:
            # Two programs share a multiprocessor: one's exp hides behind the other's product.
            tiles["maxnreg"] = 128
    # Without `maxnreg` the compiler of sm_100 spills rather than take more than 128 registers.
    return tiles | {"maxnreg": 255 if itemsize == 4 else 168} if target == "sm_100" else tiles


@tunable(
    "attention forward",
    case="attention forward bf16 D 128",
    candidates={
        "sm_80": listed(
            _FORWARD,
            (128, 64, 64, 8, 2, None),
            (64, 32, 32, 4, 3, None),
            (64, 64, 32, 4, 2, None),
            (128, 64, 32, 8, 3, None),
            (128, 32, 32, 8, 4, None),
        ),
        "sm_90": listed(
            _FORWARD,
            (128, 128, 64, 8, 2, None),
            (128, 128, 32, 8, 2, None),
            (128, 64, 64, 8, 2, None),
            (64, 64, 32, 4, 2, None),
            (64, 64, 32, 4, 3, None),
            (128, 128, 64, 8, 3, None),
        ),
        "sm_100": listed(
            _FORWARD,
            (128, 64, 32, 8, 2, None),
            (128, 64, 32, 8, 3, None),
            (128, 128, 64, 8, 2, None),
            (64, 64, 32, 4, 2, None),
        ),
        "sm_120": listed(
            _FORWARD,
            (128, 32, 32, 8, 2, None),
            (64, 64, 32, 8, 2, None),
            (64, 64, 32, 4, 2, None),
            (64, 32, 32, 4, 2, None),
        ),
        "gfx942": listed(
            _FORWARD,
            (64, 32, 16, 4, 1, None),
            (64, 64, 16, 8, 1, None),
            (128, 32, 32, 8, 1, None),
            (128, 32, 16, 4, 1, None),
        ),
    },
)
def forward_tiles(target: str, itemsize: int, head: int) -> Tiles:
    """Returns the tiles for heads padded to `head`.

    Two warp groups of 64 queries each (on sm_90 a program each, so that one's softmax hides behind the other's
    products); fewer keys where an interval cuts: masks take registers. Products in fp32 are unrolled: tiles are small.
    """
    if head > WIDE:
        return wide_heads.forward_tiles(target, itemsize)
    if itemsize == 4:
        tiles = {"BLOCK_M": 32, "BLOCK_N": 16, "CUT_N": 16, "num_warps": 4 if head <= 128 else 8, "num_stages": 1}
        # Without `maxnreg` their compiler spills rather than take more than 128 registers.
        return tiles | {"maxnreg": 255} if target in ("sm_100", "sm_120") else tiles
    queries, keys, cut, warps = 128, 128, 64, 8
    if target == "gfx942":  # masks live in scalar registers, of which there are few
        queries, keys, cut = {64: (128, 64, 16), 128: (128, 32, 16)}.get(max(head, 64), (64, 16, 16))
    elif target == "sm_90" and head <= 128:
        queries, keys, warps = 64, 128 if head <= 64 else 64, 4
    elif head > 128:
        queries, keys, cut = {"sm_90": (128, 64, 32), "sm_120": (64, 32, 32)}.get(target, (64, 64, 32))
    elif target in ("sm_80", "sm_120") or (target == "sm_100" and head == 128):
        keys, cut = 64, 32
    stages = 1 if target == "gfx942" else 2
    return {"BLOCK_M": queries, "BLOCK_N": keys, "CUT_N": cut, "num_warps": warps, "num_stages": stages}


@tunable(
    "attention dkdv",
    case="attention dkdv bf16 D 128",
    candidates={
        "sm_80": listed(
            _KEYS,
            (32, 32, 64, 8, 2, None),
            (32, 32, 64, 8, 3, None),
            (64, 32, 64, 8, 1, None),
            (16, 16, 128, 8, 2, None),
        ),
        "sm_90": listed(
            _KEYS,
            (32, 32, 128, 8, 3, None),
            (32, 16, 128, 8, 2, None),
            (16, 16, 128, 8, 2, None),
            (32, 32, 64, 8, 2, None),
            (32, 32, 64, 8, 3, None),
        ),
        "sm_100": listed(
            _KEYS,
            (32, 32, 64, 8, 3, None),
            (32, 32, 64, 8, 1, None),
            (32, 16, 64, 8, 2, None),
            (64, 32, 64, 8, 2, None),
            (64, 64, 64, 8, 2, 255),
        ),
        "sm_120": listed(
            _KEYS,
            (16, 16, 64, 8, 2, None),
            (32, 32, 64, 8, 1, None),
            (16, 16, 64, 4, 2, None),
            (64, 32, 64, 8, 1, None),
        ),
        "gfx942": listed(
            _KEYS,
            (16, 16, 64, 4, 1, None),
            (16, 16, 32, 8, 1, None),
            (16, 16, 128, 8, 1, None),
            (16, 16, 32, 4, 1, None),
        ),
    },
)
def dkdv_tiles(target: str, itemsize: int, head: int) -> Tiles:
    """Returns the tiles of the kernel of dK and dV for heads padded to `head`.

    A block of 64 keys a warp group; its accumulators stay in registers, which bounds the tile of queries beside them.
    Single precision unrolls its products, so its tiles are small.
    """
    if head > WIDE:
        return wide_heads.dkdv_tiles(target, itemsize)
    if itemsize == 4:
        keys, warps = 16 if head <= 64 else 32, 4 if head <= 64 and target != "sm_80" else 8
        return {"BLOCK_M": 16, "CUT_M": 16, "BLOCK_N": keys, "num_warps": warps, "num_stages": 1}
    keys, queries, cut, stages = (128, 64, 64, 2) if head <= 64 else (128, 32, 32, 2)
    if target == "gfx942":  # masks live in scalar registers, of which there are few
        keys, queries, cut, stages = (64, 32, 16, 1) if head <= 64 else (64 if head <= 128 else 32, 16, 16, 1)
    elif target == "sm_120":
        keys, queries, cut = (64, 32, 32) if head <= 128 else (32, 16, 16)
    elif target == "sm_100" and head > 64:  # accumulators live in tensor memory, but pass through registers
        keys, stages = 64, 2 if head <= 128 else 1
    elif target == "sm_80":
        keys, queries, cut = {64: (128, 32, 32), 128: (64, 64, 32)}.get(max(head, 64), (64, 32, 32))
    return {"BLOCK_M": queries, "CUT_M": cut, "BLOCK_N": keys, "num_warps": 8, "num_stages": stages}


@tunable(
    "attention dq",
    case="attention dq bf16 D 128",
    candidates={
        "sm_80": listed(
            _FORWARD,
            (128, 32, 32, 8, 2, None),
            (64, 64, 32, 4, 2, None),
            (64, 32, 32, 4, 3, None),
            (64, 64, 32, 8, 2, None),
        ),
        "sm_90": listed(
            _FORWARD,
            (128, 64, 32, 8, 2, None),
            (128, 64, 64, 8, 2, None),
            (128, 64, 32, 8, 3, None),
            (128, 32, 32, 8, 3, None),
            (64, 64, 32, 4, 3, None),
        ),
        "sm_100": listed(
            _FORWARD,
            (128, 64, 32, 8, 3, None),
            (128, 64, 64, 8, 2, None),
            (128, 32, 32, 8, 2, None),
            (64, 64, 32, 4, 2, None),
        ),
        "sm_120": listed(
            _FORWARD,
            (64, 32, 32, 4, 2, None),
            (64, 64, 32, 8, 1, None),
            (128, 32, 32, 8, 1, None),
            (64, 32, 32, 8, 1, None),
        ),
        "gfx942": listed(
            _FORWARD,
            (64, 16, 16, 4, 1, None),
            (64, 32, 16, 8, 1, None),
            (32, 32, 16, 4, 1, None),
            (128, 16, 16, 8, 1, None),
        ),
    },
)
def dq_tiles(target: str, itemsize: int, head: int) -> Tiles:
    """Returns the tiles of the kernel of dQ: as forward, with narrower tiles of keys for its two maps of scores.

    CUT_N divides the BLOCK_N of dK and dV, to which the keys are padded.
    """
    if head > WIDE:
        return wide_heads.dq_tiles(target, itemsize)
    if itemsize == 4:
        few = target in ("sm_80", "sm_90") and head <= 64
        tiles = {"BLOCK_M": 32, "BLOCK_N": 16, "CUT_N": 16, "num_warps": 4 if few else 8, "num_stages": 1}
        # Without `maxnreg` the compiler of sm_90 spills rather than take more than 128 registers.
        return tiles | {"maxnreg": 255} if few and target == "sm_90" else tiles
    queries, keys, cut, stages = (128, 64, 32, 2) if head <= 128 else (64, 32, 32, 2)
    warps = 8
    if target == "gfx942":  # masks live in scalar registers, of which there are few
        queries, keys, cut, stages = 64, 32 if head <= 64 else 16, 16, 1
    elif target == "sm_120":
        queries, keys = (64, 32) if head <= 128 else (32, 32)
    elif target == "sm_90":
        queries, warps = (64, 4) if head <= 128 else (128, 8)
    elif target == "sm_80" and 64 < head <= 128:  # a wider tile of keys takes every register there is
        keys = 32
    return {"BLOCK_M": queries, "BLOCK_N": keys, "CUT_N": cut, "num_warps": warps, "num_stages": stages}


@tunable(
    "attention preprocess",
    case="attention preprocess bf16 D 128",
    candidates=dict.fromkeys(
        ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942"),
        listed("BLOCK_M num_warps", (8, 4), (8, 2), (16, 2), (32, 4), (32, 8)),
    ),
)
def preprocess_tiles() -> Tiles:
    """Returns the tiles of the backward's constants, a divisor of PADDED_TILE.

    A few rows a warp: nothing is used twice, and loads of D 128 in half precision are 256 bytes a row.
    """
    return {"BLOCK_M": 16, "num_warps": 4}


@tunable(
    "attention split",
    case="attention split bf16 D 128 rows 7",
    candidates={
        "sm_80": listed(_SPLIT, (64, 4, 3), (64, 4, 2), (32, 4, 4), (128, 8, 2)),
        "sm_90": listed(_SPLIT, (64, 4, 3), (32, 4, 4), (128, 8, 2), (128, 8, 3)),
        "sm_100": listed(_SPLIT, (64, 4, 3), (32, 4, 4), (128, 8, 2), (128, 8, 3)),
        "sm_120": listed(_SPLIT, (32, 4, 3), (32, 8, 2), (64, 4, 2), (32, 4, 4)),
        "gfx942": listed(_SPLIT, (16, 4, 1), (32, 4, 1), (32, 8, 1), (32, 8, 2)),
    },
)
def split_tiles(target: str, itemsize: int, head: int, BLOCK_R: int, unit: int) -> Tiles:
    """Returns the tiles of keys for few queries, padded to BLOCK_R, of heads padded to `head`.

    The keys stream once, so what counts is bytes in flight: three tiles of 64 keys where they fit. Single precision
    unrolls its products, rows off 16 bytes have an address for each element, and masks on AMD live in scalar registers,
    so their tiles are small.
    """
    if head > WIDE:
        return wide_heads.split_tiles(target, itemsize, BLOCK_R)
    keys, warps, stages = 64, 8, 3
    if itemsize == 4:
        keys, warps, stages = 16, 4 if BLOCK_R == 16 else 8, 1
    elif unit == 1 or target == "gfx942":
        keys, stages = 16, 1
    elif target == "sm_120":
        keys, warps, stages = 32, 4 if BLOCK_R == 16 else 8, 2
    elif target == "sm_80" and BLOCK_R == 64:
        keys = 32
    tiles = {"BLOCK_N": keys, "num_warps": warps, "num_stages": stages}
    # Without `maxnreg` the compiler of sm_100 spills; within 128 registers two programs share a multiprocessor.
    if target == "sm_100" and (itemsize == 4 or (keys == 64 and BLOCK_R == 16 and head <= 128)):
        tiles["maxnreg"] = 255 if itemsize == 4 else 128
    return tiles

"""The room's tiles: one choice a kernel and target, its reason, and the candidates worth timing against it.

Choices were made by registers and shared memory; none has been timed yet. Candidates are for half precision, rows of
150,000 logits and no soft-cap, and compile without a spill; `benchmarks/tune.py` times them.
"""

from vgpo_kernels._tuning import Tiles, listed, tunable

# Rows longer than this many bytes are walked by as many threads as there may be.
LONG_ROW = 32768

_LINEAR = "BLOCK_M BLOCK_N BLOCK_K num_warps num_stages"


@tunable(
    "linear logprobs",
    case="linear logprobs bf16 entropy",
    candidates={
        "sm_80": listed(_LINEAR, (128, 128, 32, 8, 4), (128, 128, 32, 4, 4), (128, 64, 64, 4, 3), (256, 64, 64, 8, 3)),
        "sm_90": listed(
            _LINEAR,
            (256, 128, 64, 8, 3),
            (256, 128, 32, 8, 4),
            (256, 64, 64, 8, 4),
            (128, 128, 64, 8, 4),
            (128, 128, 128, 8, 3),
            (64, 256, 64, 8, 4),
        ),
        "sm_100": listed(
            _LINEAR,
            (128, 128, 128, 8, 3),
            (128, 128, 64, 8, 6),
            (128, 128, 64, 8, 3),
            (256, 64, 64, 8, 4),
            (128, 64, 64, 8, 4),
        ),
        "sm_120": listed(_LINEAR, (128, 128, 32, 8, 4), (128, 64, 64, 8, 3), (128, 64, 64, 4, 3), (64, 128, 64, 4, 3)),
        "gfx942": listed(_LINEAR, (128, 128, 32, 8, 2), (128, 64, 32, 4, 2), (128, 64, 64, 4, 2), (128, 128, 64, 4, 2)),
    },
)
def linear_tiles(itemsize: int, target: str, *, unit: int, softcap: bool) -> Tiles:
    """Returns the tiles of a target: BLOCK_M tokens by BLOCK_N of the vocabulary, BLOCK_K of the width at a time.

    On sm_90 the product is 256 by 128: with as many elements the other way around, a row's maximum keeps too many
    registers busy, and smaller ones want more of the second-level cache than it gives.
    """
    # tanh takes registers beside the logits: of vectors on sm_100, of scalars, where masks live, on AMD.
    words = {"gfx942": 16, "sm_100": 64}.get(target, 128) if softcap else 128
    if itemsize == 4 or unit == 1:  # products without tensor cores, or an address an element
        columns = 16 if unit == 1 else 32
        tiles = {"BLOCK_M": 64, "BLOCK_N": min(words, 64), "BLOCK_K": columns, "num_warps": 8, "num_stages": 2}
        # Left alone, ptxas spills rather than take more than 128 registers.
        return tiles if target == "gfx942" else tiles | {"maxnreg": 255}
    rows = 256 if target == "sm_90" else 128
    # On sm_120 a wider step leaves no register beside its fragments.
    columns, stages = {"sm_80": (64, 3), "sm_120": (32, 4), "gfx942": (64, 2)}.get(target, (64, 4))
    return {"BLOCK_M": rows, "BLOCK_N": words, "BLOCK_K": columns, "num_warps": 8, "num_stages": stages}


def _rows(threads: int, vectors: int, target: str) -> Tiles:
    """Returns tiles of `vectors` vectors a thread."""
    return {"R": threads * vectors, "num_warps": threads // (64 if target == "gfx942" else 32)}


def _row_candidates(*threads_and_vectors: tuple[int, int]) -> dict[str, tuple[Tiles, ...]]:
    targets = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")
    return {target: tuple(_rows(*counts, target) for counts in threads_and_vectors) for target in targets}


def _row_threads(vocabulary: int, itemsize: int, softcap: bool) -> int:
    """Returns the threads a row: 1024 for a long one, so that few rows share the L2 cache.

    With a soft-cap half as many: on sm_80, tanh takes more than the 64 registers that 1024 threads have each.
    """
    return (512 if softcap else 1024) if vocabulary * itemsize > LONG_ROW else 128


@tunable(
    "logits", case="logits loss bf16", candidates=_row_candidates((512, 2), (512, 1), (1024, 1), (256, 2), (256, 4))
)
def logits_tiles(vocabulary: int, itemsize: int, target: str, *, softcap: bool) -> Tiles:
    """Returns tiles of two vectors a thread: as many bytes in flight as the registers of 1024 threads hold."""
    return _rows(_row_threads(vocabulary, itemsize, softcap), 2, target)


def divergence_tiles(vocabulary: int, itemsize: int, target: str, *, softcap: bool) -> Tiles:
    """Returns tiles of one vector a thread of either row."""
    return _rows(_row_threads(vocabulary, itemsize, softcap), 1, target)

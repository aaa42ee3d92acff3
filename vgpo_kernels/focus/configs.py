"""The room's tiles, the same for every target: their reasons, and the candidates worth timing against them.

Choices were made by registers; none has been timed yet. Candidates are for half precision and one prototype a row, and
compile without a spill; `benchmarks/tune.py` times them.
"""

from vgpo_kernels._tuning import Tiles, listed, tunable

# Elements in the widest load, 16 bytes at two bytes an element.
VECTOR = 8

_TARGETS = ("sm_80", "sm_90", "sm_100", "sm_120", "gfx942")


@tunable(
    "focus prototype",
    case="focus prototype bf16",
    candidates=dict.fromkeys(
        _TARGETS,
        listed(
            "BLOCK_SEARCH BLOCK_L BLOCK_D num_warps",
            (2048, 64, 64, 4),
            (2048, 64, 64, 8),
            (2048, 64, 128, 4),
            (2048, 128, 32, 4),
            (2048, 256, 64, 8),
        ),
    ),
)
def prototype_tiles(unit: int, itemsize: int) -> Tiles:
    """Returns the first kernel's tiles: 64 columns fill a cache line at two bytes an element.

    A tile of 16 KiB (8 rows of D 3584 make 448 programs) keeps enough bytes in flight; longer ones spill.
    Without whole units each element has its own address, so the tile is shorter.
    """
    length = 256 // itemsize if unit == VECTOR else 32
    return {"BLOCK_SEARCH": 2048, "BLOCK_L": length, "BLOCK_D": 64, "num_warps": 4}


def cosine_spread(unit: int, target: str) -> int:
    """Returns 1 where the mean is read for every token: not where that spills (sm_120) or takes a load a column."""
    return int(unit == VECTOR and target != "sm_120")


def _cosine_candidates(target: str) -> tuple[Tiles, ...]:
    spread = cosine_spread(VECTOR, target)
    rows = ((4, 256, 4), (4, 512, 4), (16, 256, 8), (8, 512, 8), (4, 256, 2))
    return tuple({**tiles, "SPREAD": spread} for tiles in listed("BLOCK_T BLOCK_D num_warps", *rows))


@tunable(
    "focus cosine",
    case="focus cosine bf16",
    candidates={target: _cosine_candidates(target) for target in _TARGETS},
)
def cosine_tiles(grouped: bool, unit: int, target: str) -> Tiles:
    """Returns the second kernel's tiles: 256 divides the usual D; more tokens with the loop over prototypes spill."""
    block = 4 if grouped else 8
    return {"BLOCK_T": block, "BLOCK_D": 256, "SPREAD": cosine_spread(unit, target), "num_warps": 4}

"""The room's tiles, their reasons, and the candidates worth timing against them.

Choices were made by registers; none has been timed yet. Candidates compile without a spill; `benchmarks/tune.py` times
them.
"""

from vgpo_kernels._tuning import Tiles, listed, tunable


def _candidates(*blocks_and_warps: tuple[int, int]) -> dict[str, tuple[Tiles, ...]]:
    bounded = listed("BLOCK num_warps maxnreg", *((*pair, 128) for pair in blocks_and_warps))
    return dict.fromkeys(("sm_80", "sm_90", "sm_100", "sm_120"), bounded) | {
        "gfx942": listed("BLOCK num_warps", *blocks_and_warps)
    }


def _bounded(tiles: Tiles, target: str) -> Tiles:
    # Left alone, ptxas spills a register or two of the token kernel to fit one more block on a processor.
    return tiles if target == "gfx942" else tiles | {"maxnreg": 128}


@tunable(
    "weights token",
    case="weights_token[balanced]",
    candidates=_candidates((256, 4), (512, 8), (1024, 4), (1024, 8)),
)
def token_tiles(target: str) -> Tiles:
    """Returns the tile of tokens that a program walks its trajectory in."""
    return _bounded({"BLOCK": 512, "num_warps": 4}, target)


@tunable(
    "weights group", case="weights_group[balanced]", candidates=_candidates((128, 4), (256, 1), (256, 8), (512, 4))
)
def group_tiles(target: str) -> Tiles:
    """Returns the tile of trajectories that a program looks for its group in."""
    return _bounded({"BLOCK": 256, "num_warps": 4}, target)

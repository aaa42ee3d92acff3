"""The weights on CPUs: csrc/weights/."""

import functools

import torch
from torch import Tensor

from vgpo_kernels import _native
from vgpo_kernels.weights.config import SCHEDULES, VGPOConfig

__all__ = ["weights"]

# In the order of csrc/weights/groups.h.
_CLAMPINGS = ("none", "cut", "project")


def weights(
    focus: Tensor,
    completion_mask: Tensor,
    group_ids: Tensor,
    has_visual: Tensor,
    advantages: Tensor | None,
    config: VGPOConfig,
    source: str,
    warmup: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns token weights (B, T), trajectory weights (B,), normalized (B, T), gate (B, T), score (B,).

    The score of a row with a focus that is not finite is NaN; other results are then of no meaning.
    """
    token = torch.empty(focus.shape, dtype=torch.float32)
    trajectory, normalized, score = token.new_empty(len(token)), torch.empty_like(token), token.new_empty(len(token))
    gate = torch.empty(focus.shape, dtype=torch.bool)
    _native.call(
        "weights",
        token,
        trajectory,
        normalized,
        gate,
        score,
        focus,
        completion_mask if completion_mask.dtype in (torch.bool, torch.uint8) else completion_mask != 0,
        group_ids.to(torch.int64),
        has_visual,
        None if advantages is None else advantages < 0,
        _options(config, source),
        warmup,
    )
    return token, trajectory, normalized, gate, score


@functools.lru_cache(maxsize=64)
def _options(config: VGPOConfig, source: str) -> Tensor:
    """Returns what csrc/weights/tokens.h reads of `config`: (20,) float64, not to be changed."""
    values = (
        SCHEDULES.index(config.schedule),
        config.beta,
        config.exponent,
        config.step_position,
        config.tail_start,
        config.gated_share,
        config.negative_strength,
        source != "attention",
        config.compensation,
        config.gate,
        config.intra,
        config.inter,
        config.trajectory_score.startswith("normalized"),
        config.trajectory_score.endswith("mean"),
        *_bounds(config.token_clamp, config.preserve_mean),
        *_bounds(config.trajectory_clamp, config.preserve_mean),
    )
    return torch.tensor(values, dtype=torch.float64, device="cpu")


def _bounds(clamp: tuple[float, float] | None, preserve_mean: bool) -> tuple[float, float, float]:
    low, high = clamp or (1.0, 1.0)
    how = "none" if clamp is None else "project" if preserve_mean else "cut"
    return _CLAMPINGS.index(how), low, high

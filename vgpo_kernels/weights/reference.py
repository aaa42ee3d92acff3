"""The weights in plain torch: the specification that the kernels are tested against.

Elementwise work is in the dtype of the scores (at least float32); sums over tokens and over trajectories
are in float64, so that neither the order of rows nor padding shows in the results.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from vgpo_kernels.weights.config import VGPOConfig

# Trajectory scores this close (relative) differ by float32's rounding only, and count as equal.
SCORE_RESOLUTION = 2.0**-22
PROJECTION_ROUNDS = 52


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
    """Returns token weights (B, T), trajectory weights (B,), normalized (B, T), gate (B, T), score (B,)."""
    valid = completion_mask != 0  # (B, T)
    takes_part = torch.ones_like(has_visual)
    if config.corners == "neutral":
        valid = valid & has_visual[:, None]
        takes_part = valid.any(1)
    raw = focus.to(torch.promote_types(focus.dtype, torch.float32))
    raw = torch.where(valid & has_visual[:, None], raw, 0.0)

    gate = _gate(raw, valid, config)
    compensated = _rho(raw, config, source) * (1 + gate * _lift(valid, raw.dtype, config))
    normalized = _row_minmax(compensated, valid)
    if config.corners == "neutral":
        normalized = torch.where(_is_constant(raw, valid), 0.0, normalized)

    strength = _strength(advantages, has_visual, config, warmup)
    token = _centred(normalized, lambda x: _row_mean(x, valid), config.token_clamp, config.preserve_mean)
    token = torch.where(valid, _scaled(token, strength[:, None]), 1.0)

    score = _score(compensated, normalized, valid, config)
    trajectory = torch.where(takes_part, _scaled(_grouped(score, group_ids, takes_part, config), strength), 1.0)
    return (
        token if config.intra else torch.ones_like(token),
        trajectory.to(token.dtype) if config.inter else token.new_ones(token.shape[0]),
        normalized,
        gate,
        score.to(token.dtype),
    )


def _rho(raw: Tensor, config: VGPOConfig, source: str) -> Tensor:
    """The focus score rho (B, T) from cosines or attention mass; `raw` is 0 at padding."""
    if source == "attention":
        return raw
    if config.focus_scale == "affine":
        return (raw + 1) * 0.5
    low, high = raw.min(), raw.max()
    return torch.where(high > low, (raw - low) / (high - low), 0.0)


def _gate(raw: Tensor, valid: Tensor, config: VGPOConfig) -> Tensor:
    """Which tokens are compensated, (B, T) bool: the top kappa of a row's tail, ties in.

    rho grows with the raw score, so the raw scores are ranked: rounding adds no ties to them.
    """
    if not config.compensation:
        return torch.zeros_like(valid)
    if not config.gate:
        return valid
    count = valid.sum(1, keepdim=True)  # (B, 1)
    head = (count.double() * config.tail_start).long()
    tail = valid & (valid.cumsum(1) > head)
    top = ((count - head).double() * config.gated_share).long().clamp(min=1)
    ordered = raw.masked_fill(~tail, -torch.inf).sort(dim=1, descending=True).values
    return tail & (raw >= ordered.gather(1, top - 1))


def _lift(valid: Tensor, dtype: torch.dtype, config: VGPOConfig) -> Tensor:
    """beta * s(p), (B, T), with a token's position p counted over the valid tokens of its row."""
    rank = valid.cumsum(1).double()  # t = 1..T_i
    count = rank[:, -1:]
    if config.position == "one_based":
        position = rank / count.clamp(min=1)
    else:
        position = (rank - 1).clamp(min=0) / (count - 1).clamp(min=1)
    if config.schedule == "exponential":
        position = position**config.exponent
    elif config.schedule == "step":
        position = (position >= config.step_position).double()
    return (config.beta * position).to(dtype)


def _row_minmax(x: Tensor, valid: Tensor) -> Tensor:
    """x (B, T) mapped to [0, 1] over the valid tokens of each row; 0 in constant rows and at padding."""
    low = x.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return torch.where(valid & (high > low), (x - low) / (high - low), 0.0)


def _is_constant(x: Tensor, valid: Tensor) -> Tensor:
    """Whether the valid scores of a row are all the same, (B, 1)."""
    low = x.masked_fill(~valid, torch.inf).amin(1, keepdim=True)
    high = x.masked_fill(~valid, -torch.inf).amax(1, keepdim=True)
    return high <= low


def _row_mean(x: Tensor, valid: Tensor) -> Tensor:
    """Mean over the valid tokens of each row, (B, 1) float64."""
    count = valid.sum(1, keepdim=True).clamp(min=1)
    return torch.where(valid, x, 0.0).sum(1, keepdim=True, dtype=torch.float64) / count


def _centred(
    normalized: Tensor,
    mean: Callable[[Tensor], Tensor],
    clamp: tuple[float, float] | None,
    preserve_mean: bool,
) -> Tensor:
    """1 + normalized - mean(normalized), within the clamp."""
    factor = 1 + (normalized - mean(normalized).to(normalized.dtype))
    if clamp is None:
        return factor
    low, high = clamp
    if not preserve_mean:
        return factor.clamp(low, high)
    clipped = mean(((factor < low) | (factor > high)).double()) > 0
    shift = torch.where(clipped, _projection_shift(factor.double(), low, high, mean), 0.0)
    return (factor + shift).clamp(low, high).to(normalized.dtype)


def _projection_shift(factor: Tensor, low: float, high: float, mean: Callable[[Tensor], Tensor]) -> Tensor:
    """The shift with mean(clamp(factor + shift)) = 1: the nearest factors of mean 1 within the bounds.

    Factors lie in [0, 2], so that the mean is `low` at the shift low - 2 and `high` at the shift `high`.
    """
    below = torch.full_like(mean(factor), low - 2.0)
    above = torch.full_like(below, high)
    for _ in range(PROJECTION_ROUNDS):
        middle = (below + above) * 0.5
        short = mean((factor + middle).clamp(low, high)) < 1.0
        below, above = torch.where(short, middle, below), torch.where(short, above, middle)
    return (below + above) * 0.5


def _strength(advantages: Tensor | None, has_visual: Tensor, config: VGPOConfig, warmup: float) -> Tensor:
    """How much of a row's factors is applied, (B,) float64, by step and sign of the advantage."""
    strength = torch.full_like(has_visual, warmup, dtype=torch.float64)
    if advantages is None:
        return strength
    return torch.where(advantages < 0, strength * config.negative_strength, strength)


def _scaled(factor: Tensor, strength: Tensor) -> Tensor:
    return torch.where(strength == 1.0, factor, 1 + strength.to(factor.dtype) * (factor - 1))


def _score(compensated: Tensor, normalized: Tensor, valid: Tensor, config: VGPOConfig) -> Tensor:
    """A trajectory's score, (B,) float64; 0 where no token is valid."""
    scored = normalized if config.trajectory_score.startswith("normalized") else compensated
    mean = _row_mean(scored, valid)[:, 0]
    return mean if config.trajectory_score.endswith("mean") else mean * valid.sum(1)


def _grouped(score: Tensor, group_ids: Tensor, takes_part: Tensor, config: VGPOConfig) -> Tensor:
    """1 + phi (B,) float64 from the scores (B,) float64 of each group's rows but those left out."""
    if config.grouping == "ids":
        group = torch.unique(group_ids, return_inverse=True)[1]  # (B,)
    else:
        starts = torch.ones_like(group_ids, dtype=torch.int64)
        starts[1:] = group_ids[1:] != group_ids[:-1]
        group = starts.cumsum(0) - 1

    def over_group(x: Tensor, how: str, outside: float) -> Tensor:
        empty = x.new_full(x.shape, outside)
        return empty.scatter_reduce(0, group, torch.where(takes_part, x, outside), how)[group]

    members = over_group(torch.ones_like(score), "sum", 0.0).clamp(min=1.0)
    low, high = over_group(score, "amin", torch.inf), over_group(score, "amax", -torch.inf)
    differ = takes_part & (high - low > SCORE_RESOLUTION * torch.maximum(low.abs(), high.abs()))
    normalized = torch.where(differ, (score - low) / (high - low), 0.0)
    return _centred(
        normalized,
        lambda x: over_group(x, "sum", 0.0) / members,
        config.trajectory_clamp,
        config.preserve_mean,
    )

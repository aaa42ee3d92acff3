"""Triton kernel of the trajectory weights: a program a trajectory scans the scores of its group."""

from typing import Any

from vgpo_kernels._triton import tl, triton
from vgpo_kernels._tuning import Tiles, tunable
from vgpo_kernels.weights import reference
from vgpo_kernels.weights.config import VGPOConfig
from vgpo_kernels.weights.triton.tokens import (
    PROJECTION_ROUNDS,
    bounded,
    candidates,
    clamp_options,
    row_strength,
    scaled,
)

_RESOLUTION = tl.constexpr(reference.SCORE_RESOLUTION)


@triton.jit
def _load_members(p_score, p_group, o_b, batch, stride_group, group):
    """One tile of rows: which are in the group, and their scores (0 elsewhere)."""
    inside = o_b < batch
    b_group = tl.load(p_group + o_b.to(tl.int64) * stride_group, mask=inside, other=0).to(tl.int64)
    b_score = tl.load(p_score + o_b, mask=inside, other=float("inf"))
    m_member = inside & (b_group == group) & (tl.abs(b_score) < float("inf"))
    return m_member, tl.where(m_member, b_score, 0.0)


@triton.jit
def _projection_shift(
    p_score,
    p_group,
    batch,
    stride_group,
    group,
    members,
    low,
    span,
    differ,
    mean,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shift that brings the clamped factors of a group back to mean 1; 0 where none is clamped."""
    offsets = tl.arange(0, BLOCK)
    shift = tl.full([], 0.0, tl.float64)
    if differ & ((1.0 - mean < LOW) | (2.0 - mean > HIGH)):
        below = tl.full([], LOW - 2.0, tl.float64)
        above = tl.full([], HIGH, tl.float64)
        for _ in range(PROJECTION_ROUNDS):
            middle = (below + above) * 0.5
            b_sum = tl.full([BLOCK], 0, tl.float64)
            for start in range(0, batch, BLOCK):
                m_member, b_score = _load_members(p_score, p_group, start + offsets, batch, stride_group, group)
                b_x = 1.0 + ((b_score - low) / span - mean) + middle
                b_sum += tl.where(m_member, tl.minimum(tl.maximum(b_x, LOW), HIGH), 0.0)
            short = tl.sum(b_sum, 0) < members.to(tl.float64)
            below = tl.where(short, middle, below)
            above = tl.where(short, above, middle)
        shift = (below + above) * 0.5
    return shift


@triton.jit(do_not_specialize=["batch", "stride_group", "stride_advantage"])
def weights_group_kernel(
    group_score_ptr,
    group_ptr,
    advantage_ptr,
    trajectory_ptr,
    batch,
    stride_group,
    stride_advantage,
    strength,
    SIGNED: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0)
    o_row = row.to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    group = tl.load(group_ptr + o_row * stride_group).to(tl.int64)
    own = tl.load(group_score_ptr + o_row)

    members = 0
    low = tl.full([], float("inf"), tl.float64)
    high = tl.full([], float("-inf"), tl.float64)
    b_total = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, batch, BLOCK):
        m_member, b_score = _load_members(group_score_ptr, group_ptr, start + offsets, batch, stride_group, group)
        members += tl.sum(m_member.to(tl.int32), 0)
        low = tl.minimum(low, tl.min(tl.where(m_member, b_score, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(m_member, b_score, float("-inf")), 0))
        b_total += b_score
    takes_part = tl.abs(own) < float("inf")
    low = tl.where(takes_part, low, 0.0)
    high = tl.where(takes_part, high, 0.0)
    # A constant in front would make the product a constant in the interpreter of Triton 3.8.
    differ = high - low > tl.maximum(tl.abs(low), tl.abs(high)) * _RESOLUTION
    span = tl.where(differ, high - low, 1.0)
    mean = (tl.sum(b_total, 0) / tl.maximum(members, 1).to(tl.float64) - low) / span

    factor = 1.0 + ((tl.where(takes_part, own, low) - low) / span - mean)
    if CLAMP == "project":
        factor += _projection_shift(
            group_score_ptr,
            group_ptr,
            batch,
            stride_group,
            group,
            members,
            low,
            span,
            differ,
            mean,
            LOW,
            HIGH,
            BLOCK,
        )
    if CLAMP != "none":
        factor = tl.minimum(tl.maximum(factor, LOW), HIGH)

    strength = row_strength(advantage_ptr, o_row, stride_advantage, strength, NEGATIVE, SIGNED)
    factor = tl.where(differ, scaled(factor, strength.to(tl.float64)), 1.0)
    factor = tl.where(own != own, float("nan"), factor)
    tl.store(trajectory_ptr + o_row, factor.to(tl.float32))


@tunable("weights group", case="weights_group[balanced]", candidates=candidates((128, 4), (256, 1), (256, 8), (512, 4)))
def group_tiles(target: str) -> Tiles:
    """Returns the tile of trajectories that a program looks for its group in, chosen by registers, not timed."""
    return bounded({"BLOCK": 256, "num_warps": 4}, target)


def group_options(config: VGPOConfig, signed: bool) -> dict[str, Any]:
    """Returns the group kernel's compile-time arguments."""
    return {
        "SIGNED": signed,
        "NEGATIVE": float(config.negative_strength),
        **clamp_options(config.trajectory_clamp, config.preserve_mean),
    }

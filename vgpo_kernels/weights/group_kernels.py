"""Triton kernel of the trajectory weights: a program a trajectory scans the scores of its group."""

from vgpo_kernels._triton import tl, triton
from vgpo_kernels.weights import reference
from vgpo_kernels.weights.token_kernels import PROJECTION_ROUNDS, row_strength, scaled

_RESOLUTION = tl.constexpr(reference.SCORE_RESOLUTION)


@triton.jit
def _load_members(p_score, p_group, o_b, batch, stride_group, group, first, last):
    """One tile of rows: which take part in the group, and their scores (0 elsewhere)."""
    inside = o_b < batch
    b_group = tl.load(p_group + o_b.to(tl.int64) * stride_group, mask=inside, other=0).to(tl.int64)
    b_score = tl.load(p_score + o_b, mask=inside, other=float("inf"))
    m_member = inside & (b_group == group) & (o_b > first) & (o_b < last)
    m_member = m_member & (tl.abs(b_score) < float("inf"))
    return m_member, tl.where(m_member, b_score, 0.0)


@triton.jit
def _run_of(p_group, row, batch, stride_group, group, BLOCK: tl.constexpr):
    """The nearest rows before and after `row` that are of another group; -1 and `batch` where there is none."""
    offsets = tl.arange(0, BLOCK)
    first = tl.full([], -1, tl.int32)
    last = tl.full([], 0, tl.int32) + batch
    for start in range(0, batch, BLOCK):
        o_b = start + offsets
        inside = o_b < batch
        b_group = tl.load(p_group + o_b.to(tl.int64) * stride_group, mask=inside, other=0).to(tl.int64)
        m_other = inside & (b_group != group)
        first = tl.maximum(first, tl.max(tl.where(m_other & (o_b < row), o_b, -1), 0))
        last = tl.minimum(last, tl.min(tl.where(m_other & (o_b > row), o_b, batch), 0))
    return first, last


@triton.jit
def _projection_shift(
    p_score,
    p_group,
    batch,
    stride_group,
    group,
    first,
    last,
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
                m_member, b_score = _load_members(
                    p_score, p_group, start + offsets, batch, stride_group, group, first, last
                )
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
    CONSECUTIVE: tl.constexpr,
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
    first, last = -1, batch
    if CONSECUTIVE:
        first, last = _run_of(group_ptr, row, batch, stride_group, group, BLOCK)

    members = 0
    low = tl.full([], float("inf"), tl.float64)
    high = tl.full([], float("-inf"), tl.float64)
    b_total = tl.full([BLOCK], 0, tl.float64)
    for start in range(0, batch, BLOCK):
        m_member, b_score = _load_members(
            group_score_ptr, group_ptr, start + offsets, batch, stride_group, group, first, last
        )
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
            first,
            last,
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

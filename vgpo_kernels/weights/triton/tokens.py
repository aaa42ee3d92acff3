"""Triton kernel of the token weights: a program a trajectory.

Tokens are walked in tiles, so that any length runs through the same compiled kernel. Sums are float64, for
min-max over a group would magnify float32's rounding of long sums.
"""

from typing import Any

from vgpo_kernels._triton import tl, triton
from vgpo_kernels._tuning import Tiles, listed, tunable
from vgpo_kernels.weights.config import VGPOConfig

PROJECTION_ROUNDS = tl.constexpr(32)  # leaves the shift uncertain by 1e-9, below what float32 shows


@triton.jit
def _load_valid(p_mask, o_t, length, stride_mask):
    """One tile of a row: which tokens are valid."""
    inside = o_t < length
    return (tl.load(p_mask + o_t.to(tl.int64) * stride_mask, mask=inside, other=0) != 0) & inside


@triton.jit
def _load_scores(p_focus, p_mask, o_t, length, stride_focus, stride_mask):
    """One tile of a row: which tokens are valid, and their raw scores (0 elsewhere)."""
    m_valid = _load_valid(p_mask, o_t, length, stride_mask)  # [BT]
    return m_valid, tl.load(p_focus + o_t.to(tl.int64) * stride_focus, mask=m_valid, other=0.0).to(tl.float32)


@triton.jit
def is_finite(x):
    return tl.abs(x) < float("inf")


@triton.jit
def _ordered_bits(x):
    """The bits of float32 as integers in the same order, both zeros alike."""
    bits = x.to(tl.int32, bitcast=True)
    bits = tl.where((bits & 0x7FFFFFFF) == 0, 0, bits)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def _survey(p_focus, p_mask, length, stride_focus, stride_mask, BLOCK: tl.constexpr):
    """A row's valid tokens, how many of them are not finite, and the extremes of their raw scores."""
    offsets = tl.arange(0, BLOCK)
    count = 0
    broken = 0
    raw_low = float("inf")
    raw_high = float("-inf")
    for start in range(0, length, BLOCK):
        o_t = start + offsets
        m_valid, b_raw = _load_scores(p_focus, p_mask, o_t, length, stride_focus, stride_mask)
        count += tl.sum(m_valid.to(tl.int32), 0)
        broken += tl.sum((m_valid & (is_finite(b_raw) == 0)).to(tl.int32), 0)
        raw_low = tl.minimum(raw_low, tl.min(tl.where(m_valid, b_raw, float("inf")), 0))
        raw_high = tl.maximum(raw_high, tl.max(tl.where(m_valid, b_raw, float("-inf")), 0))
    return count, broken, raw_low, raw_high


@triton.jit
def _write_tail_keys(p_focus, p_mask, p_keys, length, stride_focus, stride_mask, head, BLOCK: tl.constexpr):
    """Writes the ordered bits of the scores behind the row's `head` first ones, the least integer elsewhere.

    Returns the tail's first column.
    """
    offsets = tl.arange(0, BLOCK)
    seen = 0
    begin = length
    for start in range(0, length, BLOCK):
        o_t = start + offsets
        m_valid, b_raw = _load_scores(p_focus, p_mask, o_t, length, stride_focus, stride_mask)
        m_tail = m_valid & (seen + tl.cumsum(m_valid.to(tl.int32), 0) > head)
        b_keys = tl.where(m_tail, _ordered_bits(b_raw), -2147483648)
        tl.store(p_keys + o_t, b_keys.to(tl.float32, bitcast=True), mask=o_t < length)
        begin = tl.minimum(begin, tl.min(tl.where(m_tail, o_t, length), 0))
        seen += tl.sum(m_valid.to(tl.int32), 0)
    return begin


@triton.jit
def _kth_largest(p_keys, begin, length, k, BLOCK: tl.constexpr):
    """The k-th largest of the keys from column `begin` on: 32 halvings of the integers, no sort."""
    offsets = tl.arange(0, BLOCK)
    low = tl.full([], -2147483648, tl.int64)  # at least k keys are not below it, if there are k
    high = tl.full([], 2147483648, tl.int64)  # fewer than k are not below it
    for _ in range(32):
        middle = (low + high) >> 1
        b_count = tl.full([BLOCK], 0, tl.int32)
        for start in range((begin // BLOCK) * BLOCK, length, BLOCK):
            o_t = start + offsets
            b_keys = tl.load(p_keys + o_t, mask=o_t < length, other=0.0).to(tl.int32, bitcast=True)
            b_count += ((b_keys >= middle.to(tl.int32)) & (o_t < length)).to(tl.int32)
        enough = tl.sum(b_count, 0) >= k
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    return low.to(tl.int32)


@triton.jit
def _lift(b_rank, count, BETA: tl.constexpr, SCHEDULE: tl.constexpr, EXPONENT: tl.constexpr, STEP: tl.constexpr):
    """beta * s(p) of the t-th token, t = 1..count."""
    last = tl.maximum(count, 1)
    if SCHEDULE == "step":
        # float64 tells p >= step_position as the reference does.
        b_p = b_rank.to(tl.float64) / last.to(tl.float64)
        return tl.where(b_p >= tl.full([], STEP, tl.float64), BETA, 0.0)
    b_p = tl.div_rn(b_rank.to(tl.float32), last.to(tl.float32))
    if SCHEDULE == "exponential":
        b_power = tl.exp2(EXPONENT * tl.log2(tl.where(b_p > 0.0, b_p, 1.0)))
        b_p = tl.where(b_p > 0.0, b_power, 0.0)
    return BETA * b_p


@triton.jit
def scaled(factor, strength):
    return tl.where(strength == 1.0, factor, 1.0 + strength * (factor - 1.0))


@triton.jit
def row_strength(advantage_ptr, row, stride_advantage, strength, NEGATIVE: tl.constexpr, SIGNED: tl.constexpr):
    """How much of a row's factors is applied, from the step's strength and the sign of its advantage."""
    if SIGNED:
        negative = tl.load(advantage_ptr + row * stride_advantage) < 0
        strength = tl.where(negative, strength * NEGATIVE, strength)
    return strength


@triton.jit
def _token_factor(b_normalized, mean, shift, LOW: tl.constexpr, HIGH: tl.constexpr, CLAMP: tl.constexpr):
    b_factor = 1.0 + (b_normalized - mean.to(tl.float32))
    if CLAMP == "project":
        b_factor = (b_factor.to(tl.float64) + shift).to(tl.float32)
    if CLAMP != "none":
        b_factor = tl.minimum(tl.maximum(b_factor, LOW), HIGH)
    return b_factor


@triton.jit
def _normalized(b_w, low, high, varies):
    b_x = tl.div_rn(b_w - low, tl.where(high > low, high - low, 1.0))
    return tl.where(varies, b_x, 0.0)


@triton.jit
def _projection_shift(
    p_w,
    p_mask,
    length,
    stride_mask,
    count,
    low,
    high,
    varies,
    mean,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The shift that brings the clamped factors of a row back to mean 1; 0 where none is clamped."""
    offsets = tl.arange(0, BLOCK)
    shift = tl.full([], 0.0, tl.float64)
    least = 1.0 - mean.to(tl.float32)
    if varies & ((least < LOW) | (least + 1.0 > HIGH)):
        below = tl.full([], LOW - 2.0, tl.float64)
        above = tl.full([], HIGH, tl.float64)
        for _ in range(PROJECTION_ROUNDS):
            middle = (below + above) * 0.5
            b_sum = tl.full([BLOCK], 0, tl.float64)
            for start in range(0, length, BLOCK):
                o_t = start + offsets
                inside = o_t < length
                m_valid = inside & (tl.load(p_mask + o_t.to(tl.int64) * stride_mask, mask=inside, other=0) != 0)
                b_w = tl.load(p_w + o_t, mask=m_valid, other=0.0)
                b_x = 1.0 + (tl.div_rn(b_w - low, high - low) - mean.to(tl.float32))
                b_x = tl.minimum(tl.maximum(b_x.to(tl.float64) + middle, LOW), HIGH)
                b_sum += tl.where(m_valid, b_x, 0.0)
            short = tl.sum(b_sum, 0) < count.to(tl.float64)
            below = tl.where(short, middle, below)
            above = tl.where(short, above, middle)
        shift = (below + above) * 0.5
    return shift


@triton.jit(
    do_not_specialize=[
        "length",
        "stride_focus_b",
        "stride_mask_b",
        "stride_visual",
        "stride_advantage",
    ]
)
def weights_token_kernel(
    focus_ptr,
    mask_ptr,
    visual_ptr,
    advantage_ptr,
    token_ptr,
    normalized_ptr,
    gate_ptr,
    score_ptr,
    group_score_ptr,
    length,
    stride_focus_b,
    stride_focus_t,
    stride_mask_b,
    stride_mask_t,
    stride_visual,
    stride_advantage,
    strength,
    SIGNED: tl.constexpr,
    AFFINE: tl.constexpr,
    BETA: tl.constexpr,
    TAIL_START: tl.constexpr,
    GATED_SHARE: tl.constexpr,
    SCHEDULE: tl.constexpr,
    EXPONENT: tl.constexpr,
    STEP_POSITION: tl.constexpr,
    COMPENSATION: tl.constexpr,
    GATE: tl.constexpr,
    INTRA: tl.constexpr,
    SCORE: tl.constexpr,
    CLAMP: tl.constexpr,
    LOW: tl.constexpr,
    HIGH: tl.constexpr,
    NEGATIVE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.arange(0, BLOCK)
    p_focus = focus_ptr + row * stride_focus_b
    p_mask = mask_ptr + row * stride_mask_b
    p_token = token_ptr + row * length  # holds the gate's keys first
    p_normalized = normalized_ptr + row * length  # holds the compensated scores first
    strength = row_strength(advantage_ptr, row, stride_advantage, strength, NEGATIVE, SIGNED)
    extent = tl.where(tl.load(visual_ptr + row * stride_visual) != 0, length, 0)  # no token from here on is valid

    count, broken, raw_low, raw_high = _survey(p_focus, p_mask, extent, stride_focus_t, stride_mask_t, BLOCK)

    threshold = 0
    if COMPENSATION and GATE:
        head = (count.to(tl.float64) * tl.full([], TAIL_START, tl.float64)).to(tl.int32)
        top = ((count - head).to(tl.float64) * tl.full([], GATED_SHARE, tl.float64)).to(tl.int32)
        begin = _write_tail_keys(p_focus, p_mask, p_token, extent, stride_focus_t, stride_mask_t, head, BLOCK)
        tl.debug_barrier()  # other threads may read what this one wrote
        threshold = _kth_largest(p_token, begin, extent, tl.maximum(top, 1), BLOCK)
        threshold = tl.maximum(threshold, -2147483647)  # an empty tail opens no gate

    seen = 0
    low = float("inf")
    high = float("-inf")
    total = tl.full([], 0.0, tl.float64)
    for start in range(0, length, BLOCK):
        o_t = start + offsets
        m_valid, b_raw = _load_scores(p_focus, p_mask, o_t, extent, stride_focus_t, stride_mask_t)
        b_w = b_raw
        if AFFINE:
            b_w = (b_raw + 1.0) * 0.5
        m_gate = o_t < 0
        if COMPENSATION:
            m_gate = m_valid
            if GATE:
                b_keys = tl.load(p_token + o_t, mask=m_valid, other=0.0).to(tl.int32, bitcast=True)
                m_gate = m_valid & (b_keys >= threshold)
            b_rank = seen + tl.cumsum(m_valid.to(tl.int32), 0)
            b_lift = _lift(b_rank, count, BETA, SCHEDULE, EXPONENT, STEP_POSITION)
            b_w = b_w * (1.0 + tl.where(m_gate, b_lift, 0.0))
        seen += tl.sum(m_valid.to(tl.int32), 0)
        low = tl.minimum(low, tl.min(tl.where(m_valid, b_w, float("inf")), 0))
        high = tl.maximum(high, tl.max(tl.where(m_valid, b_w, float("-inf")), 0))
        total += tl.sum(tl.where(m_valid, b_w, 0.0).to(tl.float64), 0)
        tl.store(p_normalized + o_t, b_w, mask=o_t < length)
        tl.store(gate_ptr + row * length + o_t, m_gate.to(tl.uint8), mask=o_t < length)

    mean_w = total / tl.maximum(count, 1).to(tl.float64)
    varies = (high > low) & (raw_high > raw_low)
    span = tl.where(varies, high.to(tl.float64) - low.to(tl.float64), 1.0)
    mean = tl.where(varies, (mean_w - low.to(tl.float64)) / span, 0.0)

    tl.debug_barrier()
    shift = tl.full([], 0.0, tl.float64)
    if CLAMP == "project" and INTRA:
        shift = _projection_shift(
            p_normalized, p_mask, extent, stride_mask_t, count, low, high, varies, mean, LOW, HIGH, BLOCK
        )

    for start in range(0, length, BLOCK):
        o_t = start + offsets
        inside = o_t < length
        m_valid = _load_valid(p_mask, o_t, extent, stride_mask_t)
        b_w = tl.load(p_normalized + o_t, mask=inside, other=0.0)
        b_normalized = _normalized(b_w, low, high, varies)
        b_stored = tl.where(broken > 0, float("nan"), b_normalized)
        tl.store(p_normalized + o_t, tl.where(m_valid, b_stored, 0.0), mask=inside)
        b_factor = tl.full([BLOCK], 1.0, tl.float32)
        if INTRA:
            b_token = scaled(_token_factor(b_normalized, mean, shift, LOW, HIGH, CLAMP), strength)
            b_token = tl.where(broken > 0, float("nan"), b_token)
            b_factor = tl.where(m_valid, b_token, 1.0)
        tl.store(p_token + o_t, b_factor, mask=inside)

    score = mean_w
    if SCORE == "normalized_mean" or SCORE == "normalized_sum":
        score = mean
    if SCORE == "sum" or SCORE == "normalized_sum":
        score = score * count.to(tl.float64)
    score = tl.where(broken > 0, float("nan"), tl.where(count > 0, score, 0.0))
    tl.store(score_ptr + row, score.to(tl.float32))
    tl.store(group_score_ptr + row, tl.where(count > 0, score, float("inf")))


def candidates(*blocks_and_warps: tuple[int, int]) -> dict[str, tuple[Tiles, ...]]:
    """Returns what a tuner times against the choice, by target."""
    bounded = listed("BLOCK num_warps maxnreg", *((*pair, 128) for pair in blocks_and_warps))
    return dict.fromkeys(("sm_80", "sm_90", "sm_100", "sm_120"), bounded) | {
        "gfx942": listed("BLOCK num_warps", *blocks_and_warps)
    }


def bounded(tiles: Tiles, target: str) -> Tiles:
    """Returns the tiles with a limit of registers on NVIDIA: without it ptxas spills to fit one more program."""
    return tiles if target == "gfx942" else tiles | {"maxnreg": 128}


@tunable(
    "weights token",
    case="weights_token[balanced]",
    candidates=candidates((256, 4), (512, 8), (1024, 4), (1024, 8)),
)
def token_tiles(target: str) -> Tiles:
    """Returns the tile of tokens that a program walks its trajectory in, chosen by registers, not timed."""
    return bounded({"BLOCK": 512, "num_warps": 4}, target)


def clamp_options(clamp: tuple[float, float] | None, preserve_mean: bool) -> dict[str, Any]:
    """Returns the compile-time arguments of a clamp."""
    low, high = clamp or (1.0, 1.0)
    how = "none" if clamp is None else "project" if preserve_mean else "cut"
    return {"CLAMP": how, "LOW": low, "HIGH": high}


def token_options(config: VGPOConfig, source: str, signed: bool) -> dict[str, Any]:
    """Returns the token kernel's compile-time arguments."""
    return {
        "SIGNED": signed,
        "AFFINE": source != "attention",
        "BETA": float(config.beta),
        "TAIL_START": float(config.tail_start),
        "GATED_SHARE": float(config.gated_share),
        "SCHEDULE": config.schedule,
        "EXPONENT": float(config.exponent),
        "STEP_POSITION": float(config.step_position),
        "COMPENSATION": config.compensation,
        "GATE": config.gate,
        "INTRA": config.intra,
        "SCORE": config.trajectory_score,
        "NEGATIVE": float(config.negative_strength),
        **clamp_options(config.token_clamp, config.preserve_mean),
    }

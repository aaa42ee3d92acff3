"""The terms of the policy loss on tiles of tokens: ratio, clip, KL. Both kernels of the loss take them from here."""

from vgpo_kernels._triton import tl, triton
from vgpo_kernels.policy_loss.config import PolicyLossConfig


@triton.jit
def bounded_ratio(log_ratio, is_negative, LOW, HIGH, HIGH_NEGATIVE):
    """The ratio after clipping, and whether it still moves. Comparisons, not min and max: NaN stays NaN."""
    low = tl.where(is_negative, LOW, -float("inf"))
    high = tl.where(is_negative, HIGH_NEGATIVE, HIGH)
    bounded = tl.where(log_ratio > high, high, tl.where(log_ratio < low, low, log_ratio))
    return tl.exp(bounded), (log_ratio >= low) & (log_ratio <= high)


@triton.jit
def surrogate(b_logps, b_log_ratio, b_adv, LOW, HIGH, HIGH_NEGATIVE, CISPO: tl.constexpr):
    """The clipped loss of each token and its derivative by logps, each token having a ratio of its own."""
    b_bounded, m_moves = bounded_ratio(b_log_ratio, b_adv < 0, LOW, HIGH, HIGH_NEGATIVE)
    b_loss = -b_bounded * b_adv
    if CISPO:
        return b_loss * b_logps, b_loss
    return b_loss, tl.where(m_moves, b_loss, 0.0)


@triton.jit
def kl_to_reference(b_logps, b_ref, LOG_LIMIT, LIMIT):
    """k3 of each token and its derivative by logps, clamped where limits are set."""
    b_d = b_ref - b_logps
    m_moves = b_d == b_d
    if LOG_LIMIT is not None:
        m_moves = (b_d >= -LOG_LIMIT) & (b_d <= LOG_LIMIT)
        b_d = tl.where(b_d > LOG_LIMIT, LOG_LIMIT, tl.where(b_d < -LOG_LIMIT, -LOG_LIMIT, b_d))
    b_exp = tl.exp(b_d)
    b_kl = b_exp - b_d - 1.0
    if LIMIT is not None:
        m_moves = m_moves & (b_kl >= -LIMIT) & (b_kl <= LIMIT)
        b_kl = tl.where(b_kl > LIMIT, LIMIT, tl.where(b_kl < -LIMIT, -LIMIT, b_kl))
    return b_kl, tl.where(m_moves, 1.0 - b_exp, 0.0)


def term_constants(config: PolicyLossConfig) -> dict[str, float | bool | None]:
    """Returns the compile-time arguments of a kernel that these terms come from."""
    low, high, high_negative = config.log_bounds()
    return {
        "LOW": low,
        "HIGH": high,
        "HIGH_NEGATIVE": high_negative,
        "BETA": float(config.beta),
        "KL_LOG_LIMIT": config.kl_log_ratio_limit,
        "KL_LIMIT": config.kl_limit,
        "CISPO": config.loss_type == "cispo",
    }

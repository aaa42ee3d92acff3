"""The terms of the policy loss on tiles of tokens: ratio, clip, KL. Both kernels of the loss take them from here."""

from vgpo_kernels._triton import tl, triton
from vgpo_kernels.policy_loss.config import PolicyLossConfig


@triton.jit
def bounded_ratio(log_ratio, is_negative, LOW, HIGH, HIGH_NEGATIVE):
    """The ratio after clipping, and whether it was clipped. Comparisons, not min and max: NaN stays NaN."""
    low = tl.where(is_negative, LOW, -float("inf"))
    high = tl.where(is_negative, HIGH_NEGATIVE, HIGH)
    below = log_ratio < low
    above = log_ratio > high
    return tl.exp(tl.where(above, high, tl.where(below, low, log_ratio))), below | above


@triton.jit
def surrogate(b_logps, b_log_ratio, b_adv, LOW, HIGH, HIGH_NEGATIVE, CISPO: tl.constexpr):
    """The clipped loss of each token and its derivative by logps, each token having a ratio of its own."""
    b_bounded, m_outside = bounded_ratio(b_log_ratio, b_adv < 0, LOW, HIGH, HIGH_NEGATIVE)
    b_loss = -b_bounded * b_adv
    if CISPO:
        return b_loss * b_logps, b_loss
    return b_loss, tl.where(m_outside, 0.0, b_loss)


@triton.jit
def k3(b_d, b_exp):
    """exp(d) - d - 1, infinite at d = inf, too."""
    return tl.where(b_d == float("inf"), b_d, b_exp - b_d - 1.0)


@triton.jit
def _times(b_ratio, b_values):
    # 0 where the values are, whatever the ratio overflowed to.
    return tl.where(b_values == 0.0, 0.0, b_ratio * b_values)


@triton.jit
def kl_to_reference(b_logps, b_log_ratio, b_ref, LOG_LIMIT, LIMIT, WEIGHTED: tl.constexpr, ONE_A_ROW: tl.constexpr):
    """The KL of each token as it enters the loss and its derivative by logps, a row's one ratio being held constant."""
    b_d = b_ref - b_logps
    m_outside = b_d < b_d
    if LOG_LIMIT is not None:
        m_outside = (b_d < -LOG_LIMIT) | (b_d > LOG_LIMIT)
        b_d = tl.where(b_d > LOG_LIMIT, LOG_LIMIT, tl.where(b_d < -LOG_LIMIT, -LOG_LIMIT, b_d))
    b_exp = tl.exp(b_d)
    b_kl = k3(b_d, b_exp)
    if LIMIT is not None:
        m_outside = m_outside | (b_kl < -LIMIT) | (b_kl > LIMIT)
        b_kl = tl.where(b_kl > LIMIT, LIMIT, tl.where(b_kl < -LIMIT, -LIMIT, b_kl))
    b_slope = 1.0 - b_exp
    if WEIGHTED:
        b_ratio = tl.exp(b_log_ratio)
        # Where exp(d) overflows alone, ratio * exp(d) need not.
        b_product = tl.exp(b_log_ratio + b_d)
        b_kl = tl.where((b_kl == float("inf")) & (b_d > 0.0), b_product, _times(b_ratio, b_kl))
        if not ONE_A_ROW:
            # ratio * slope + ratio * KL, the second of which comes through the ratio: exp(d) cancels.
            return b_kl, tl.where(m_outside, b_kl, _times(b_ratio, -b_d))
        b_slope = tl.where(b_slope == -float("inf"), -b_product, _times(b_ratio, b_slope))
    return b_kl, tl.where(m_outside, 0.0, b_slope)


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
        "KL_WEIGHTED": config.kl_importance_weighted,
        "CISPO": config.loss_type == "cispo",
    }

// The terms of the policy loss on vectors of tokens: ratio, clip, KL, as in vgpo_kernels/policy_loss/terms.py.
// Comparisons, not min and max, so that NaN stays NaN, in the gradient, too; on its bounds a clamp passes gradients on.
#pragma once
#include "../simd/exp.h"

namespace vgpo::VGPO_TARGET {

struct Settings {
    bool cispo;
    float low, high, high_negative;             // of the log-ratio: PolicyLossConfig.log_bounds()
    float beta, kl_log_ratio_limit, kl_limit;  // limits are infinite where there are none
    bool kl_weighted;                          // KL times the importance ratio
};

// From a tensor of these fields in their order: `settings` of vgpo_kernels/policy_loss/native.py.
inline Settings settings_of(const View<double, 1>& values) {
    expect_size("settings", values, {8});
    auto number = [&](int i) { return static_cast<float>(*values.at(i)); };
    return {number(0) != 0.0f, number(1), number(2), number(3), number(4), number(5), number(6), number(7) != 0.0f};
}

// The clipped loss of each token. `gradient` is its derivative by the log-ratio, for cispo that by logp.
// The bound is set on the log-ratio: what would overflow is cut before exp.
VGPO_INLINE void surrogate(const Settings& settings, F logp, F log_ratio, F advantage, F& loss, F& gradient) {
    const I negative = advantage < 0.0f;
    const float least = settings.cispo ? -INFINITY : settings.low;
    const F low = select(negative, broadcast(least), broadcast(-INFINITY));
    const F high = select(negative, broadcast(settings.high_negative), broadcast(settings.high));
    const I below = log_ratio < low, above = log_ratio > high;
    loss = -exp(select(above, high, select(below, low, log_ratio))) * advantage;
    if (settings.cispo) {
        gradient = loss;
        loss = loss * logp;
    } else {
        gradient = select(below | above, F{}, loss);
    }
}

// exp(d) - d - 1, infinite at d = inf, too.
VGPO_INLINE F k3(F difference, F exponential) {
    return select(difference == INFINITY, difference, exponential - difference - 1.0f);
}

// 0 where `values` is, whatever the ratio overflowed to.
VGPO_INLINE F times(F ratio, F values) { return select(values == 0.0f, F{}, ratio * values); }

// The KL to the reference of each token as it enters the loss and its derivative by logp, which holds the ratio
// constant if the row has one: k3 of d = ref - new, clamped, times the importance ratio if settings.kl_weighted.
VGPO_INLINE void kl_to_reference(const Settings& settings, F logp, F log_ratio, F ref_logp, bool one_a_row, F& kl,
                                 F& gradient) {
    F difference = ref_logp - logp;
    I outside = I{};
    if (settings.kl_log_ratio_limit < INFINITY) {
        const F limit = broadcast(settings.kl_log_ratio_limit);
        const I above = difference > limit, below = difference < -limit;
        outside = above | below;
        difference = select(above, limit, select(below, -limit, difference));
    }
    const F exponential = exp(difference), slope = 1.0f - exponential;
    kl = k3(difference, exponential);
    if (settings.kl_limit < INFINITY) {
        const F limit = broadcast(settings.kl_limit);
        const I above = kl > limit, below = kl < -limit;
        outside |= above | below;
        kl = select(above, limit, select(below, -limit, kl));
    }
    if (!settings.kl_weighted) {
        gradient = select(outside, F{}, slope);
        return;
    }
    // Where exp(d) overflows alone, ratio * exp(d) need not.
    const F ratio = exp(log_ratio), product = exp(log_ratio + difference);
    kl = select((kl == INFINITY) & (difference > 0.0f), product, times(ratio, kl));
    if (one_a_row)
        gradient = select(outside, F{}, select(slope == -INFINITY, -product, times(ratio, slope)));
    else  // ratio * slope + ratio * kl, the second of which comes through the ratio: exp(d) cancels.
        gradient = select(outside, kl, times(ratio, -difference));
}

// The loss of each token, surrogate + beta * KL, and its derivative by logp where every token has a ratio of its own.
// ref_logp is not read unless has_ref.
VGPO_INLINE void token_loss(const Settings& settings, F logp, F log_ratio, F advantage, F ref_logp, bool has_ref,
                            F& loss, F& gradient) {
    surrogate(settings, logp, log_ratio, advantage, loss, gradient);
    if (!has_ref || settings.beta == 0.0f) return;
    F kl, by_logp;
    kl_to_reference(settings, logp, log_ratio, ref_logp, false, kl, by_logp);
    loss += settings.beta * kl;
    gradient += settings.beta * by_logp;
}

}  // namespace vgpo::VGPO_TARGET

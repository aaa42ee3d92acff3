// The terms of the policy loss on vectors of tokens: ratio, clip, KL, as in vgpo_kernels/policy_loss/terms.py.
// Comparisons, not min and max, so that NaN stays NaN; a clamp passes its gradient on at its bounds, too.
#pragma once
#include "exp.h"

namespace vgpo::VGPO_TARGET {

struct Settings {
    bool cispo;
    float low, high, high_negative;             // of the log-ratio: PolicyLossConfig.log_bounds()
    float beta, kl_log_ratio_limit, kl_limit;  // limits are infinite where there are none
};

// From a tensor of these fields in their order: `settings` of vgpo_kernels/policy_loss/native.py.
inline Settings settings_of(const View<double, 1>& values) {
    expect_size("settings", values, {7});
    auto number = [&](int i) { return static_cast<float>(*values.at(i)); };
    return {number(0) != 0.0f, number(1), number(2), number(3), number(4), number(5), number(6)};
}

// The clipped loss of each token. `gradient` is its derivative by the log-ratio, for cispo that by logp.
// The bound is set on the log-ratio: what would overflow is cut before exp.
VGPO_INLINE void surrogate(const Settings& settings, F logp, F log_ratio, F advantage, F& loss, F& gradient) {
    const I negative = advantage < 0.0f;
    const float least = settings.cispo ? -INFINITY : settings.low;
    const F low = select(negative, all(least), all(-INFINITY));
    const F high = select(negative, all(settings.high_negative), all(settings.high));
    const F bounded = select(log_ratio > high, high, select(log_ratio < low, low, log_ratio));
    loss = -exp(bounded) * advantage;
    if (settings.cispo) {
        gradient = loss;
        loss = loss * logp;
    } else {
        gradient = select((log_ratio >= low) & (log_ratio <= high), loss, F{});
    }
}

// The k3 estimate of KL(policy || reference) of each token, exp(d) - d - 1 with d = ref - new, and its derivative by
// logp.
VGPO_INLINE void kl_to_reference(const Settings& settings, F logp, F ref_logp, F& kl, F& gradient) {
    F difference = ref_logp - logp;
    I stays = I{};
    if (settings.kl_log_ratio_limit < INFINITY) {
        const F limit = all(settings.kl_log_ratio_limit);
        stays = ~((difference >= -limit) & (difference <= limit));
        difference = select(difference > limit, limit, select(difference < -limit, -limit, difference));
    }
    const F ratio = exp(difference);
    kl = ratio - difference - 1.0f;
    if (settings.kl_limit < INFINITY) {
        const F limit = all(settings.kl_limit);
        stays |= ~((kl >= -limit) & (kl <= limit));
        kl = select(kl > limit, limit, select(kl < -limit, -limit, kl));
    }
    gradient = select(stays, F{}, 1.0f - ratio);
}

// The loss of each token, surrogate + beta * KL, and its derivative by logp where every token has a ratio of its own.
// ref_logp is not read unless has_ref.
VGPO_INLINE void token_loss(const Settings& settings, F logp, F log_ratio, F advantage, F ref_logp, bool has_ref,
                            F& loss, F& gradient) {
    surrogate(settings, logp, log_ratio, advantage, loss, gradient);
    if (!has_ref || settings.beta == 0.0f) return;
    F kl, by_logp;
    kl_to_reference(settings, logp, ref_logp, kl, by_logp);
    loss += settings.beta * kl;
    gradient += settings.beta * by_logp;
}

}  // namespace vgpo::VGPO_TARGET

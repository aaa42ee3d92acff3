// The passes over logits: log-probabilities, LSE and entropy, their gradient, the policy loss, KL divergence.
#pragma once
#include "logits_row.h"
#include "terms.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t LOGITS_TASK_ELEMENTS = 1 << 16;  // elements of a task, at least one row

// Calls body(b, t, worker) for every row of (batch, length).
template <class Body>
VGPO_INLINE void for_rows(int64_t batch, int64_t length, int64_t vocabulary, int64_t threads, const Body& body) {
    const int64_t rows = batch * length, some = max<int64_t>(1, LOGITS_TASK_ELEMENTS / max<int64_t>(vocabulary, 1));
    auto task = [&](int64_t number, int64_t worker) {
        for (int64_t row = number * some; row < min(rows, (number + 1) * some); ++row)
            body(row / length, row % length, worker);
    };
    parallel(divide_up(rows, some), threads, task);
}

VGPO_INLINE bool is_valid(const Maybe<View<uint8_t, 2>>& valid, int64_t b, int64_t t) {
    return !valid.present || *valid.view.at(b, t) != 0;
}
VGPO_INLINE float value_or_0(const Maybe<View<float, 2>>& values, int64_t b, int64_t t) {
    return values.present ? *values.view.at(b, t) : 0.0f;
}

void logits_logprobs(View<float, 2> logps, View<float, 2> lse, Maybe<View<float, 2>> entropy, Floats<3> logits,
                     View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid, double temperature, double softcap,
                     int64_t threads) {
    const int64_t batch = logits.size[0], length = logits.size[1];
    expect_size("logps", logps, {batch, length});
    expect_size("lse", lse, {batch, length});
    expect_size("entropy", entropy, {batch, length});
    expect_size("targets", targets, {batch, length});
    expect_size("valid", valid, {batch, length});
    const LogitTransform transform(temperature, softcap);
    Scratch<float> block(LOGITS_BLOCK, threads);
    with_type(logits.type, [&](auto type) {
        const auto rows = logits.as<decltype(type)>();
        for_rows(batch, length, logits.size[2], threads, [&](int64_t b, int64_t t, int64_t worker) {
            const bool here = is_valid(valid, b, t);
            Totals totals;
            float target_logit = 0.0f, slope;
            if (here) {
                const auto row = row_of(rows, b, t);
                totals = entropy.present ? totals_of<true>(row, transform, block.of(worker))
                                         : totals_of<false>(row, transform, block.of(worker));
                target_logit = scaled_one(row, *targets.at(b, t), transform, slope);
            }
            *logps.at(b, t) = here ? static_cast<float>(totals.logp(target_logit)) : 0.0f;
            *lse.at(b, t) = here ? static_cast<float>(totals.lse()) : 0.0f;
            if (entropy.present) *entropy.view.at(b, t) = here ? static_cast<float>(totals.entropy()) : 0.0f;
        });
    });
}

void logits_gradient(Floats<3> out, Floats<3> logits, View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid,
                     View<float, 2> lse, Maybe<View<float, 2>> entropy, Maybe<View<float, 2>> grad_logps,
                     Maybe<View<float, 2>> grad_entropy, Maybe<View<float, 2>> grad_lse, double temperature,
                     double softcap, int64_t threads) {
    const int64_t batch = logits.size[0], length = logits.size[1];
    expect_size("out", out, {batch, length, logits.size[2]});
    expect_size("targets", targets, {batch, length});
    expect_size("valid", valid, {batch, length});
    expect_size("lse", lse, {batch, length});
    for (const auto& by_token : {entropy, grad_logps, grad_entropy, grad_lse})
        expect_size("entropy or a gradient", by_token, {batch, length});
    const LogitTransform transform(temperature, softcap);
    const bool by_entropy = entropy.present && grad_entropy.present;
    Scratch<float> blocks(2 * LOGITS_BLOCK, threads);
    with_type(logits.type, [&](auto type) {
        with_type(out.type, [&](auto out_type) {
            const auto from = logits.as<decltype(type)>();
            const auto to = out.as<decltype(out_type)>();
            for_rows(batch, length, logits.size[2], threads, [&](int64_t b, int64_t t, int64_t worker) {
                if (!is_valid(valid, b, t)) return write_zeros(row_of(to, b, t));
                const float by_logp = value_or_0(grad_logps, b, t), log_total = *lse.at(b, t);
                const Derivative by{log_total,
                                    (value_or_0(grad_lse, b, t) - by_logp) * transform.inverse_temperature,
                                    by_entropy ? *grad_entropy.view.at(b, t) * transform.inverse_temperature : 0.0f,
                                    log_total,
                                    value_or_0(entropy, b, t),
                                    by_logp * transform.inverse_temperature};
                const int64_t target = grad_logps.present ? *targets.at(b, t) : -1;
                float *z = blocks.of(worker), *slope = z + LOGITS_BLOCK;
                if (by_entropy)
                    write_gradient<true>(row_of(to, b, t), row_of(from, b, t), target, transform, by, z, slope);
                else
                    write_gradient<false>(row_of(to, b, t), row_of(from, b, t), target, transform, by, z, slope);
            });
        });
    });
}

void logits_loss(Floats<3> out, View<float, 2> logps, View<float, 2> entropy, Floats<3> logits,
                 View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid, Maybe<View<float, 2>> old_logps,
                 View<float, 2> advantages, Maybe<View<float, 2>> ref_logps, Maybe<View<float, 2>> row_weights,
                 double temperature, double softcap, View<double, 1> settings_values, int64_t threads) {
    const int64_t batch = logits.size[0], length = logits.size[1];
    expect_size("out", out, {batch, length, logits.size[2]});
    expect_size("logps", logps, {batch, length});
    expect_size("entropy", entropy, {batch, length});
    expect_size("targets", targets, {batch, length});
    expect_size("valid", valid, {batch, length});
    expect_size("old_logps", old_logps, {batch, length});
    expect_size("advantages", advantages, {batch, length});
    expect_size("ref_logps", ref_logps, {batch, length});
    expect_size("row_weights", row_weights, {batch, length});
    const Settings settings = settings_of(settings_values);
    const LogitTransform transform(temperature, softcap);
    Scratch<float> blocks(2 * LOGITS_BLOCK + divide_up(logits.size[2], LOGITS_BLOCK), threads);
    with_type(logits.type, [&](auto type) {
        with_type(out.type, [&](auto out_type) {
            const auto from = logits.as<decltype(type)>();
            const auto to = out.as<decltype(out_type)>();
            for_rows(batch, length, logits.size[2], threads, [&](int64_t b, int64_t t, int64_t worker) {
                const auto gradient = row_of(to, b, t);
                const auto row = row_of(from, b, t);
                *logps.at(b, t) = *entropy.at(b, t) = 0.0f;
                if (!is_valid(valid, b, t)) return write_zeros(gradient);
                float *z = blocks.of(worker), *slope = z + LOGITS_BLOCK, *maximum_of = slope + LOGITS_BLOCK;
                float slope_there;
                const int64_t target = *targets.at(b, t);
                const float target_logit = scaled_one(row, target, transform, slope_there);
                // If the gradient's memory can hold the exps, exp is taken once.
                float* exps = gradient.stride == 1 && !transform.has_cap ? as_floats(gradient.data) : nullptr;
                const Totals totals = totals_of<true>(row, transform, z, exps, maximum_of);
                const float logp = static_cast<float>(totals.logp(target_logit));
                *logps.at(b, t) = logp;
                *entropy.at(b, t) = static_cast<float>(totals.entropy());
                const float log_ratio = logp - (old_logps.present ? *old_logps.view.at(b, t) : logp);
                F loss, by_logp;
                token_loss(settings, broadcast(logp), broadcast(log_ratio), broadcast(*advantages.at(b, t)),
                           broadcast(value_or_0(ref_logps, b, t)), ref_logps.present, loss, by_logp);
                const float weight = row_weights.present ? *row_weights.view.at(b, t) : 1.0f;
                const float coefficient = by_logp[0] * weight * transform.inverse_temperature;
                const double factor = -coefficient / totals.total;
                if (exps) {
                    rescale_exps(exps, row.size, maximum_of, totals.maximum, factor);
                    if (target >= 0 && target < row.size) exps[target] += coefficient;
                    return;
                }
                const Derivative by{totals.maximum, static_cast<float>(factor), 0.0f, 0.0f, 0.0f, coefficient};
                write_gradient<false>(gradient, row, target, transform, by, z, slope);
            });
        });
    });
}

void logits_kl(View<float, 1> out, Floats<2> logits_p, Floats<2> logits_q, double temperature, double softcap,
               int64_t threads) {
    const int64_t count = logits_p.size[0], vocabulary = logits_p.size[1];
    expect_size("out", out, {count});
    expect_size("logits_q", logits_q, {count, vocabulary});
    const LogitTransform transform(temperature, softcap);
    Scratch<float> blocks(2 * LOGITS_BLOCK, threads);
    with_type(logits_p.type, [&](auto type_p) {
        with_type(logits_q.type, [&](auto type_q) {
            const auto view_p = logits_p.as<decltype(type_p)>();
            const auto view_q = logits_q.as<decltype(type_q)>();
            for_rows(1, count, 2 * vocabulary, threads, [&](int64_t, int64_t n, int64_t worker) {
                const LogitsRow<decltype(type_p)> row_p{view_p.at(n), vocabulary, view_p.stride[1]};
                const LogitsRow<decltype(type_q)> row_q{view_q.at(n), vocabulary, view_q.stride[1]};
                float *z_p = blocks.of(worker), *z_q = z_p + LOGITS_BLOCK;
                const Totals of_p = totals_of<false>(row_p, transform, z_p), of_q = totals_of<false>(row_q, transform, z_q);
                const F log_total = broadcast(static_cast<float>(of_p.log_total()));
                // Of p (log p - log q) the distances of both to their largest; what the totals add comes at the end.
                double differences = 0.0, probabilities = 0.0;
                for (int64_t start = 0; start < vocabulary; start += LOGITS_BLOCK) {
                    const int64_t some = min(LOGITS_BLOCK, vocabulary - start);
                    scaled_block(z_p, nullptr, row_p, start, some, transform);
                    scaled_block(z_q, nullptr, row_q, start, some, transform);
                    D difference{}, probability{};
                    for (int64_t i = 0; i < some; i += LANES) {
                        const F to_p = load(z_p + i) - of_p.maximum, to_q = load(z_q + i) - of_q.maximum;
                        const F p = exp(to_p - log_total);
                        const F term = select(p == 0.0f, F{}, p * (to_p - to_q));
                        difference += __builtin_convertvector(term, D);
                        probability += __builtin_convertvector(p, D);
                    }
                    differences += sum_lanes(difference);
                    probabilities += sum_lanes(probability);
                }
                const double kl = differences + (of_q.log_total() - of_p.log_total()) * probabilities;
                *out.at(n) = kl < 0.0 ? 0.0f : static_cast<float>(kl);
            });
        });
    });
}

}  // namespace vgpo::VGPO_TARGET

// The passes over rows of logits: log-probability, LSE and entropy, the gradient of them, KL divergence.
//
// A row is walked in blocks that stay in the first cache: converted, scaled, with their largest value known before the
// first exp. Sums run over a few vectors in float, then over the row in double.
#pragma once
#include "terms.h"

namespace vgpo::VGPO_TARGET {

typedef double D __attribute__((vector_size(8 * VGPO_LANES)));

constexpr int64_t LOGITS_BLOCK = 2048;   // elements, whole vectors
constexpr int64_t LOGITS_TASK = 1 << 16;  // elements of a task, at least one row
constexpr int SUMMED_VECTORS = 16;       // in float; LOGITS_BLOCK is a multiple
// exp of it is 0: a logit of -inf becomes it where it is multiplied, so that 0 * log(0) is 0.
constexpr float LOWEST = -1e4f;

// What the softmax is taken of: softcap * tanh(x / softcap) / temperature, or x / temperature where softcap is 0.
struct Scale {
    float inverse, inverse_cap, capped;  // 1 / temperature, 1 / softcap, softcap / temperature
    bool has_cap;

    VGPO_INLINE Scale(double temperature, double softcap)
        : inverse(static_cast<float>(1.0 / temperature)), inverse_cap(0.0f), capped(0.0f), has_cap(softcap > 0.0) {
        if (has_cap) inverse_cap = static_cast<float>(1.0 / softcap), capped = static_cast<float>(softcap / temperature);
    }
    // `bent` becomes tanh(x / softcap), where there is one.
    VGPO_INLINE F operator()(F x, F& bent) const {
        if (!has_cap) return x * inverse;
        bent = tanh(x * inverse_cap);
        return bent * capped;
    }
};

// A row of V logits.
template <class T>
struct Row {
    T* data;
    int64_t size, stride;
};

template <class T>
VGPO_INLINE Row<T> row_of(const View<T, 3>& logits, int64_t b, int64_t t) {
    return {logits.at(b, t), logits.size[2], logits.stride[2]};
}

template <bool Cap, class T>
VGPO_INLINE float scaled_block(float* z, float* slope, const Row<T>& row, int64_t start, int64_t count, const Scale& scale) {
    F highest = all(-INFINITY);
    const T* from = row.data + start * row.stride;
    for (int64_t i = 0; i < count; i += LANES, from += LANES * row.stride) {
        const int64_t some = count - i;
        F bent{}, x = some >= LANES ? load_some(from, LANES, row.stride) : load_some(from, some, row.stride);
        if (Cap) {
            bent = tanh(x * scale.inverse_cap);
            x = bent * scale.capped;
            if (slope) store(slope + i, 1.0f - bent * bent);
        } else {
            x = x * scale.inverse;
        }
        if (some < LANES) x = select(first_lanes(some), x, all(-INFINITY));
        highest = max(x, highest);
        store(z + i, x);
    }
    return max_lanes(highest);
}

// Writes the scaled logits [start, start + count) to `z`, -inf up to a whole vector, and the derivative of the soft-cap
// to `slope` where that is wanted and there is one. Returns the largest; NaN is none.
template <class T>
VGPO_INLINE float scaled_block(float* z, float* slope, const Row<T>& row, int64_t start, int64_t count, const Scale& scale) {
    return scale.has_cap ? scaled_block<true>(z, slope, row, start, count, scale)
                         : scaled_block<false>(z, slope, row, start, count, scale);
}

// One scaled logit; NaN for a place that is none.
template <class T>
VGPO_INLINE float scaled_one(const Row<T>& row, int64_t place, const Scale& scale, float& slope) {
    slope = 1.0f;
    if (place < 0 || place >= row.size) return NAN;
    F bent{};
    const F z = scale(all(to_float(row.data[place * row.stride])), bent);
    if (scale.has_cap) slope = 1.0f - bent[0] * bent[0];
    return z[0];
}

VGPO_INLINE double sum_lanes(const D& x) {
    double sum = 0.0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// Of a row's scaled logits z: the largest, the sum of exp(z - highest), that of (z - highest) exp(z - highest).
struct Totals {
    float highest = -INFINITY;
    double total = 0.0, weighted = 0.0;

    // Makes `higher` the highest.
    VGPO_INLINE void raise(float higher) {
        if (!(higher > highest)) return;
        const double change = static_cast<double>(highest) - static_cast<double>(higher);
        const bool first = highest == -INFINITY;  // nothing was summed yet, but for NaN
        const double factor = first ? 0.0 : std::exp(change);
        weighted = (first ? weighted : weighted + change * total) * factor;
        total *= factor;
        highest = higher;
    }
    // What exp is taken relative to: where no logit is above -inf, anything.
    VGPO_INLINE float shift() const { return highest == -INFINITY ? 0.0f : highest; }
    VGPO_INLINE double log_total() const { return std::log(total); }
    VGPO_INLINE double lse() const { return static_cast<double>(highest) + log_total(); }
    VGPO_INLINE double logp(float chosen) const {
        return static_cast<double>(chosen) - static_cast<double>(highest) - log_total();
    }
    VGPO_INLINE double entropy() const { return log_total() - weighted / total; }
};

template <bool Weighted>
VGPO_INLINE void add_block(Totals& totals, const float* z, int64_t count) {
    const F shift = all(totals.shift());
    D total{}, weighted{};
    for (int64_t i = 0; i < count; i += SUMMED_VECTORS * LANES) {
        const int64_t end = smaller(count, i + SUMMED_VECTORS * LANES);
        F sum{}, by_value{};
        for (int64_t j = i; j < end; j += LANES) {
            const F distance = load(z + j) - shift, e = exp(distance);
            sum += e;
            if (Weighted) by_value += e * max(distance, all(LOWEST));
        }
        total += __builtin_convertvector(sum, D);
        if (Weighted) weighted += __builtin_convertvector(by_value, D);
    }
    totals.total += sum_lanes(total);
    if (Weighted) totals.weighted += sum_lanes(weighted);
}

// `z` holds a block.
template <bool Weighted, class T>
VGPO_INLINE Totals totals_of(const Row<T>& row, const Scale& scale, float* z) {
    Totals totals;
    for (int64_t start = 0; start < row.size; start += LOGITS_BLOCK) {
        const int64_t count = smaller(LOGITS_BLOCK, row.size - start);
        totals.raise(scaled_block(z, nullptr, row, start, count, scale));
        add_block<Weighted>(totals, z, count);
    }
    return totals;
}

// The derivative by a logit x of which z is made: p (factor - by_entropy (log p + entropy)) slope, with
// p = exp(z - shift), and `at_target` more at the target.
struct Derivative {
    float shift, factor, by_entropy, lse, entropy, at_target;
};

template <bool Entropy, class T, class O>
VGPO_INLINE void write_gradient(
    const Row<O>& out, const Row<T>& row, int64_t target, const Scale& scale, const Derivative& by, float* z, float* slope) {
    const F shift = all(by.shift), factor = all(by.factor);
    auto derivative = [&](F value) {
        const F p = exp(value - shift);
        if (!Entropy) return p * factor;
        return p * (factor - by.by_entropy * (max(value - by.lse, all(LOWEST)) + by.entropy));
    };
    float slope_there;
    // Before the row is overwritten, where `out` is the logits themselves.
    const float chosen = scaled_one(row, target, scale, slope_there);
    for (int64_t start = 0; start < row.size; start += LOGITS_BLOCK) {
        const int64_t count = smaller(LOGITS_BLOCK, row.size - start);
        scaled_block(z, slope, row, start, count, scale);
        O* to = out.data + start * out.stride;
        for (int64_t i = 0; i < count; i += LANES, to += LANES * out.stride) {
            F dx = derivative(load(z + i));
            if (scale.has_cap) dx *= load(slope + i);
            store_some(to, dx, smaller<int64_t>(LANES, count - i), out.stride);
        }
    }
    if (target >= 0 && target < row.size)
        from_float(out.data + target * out.stride, (derivative(all(chosen))[0] + by.at_target) * slope_there);
}

template <class O>
VGPO_INLINE void write_zeros(const Row<O>& out) {
    for (int64_t i = 0; i < out.size; i += LANES)
        store_some(out.data + i * out.stride, F{}, smaller<int64_t>(LANES, out.size - i), out.stride);
}

// Calls body(b, t, worker) for every row of (batch, length).
template <class Body>
VGPO_INLINE void for_rows(int64_t batch, int64_t length, int64_t vocabulary, int64_t threads, const Body& body) {
    const int64_t rows = batch * length, some = larger<int64_t>(1, LOGITS_TASK / larger<int64_t>(vocabulary, 1));
    auto task = [&](int64_t number, int64_t worker) {
        for (int64_t row = number * some; row < smaller(rows, (number + 1) * some); ++row)
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
    const Scale scale(temperature, softcap);
    Scratch<float> block(LOGITS_BLOCK, threads);
    with_type(logits.type, [&](auto type) {
        const auto rows = logits.as<decltype(type)>();
        for_rows(batch, length, logits.size[2], threads, [&](int64_t b, int64_t t, int64_t worker) {
            const bool here = is_valid(valid, b, t);
            Totals totals;
            float chosen = 0.0f, slope;
            if (here) {
                const auto row = row_of(rows, b, t);
                totals = entropy.present ? totals_of<true>(row, scale, block.of(worker))
                                         : totals_of<false>(row, scale, block.of(worker));
                chosen = scaled_one(row, *targets.at(b, t), scale, slope);
            }
            *logps.at(b, t) = here ? static_cast<float>(totals.logp(chosen)) : 0.0f;
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
    const Scale scale(temperature, softcap);
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
                                    (value_or_0(grad_lse, b, t) - by_logp) * scale.inverse,
                                    by_entropy ? *grad_entropy.view.at(b, t) * scale.inverse : 0.0f,
                                    log_total,
                                    value_or_0(entropy, b, t),
                                    by_logp * scale.inverse};
                const int64_t target = grad_logps.present ? *targets.at(b, t) : -1;
                float *z = blocks.of(worker), *slope = z + LOGITS_BLOCK;
                if (by_entropy)
                    write_gradient<true>(row_of(to, b, t), row_of(from, b, t), target, scale, by, z, slope);
                else
                    write_gradient<false>(row_of(to, b, t), row_of(from, b, t), target, scale, by, z, slope);
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
    const Scale scale(temperature, softcap);
    Scratch<float> blocks(2 * LOGITS_BLOCK, threads);
    with_type(logits.type, [&](auto type) {
        with_type(out.type, [&](auto out_type) {
            const auto from = logits.as<decltype(type)>();
            const auto to = out.as<decltype(out_type)>();
            for_rows(batch, length, logits.size[2], threads, [&](int64_t b, int64_t t, int64_t worker) {
                const auto gradient = row_of(to, b, t);
                const auto row = row_of(from, b, t);
                *logps.at(b, t) = *entropy.at(b, t) = 0.0f;
                if (!is_valid(valid, b, t)) return write_zeros(gradient);
                float *z = blocks.of(worker), *slope = z + LOGITS_BLOCK, slope_there;
                const int64_t target = *targets.at(b, t);
                const Totals totals = totals_of<true>(row, scale, z);
                const float logp = static_cast<float>(totals.logp(scaled_one(row, target, scale, slope_there)));
                *logps.at(b, t) = logp;
                *entropy.at(b, t) = static_cast<float>(totals.entropy());
                const float log_ratio = old_logps.present ? logp - *old_logps.view.at(b, t) : 0.0f;
                F loss, by_logp;
                token_loss(settings, all(logp), all(log_ratio), all(*advantages.at(b, t)),
                           all(value_or_0(ref_logps, b, t)), ref_logps.present, loss, by_logp);
                const float weight = row_weights.present ? *row_weights.view.at(b, t) : 1.0f;
                const float coefficient = by_logp[0] * weight * scale.inverse;
                const Derivative by{totals.highest, static_cast<float>(-coefficient / totals.total), 0.0f, 0.0f, 0.0f,
                                    coefficient};
                write_gradient<false>(gradient, row, target, scale, by, z, slope);
            });
        });
    });
}

void logits_kl(View<float, 1> out, Floats<2> logits_p, Floats<2> logits_q, double temperature, double softcap,
               int64_t threads) {
    const int64_t count = logits_p.size[0], vocabulary = logits_p.size[1];
    expect_size("out", out, {count});
    expect_size("logits_q", logits_q, {count, vocabulary});
    const Scale scale(temperature, softcap);
    Scratch<float> blocks(2 * LOGITS_BLOCK, threads);
    with_type(logits_p.type, [&](auto type_p) {
        with_type(logits_q.type, [&](auto type_q) {
            const auto view_p = logits_p.as<decltype(type_p)>();
            const auto view_q = logits_q.as<decltype(type_q)>();
            for_rows(1, count, 2 * vocabulary, threads, [&](int64_t, int64_t n, int64_t worker) {
                const Row<decltype(type_p)> row_p{view_p.at(n), vocabulary, view_p.stride[1]};
                const Row<decltype(type_q)> row_q{view_q.at(n), vocabulary, view_q.stride[1]};
                float *z_p = blocks.of(worker), *z_q = z_p + LOGITS_BLOCK;
                const Totals of_p = totals_of<false>(row_p, scale, z_p), of_q = totals_of<false>(row_q, scale, z_q);
                const F log_total = all(static_cast<float>(of_p.log_total()));
                // Of p (log p - log q) the distances of both to their largest; what the totals add comes at the end.
                double differences = 0.0, probabilities = 0.0;
                for (int64_t start = 0; start < vocabulary; start += LOGITS_BLOCK) {
                    const int64_t some = smaller(LOGITS_BLOCK, vocabulary - start);
                    scaled_block(z_p, nullptr, row_p, start, some, scale);
                    scaled_block(z_q, nullptr, row_q, start, some, scale);
                    D difference{}, probability{};
                    for (int64_t i = 0; i < some; i += LANES) {
                        const F to_p = load(z_p + i) - of_p.highest, to_q = load(z_q + i) - of_q.highest;
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

// A row of logits: its scaled values, their sums under the softmax, the gradient by them.
//
// It is walked in blocks that stay in the first cache: converted, scaled, with their largest value known before the
// first exp. Sums run over a few vectors in float, then over the row in double.
#pragma once
#include "../simd/exp.h"

// One copy for all that call it, so that all get the same bits: each copy may fuse other products with sums.
#if defined(__clang__)
#define VGPO_ONCE __attribute__((noinline))
#else
#define VGPO_ONCE __attribute__((noinline, noclone))
#endif

namespace vgpo::VGPO_TARGET {

typedef double D __attribute__((vector_size(8 * VGPO_LANES)));

constexpr int64_t LOGITS_BLOCK = 2048;  // elements, whole vectors
constexpr int FLOAT_SUM_VECTORS = 16;  // summed in float; LOGITS_BLOCK is a multiple
// exp of it is 0: a logit of -inf becomes it where it is multiplied, so that 0 * log(0) is 0.
constexpr float LOWEST = -1e4f;

// What the softmax is taken of: softcap * tanh(x / softcap) / temperature, or x / temperature where softcap is 0.
struct LogitTransform {
    float inverse_temperature, inverse_cap, capped;  // 1 / temperature, 1 / softcap, softcap / temperature
    bool has_cap;

    VGPO_INLINE LogitTransform(double temperature, double softcap)
        : inverse_temperature(static_cast<float>(1.0 / temperature)), inverse_cap(0.0f), capped(0.0f),
          has_cap(softcap > 0.0) {
        if (!has_cap) return;
        inverse_cap = static_cast<float>(1.0 / softcap);
        capped = static_cast<float>(softcap / temperature);
    }
    // `tanh_x` becomes tanh(x / softcap) if there is a soft-cap.
    VGPO_INLINE F operator()(F x, F& tanh_x) const {
        if (!has_cap) return x * inverse_temperature;
        tanh_x = tanh(x * inverse_cap);
        return tanh_x * capped;
    }
};

// A row of V logits.
template <class T>
struct LogitsRow {
    T* data;
    int64_t size, stride;
};

template <class T>
VGPO_INLINE LogitsRow<T> row_of(const View<T, 3>& logits, int64_t b, int64_t t) {
    return {logits.at(b, t), logits.size[2], logits.stride[2]};
}

template <bool Cap, class T>
VGPO_INLINE float scaled_block(float* z, float* slope, const LogitsRow<T>& row, int64_t start, int64_t count,
                               const LogitTransform& transform) {
    F maximum = broadcast(-INFINITY);
    const T* from = row.data + start * row.stride;
    for (int64_t i = 0; i < count; i += LANES, from += LANES * row.stride) {
        const int64_t some = count - i;
        F tanh_x{}, x = some >= LANES ? load_partial(from, LANES, row.stride) : load_partial(from, some, row.stride);
        if (Cap) {
            tanh_x = tanh(x * transform.inverse_cap);
            x = tanh_x * transform.capped;
            if (slope) store(slope + i, 1.0f - tanh_x * tanh_x);
        } else {
            x = x * transform.inverse_temperature;
        }
        if (some < LANES) x = select(first_lanes(some), x, broadcast(-INFINITY));
        maximum = max(x, maximum);
        store(z + i, x);
    }
    return max_lanes(maximum);
}

// Writes the scaled logits [start, start + count) to `z`, -inf up to a whole vector, and the derivative of the soft-cap
// to `slope` where that is wanted and there is one. Returns the largest; NaN is none.
template <class T>
VGPO_INLINE float scaled_block(float* z, float* slope, const LogitsRow<T>& row, int64_t start, int64_t count,
                               const LogitTransform& transform) {
    return transform.has_cap ? scaled_block<true>(z, slope, row, start, count, transform)
                         : scaled_block<false>(z, slope, row, start, count, transform);
}

VGPO_INLINE float* as_floats(float* data) { return data; }
template <class T>
VGPO_INLINE float* as_floats(T*) { return nullptr; }

// The scaled logits [start, start + count), in `block` or where they are, as whole vectors, and the largest.
template <class T>
VGPO_INLINE const float* scaled_values(float* block, float& maximum, const LogitsRow<T>& row, int64_t start, int64_t count,
                                       const LogitTransform& transform) {
    const float* here = as_floats(row.data);
    const bool scales = transform.has_cap || transform.inverse_temperature != 1.0f;
    if (!here || row.stride != 1 || scales || count % (2 * LANES) != 0) {
        maximum = scaled_block(block, nullptr, row, start, count, transform);
        return block;
    }
    here += start;
    F even = broadcast(-INFINITY), odd = even;
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        even = max(load(here + i), even);
        odd = max(load(here + i + LANES), odd);
    }
    maximum = max_lanes(max(even, odd));
    return here;
}

// One scaled logit; NaN for a place outside of the row.
template <class T>
VGPO_INLINE float scaled_one(const LogitsRow<T>& row, int64_t place, const LogitTransform& transform, float& slope) {
    slope = 1.0f;
    if (place < 0 || place >= row.size) return NAN;
    F tanh_x{};
    const F z = transform(broadcast(to_float(row.data[place * row.stride])), tanh_x);
    if (transform.has_cap) slope = 1.0f - tanh_x[0] * tanh_x[0];
    return z[0];
}

VGPO_INLINE double sum_lanes(const D& x) {
    double sum = 0.0;
    for (int i = 0; i < LANES; ++i) sum += x[i];
    return sum;
}

// Of a row's scaled logits z: the largest, the sum of exp(z - maximum), that of (z - maximum) exp(z - maximum).
struct Totals {
    float maximum = -INFINITY;
    double total = 0.0, weighted = 0.0;

    // Raises the maximum to `higher`.
    VGPO_INLINE void raise(float higher) {
        if (!(higher > maximum)) return;
        const double change = static_cast<double>(maximum) - static_cast<double>(higher);
        const bool first = maximum == -INFINITY;  // nothing was summed yet, but for NaN
        const double factor = first ? 0.0 : std::exp(change);
        weighted = (first ? weighted : weighted + change * total) * factor;
        total *= factor;
        maximum = higher;
    }
    // Subtracted before exp: the maximum, 0 if no logit is above -inf.
    VGPO_INLINE float shift() const { return maximum == -INFINITY ? 0.0f : maximum; }
    VGPO_INLINE double log_total() const { return std::log(total); }
    VGPO_INLINE double lse() const { return static_cast<double>(maximum) + log_total(); }
    VGPO_INLINE double logp(float target_logit) const {
        return static_cast<double>(target_logit) - static_cast<double>(maximum) - log_total();
    }
    VGPO_INLINE double entropy() const { return log_total() - weighted / total; }
};

// exp(z - shift) is written to `exps`, which may be `z`, unless that is null.
template <bool Weighted>
VGPO_INLINE void add_block(Totals& totals, const float* z, int64_t count, float* exps) {
    const F shift = broadcast(totals.shift());
    D total{}, weighted{};
    for (int64_t i = 0; i < count; i += FLOAT_SUM_VECTORS * LANES) {
        const int64_t end = min(count, i + FLOAT_SUM_VECTORS * LANES);
        F sum{}, by_value{};
        for (int64_t j = i; j < end; j += LANES) {
            const F distance = load(z + j) - shift, e = exp(distance);
            sum += e;
            if (Weighted) by_value += e * max(distance, broadcast(LOWEST));
            if (exps) store_partial(exps + j, e, min<int64_t>(LANES, count - j), 1);
        }
        total += __builtin_convertvector(sum, D);
        if (Weighted) weighted += __builtin_convertvector(by_value, D);
    }
    totals.total += sum_lanes(total);
    if (Weighted) totals.weighted += sum_lanes(weighted);
}

// `block` holds a block; `exps` takes exp(z - maximum), with the maximum of all up to its block, which `maximum_of`
// takes for each: both null or none.
template <bool Weighted, class T>
VGPO_ONCE Totals totals_of(const LogitsRow<T>& row, const LogitTransform& transform, float* block, float* exps = nullptr,
                           float* maximum_of = nullptr) {
    Totals totals;
    for (int64_t start = 0; start < row.size; start += LOGITS_BLOCK) {
        const int64_t count = min(LOGITS_BLOCK, row.size - start);
        float maximum;
        const float* z = scaled_values(block, maximum, row, start, count, transform);
        totals.raise(maximum);
        if (exps) *maximum_of++ = totals.maximum;
        add_block<Weighted>(totals, z, count, exps ? exps + start : nullptr);
    }
    return totals;
}

// Multiplies the exps that `totals_of` wrote by `factor`, as if all had been relative to `maximum`.
VGPO_INLINE void rescale_exps(float* exps, int64_t size, const float* maximum_of, float maximum, double factor) {
    for (int64_t start = 0; start < size; start += LOGITS_BLOCK) {
        const double change = static_cast<double>(*maximum_of++) - static_cast<double>(maximum);
        const float by = static_cast<float>(change == 0.0 ? factor : factor * std::exp(change));
        const int64_t end = min(size, start + LOGITS_BLOCK);
        for (int64_t i = start; i < end; i += LANES) {
            const int64_t some = min<int64_t>(LANES, end - i);
            store_partial(exps + i, load_partial(exps + i, some, 1) * by, some, 1);
        }
    }
}

// The derivative by a logit x of which z is made: p (factor - by_entropy (log p + entropy)) slope, with
// p = exp(z - shift), and `at_target` more at the target.
struct Derivative {
    float shift, factor, by_entropy, lse, entropy, at_target;
};

template <bool Entropy, class T, class O>
VGPO_ONCE void write_gradient(const LogitsRow<O>& out, const LogitsRow<T>& row, int64_t target,
                              const LogitTransform& transform, const Derivative& by, float* z, float* slope) {
    const F shift = broadcast(by.shift), factor = broadcast(by.factor);
    auto derivative = [&](F value) {
        const F p = exp(value - shift);
        if (!Entropy) return p * factor;
        return p * (factor - by.by_entropy * (max(value - by.lse, broadcast(LOWEST)) + by.entropy));
    };
    float slope_there;
    // Before the row is overwritten, where `out` is the logits themselves.
    const float target_logit = scaled_one(row, target, transform, slope_there);
    for (int64_t start = 0; start < row.size; start += LOGITS_BLOCK) {
        const int64_t count = min(LOGITS_BLOCK, row.size - start);
        scaled_block(z, slope, row, start, count, transform);
        O* to = out.data + start * out.stride;
        for (int64_t i = 0; i < count; i += LANES, to += LANES * out.stride) {
            F dx = derivative(load(z + i));
            if (transform.has_cap) dx *= load(slope + i);
            store_partial(to, dx, min<int64_t>(LANES, count - i), out.stride);
        }
    }
    if (target >= 0 && target < row.size)
        from_float(out.data + target * out.stride, (derivative(broadcast(target_logit))[0] + by.at_target) * slope_there);
}

template <class O>
VGPO_INLINE void write_zeros(const LogitsRow<O>& out) {
    for (int64_t i = 0; i < out.size; i += LANES)
        store_partial(out.data + i * out.stride, F{}, min<int64_t>(LANES, out.size - i), out.stride);
}

}  // namespace vgpo::VGPO_TARGET

// A row of logits: its scaled values, their sums under the softmax, the gradient by them.
//
// It is walked in blocks that stay in the first cache: converted, scaled, with their largest value known before the
// first exp. Sums run over a few vectors in float, then over the row in double.
#pragma once
#include "exp.h"

// One copy for all that call it, so that all get the same bits: each copy may fuse other products with sums.
#if defined(__clang__)
#define VGPO_ONCE __attribute__((noinline))
#else
#define VGPO_ONCE __attribute__((noinline, noclone))
#endif

namespace vgpo::VGPO_TARGET {

typedef double D __attribute__((vector_size(8 * VGPO_LANES)));

constexpr int64_t LOGITS_BLOCK = 2048;  // elements, whole vectors
constexpr int SUMMED_VECTORS = 16;    // in float; LOGITS_BLOCK is a multiple
// exp of it is 0: a logit of -inf becomes it where it is multiplied, so that 0 * log(0) is 0.
constexpr float LOWEST = -1e4f;

// What the softmax is taken of: softcap * tanh(x / softcap) / temperature, or x / temperature where softcap is 0.
struct Scale {
    float inverse, inverse_cap, capped;  // 1 / temperature, 1 / softcap, softcap / temperature
    bool has_cap;

    VGPO_INLINE Scale(double temperature, double softcap)
        : inverse(static_cast<float>(1.0 / temperature)), inverse_cap(0.0f), capped(0.0f), has_cap(softcap > 0.0) {
        if (!has_cap) return;
        inverse_cap = static_cast<float>(1.0 / softcap);
        capped = static_cast<float>(softcap / temperature);
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
VGPO_INLINE float scaled_block(float* z, float* slope, const Row<T>& row, int64_t start, int64_t count,
                               const Scale& scale) {
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
VGPO_INLINE float scaled_block(float* z, float* slope, const Row<T>& row, int64_t start, int64_t count,
                               const Scale& scale) {
    return scale.has_cap ? scaled_block<true>(z, slope, row, start, count, scale)
                         : scaled_block<false>(z, slope, row, start, count, scale);
}

VGPO_INLINE float* as_floats(float* data) { return data; }
template <class T>
VGPO_INLINE float* as_floats(T*) { return nullptr; }

// The scaled logits [start, start + count), in `block` or where they are, as whole vectors, and the largest.
template <class T>
VGPO_INLINE const float* scaled_values(float* block, float& highest, const Row<T>& row, int64_t start, int64_t count,
                                       const Scale& scale) {
    const float* here = as_floats(row.data);
    if (!here || row.stride != 1 || scale.has_cap || scale.inverse != 1.0f || count % (2 * LANES) != 0) {
        highest = scaled_block(block, nullptr, row, start, count, scale);
        return block;
    }
    here += start;
    F even = all(-INFINITY), odd = even;
    for (int64_t i = 0; i < count; i += 2 * LANES) {
        even = max(load(here + i), even);
        odd = max(load(here + i + LANES), odd);
    }
    highest = max_lanes(max(even, odd));
    return here;
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

// exp(z - shift) is written to `kept`, which may be `z`, unless that is null.
template <bool Weighted>
VGPO_INLINE void add_block(Totals& totals, const float* z, int64_t count, float* kept) {
    const F shift = all(totals.shift());
    D total{}, weighted{};
    for (int64_t i = 0; i < count; i += SUMMED_VECTORS * LANES) {
        const int64_t end = smaller(count, i + SUMMED_VECTORS * LANES);
        F sum{}, by_value{};
        for (int64_t j = i; j < end; j += LANES) {
            const F distance = load(z + j) - shift, e = exp(distance);
            sum += e;
            if (Weighted) by_value += e * max(distance, all(LOWEST));
            if (kept) store_some(kept + j, e, smaller<int64_t>(LANES, count - j), 1);
        }
        total += __builtin_convertvector(sum, D);
        if (Weighted) weighted += __builtin_convertvector(by_value, D);
    }
    totals.total += sum_lanes(total);
    if (Weighted) totals.weighted += sum_lanes(weighted);
}

// `block` holds a block; `kept` takes exp(z - highest), with the highest of all up to its block, which `highest_of`
// takes for each: both null or none.
template <bool Weighted, class T>
VGPO_ONCE Totals totals_of(const Row<T>& row, const Scale& scale, float* block, float* kept = nullptr,
                           float* highest_of = nullptr) {
    Totals totals;
    for (int64_t start = 0; start < row.size; start += LOGITS_BLOCK) {
        const int64_t count = smaller(LOGITS_BLOCK, row.size - start);
        float highest;
        const float* z = scaled_values(block, highest, row, start, count, scale);
        totals.raise(highest);
        if (kept) *highest_of++ = totals.highest;
        add_block<Weighted>(totals, z, count, kept ? kept + start : nullptr);
    }
    return totals;
}

// Multiplies what `totals_of` kept by `factor`, as if all had been relative to `highest`.
VGPO_INLINE void scale_kept(float* kept, int64_t size, const float* highest_of, float highest, double factor) {
    for (int64_t start = 0; start < size; start += LOGITS_BLOCK) {
        const double change = static_cast<double>(*highest_of++) - static_cast<double>(highest);
        const float by = static_cast<float>(change == 0.0 ? factor : factor * std::exp(change));
        const int64_t end = smaller(size, start + LOGITS_BLOCK);
        for (int64_t i = start; i < end; i += LANES) {
            const int64_t some = smaller<int64_t>(LANES, end - i);
            store_some(kept + i, load_some(kept + i, some, 1) * by, some, 1);
        }
    }
}

// The derivative by a logit x of which z is made: p (factor - by_entropy (log p + entropy)) slope, with
// p = exp(z - shift), and `at_target` more at the target.
struct Derivative {
    float shift, factor, by_entropy, lse, entropy, at_target;
};

template <bool Entropy, class T, class O>
VGPO_ONCE void write_gradient(const Row<O>& out, const Row<T>& row, int64_t target, const Scale& scale,
                              const Derivative& by, float* z, float* slope) {
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

}  // namespace vgpo::VGPO_TARGET

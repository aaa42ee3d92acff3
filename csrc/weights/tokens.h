// Focus scores to token and trajectory weights, as in vgpo_kernels/weights/reference.py: elementwise work in float,
// sums in double. The valid tokens of a row are packed first, so that a token's place among them is its position.
#pragma once
#include "groups.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t WEIGHTS_TASK_TOKENS = 16384;  // tokens that are worth a task
constexpr int64_t WEIGHTS_BUFFERS = 4;   // of floats or integers, each as long as a row

typedef double D __attribute__((vector_size(8 * VGPO_LANES)));
typedef int64_t L __attribute__((vector_size(8 * VGPO_LANES)));

enum class Schedule { linear, exponential, step };

struct WeightOptions {
    Schedule schedule;
    double beta, exponent, step_position, tail_start, gated_share, negative_strength;
    bool affine, compensation, gate, intra, inter, normalized_score, mean_score;
    Bounds token, trajectory;
};

// From a tensor of these fields in their order: `_options` of vgpo_kernels/weights/native.py.
inline WeightOptions weight_options(const View<double, 1>& values) {
    expect_size("options", values, {20});
    int64_t place = 0;
    auto number = [&] { return *values.at(place++); };
    auto integer = [&] { return static_cast<int>(number()); };
    auto flag = [&] { return number() != 0.0; };
    auto bounds = [&] {
        const Clamping how = static_cast<Clamping>(integer());
        const double low = number();
        return Bounds{how, low, number()};
    };
    WeightOptions o{};
    o.schedule = static_cast<Schedule>(integer());
    o.beta = number(), o.exponent = number(), o.step_position = number(), o.tail_start = number();
    o.gated_share = number(), o.negative_strength = number();
    o.affine = flag(), o.compensation = flag(), o.gate = flag(), o.intra = flag(), o.inter = flag();
    o.normalized_score = flag(), o.mean_score = flag();
    o.token = bounds(), o.trajectory = bounds();
    return o;
}

struct WeightsArguments {
    WeightOptions options;
    Floats<2> focus;
    View<uint8_t, 2> mask;
    View<uint8_t, 1> visual;
    Maybe<View<uint8_t, 1>> negative;
    double strength;
    View<float, 2> token, normalized;
    View<uint8_t, 2> gate;
    View<float, 1> score;

    VGPO_INLINE bool has_visual(int64_t row) const { return *visual.at(row) != 0; }
    VGPO_INLINE double strength_of(int64_t row) const {
        return negative.present && *negative.view.at(row) != 0 ? strength * options.negative_strength : strength;
    }
};

VGPO_INLINE double sum_doubles(D x) {
    double part[LANES];
    std::memcpy(part, &x, sizeof(x));
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}

// Where lanes lie in a row of `count` elements, from element i on.
VGPO_INLINE I inside(int64_t count, int64_t i) { return first_lanes(min<int64_t>(LANES, count - i)); }

// The bits of floats as integers in the same order, both zeros alike.
VGPO_INLINE I ordered(F x) {
    const I plain = bits<I>(x), nonzero = (plain & 0x7fffffff) == 0 ? I{} : plain;
    return nonzero ^ ((nonzero >> 31) & 0x7fffffff);
}

// The raw scores of a row's valid tokens, side by side; returns how many.
template <class T>
int64_t pack_scores(const WeightsArguments& call, const View<T, 2>& focus, int64_t row, float* raw) {
    const int64_t length = focus.size[1], stride = focus.stride[1];
    int64_t count = 0;
    for (int64_t i = 0; i < length; i += LANES) {
        const int64_t some = min<int64_t>(LANES, length - i);
        const I valid = load_mask(call.mask.at(row, i), some, call.mask.stride[1]);
        const int64_t set = count_set(valid);
        if (set == 0) continue;
        const F x = load_partial(focus.at(row, i), some, stride);
        if (set == LANES) {
            store(raw + count, x);
            count += LANES;
        } else {
            for (int64_t lane = 0; lane < some; ++lane)
                if (valid[lane]) raw[count++] = x[lane];
        }
    }
    return count;
}

// A threshold such that the k largest of `count` keys, ties of the k-th included, are those not below it.
// Halves the range of integers, and stops early where it parts the keys as wanted.
inline int32_t gate_threshold(const int32_t* keys, int64_t count, int64_t k) {
    int32_t least = INT32_MAX, most = INT32_MIN;
    for (int64_t i = 0; i < count; ++i) least = min(least, keys[i]), most = max(most, keys[i]);
    int64_t low = least, high = static_cast<int64_t>(most) + 1;
    while (high - low > 1) {
        const int64_t middle = low + (high - low) / 2;
        const I border = broadcast_int(static_cast<int32_t>(middle));
        I found = I{};
        for (int64_t i = 0; i < count; i += LANES) {
            I part;
            std::memcpy(&part, keys + i, sizeof(part));
            found += part >= border;
        }
        const int64_t above = count_set(found);
        if (above == k) return static_cast<int32_t>(middle);
        (above > k ? low : high) = middle;
    }
    return static_cast<int32_t>(low);
}

// beta * s(p) of the tokens from `first` on.
inline void write_lift(const WeightOptions& options, int64_t first, int64_t count, float* lift) {
    const int32_t begin = static_cast<int32_t>(first), end = static_cast<int32_t>(count);
    const double last = static_cast<double>(max<int64_t>(count, 1)), beta = options.beta;
    if (options.schedule == Schedule::step) {
        for (int32_t i = begin; i < end; ++i)
            lift[i] = static_cast<float>((i + 1) / last >= options.step_position ? beta : 0.0);
    } else if (options.schedule == Schedule::linear) {
        for (int32_t i = begin; i < end; ++i) lift[i] = static_cast<float>(beta * ((i + 1) / last));
    } else if (options.exponent == 2.0) {
        for (int32_t i = begin; i < end; ++i) {
            const double p = (i + 1) / last;
            lift[i] = static_cast<float>(beta * (p * p));
        }
    } else {
        for (int32_t i = begin; i < end; ++i)
            lift[i] = static_cast<float>(beta * std::pow((i + 1) / last, options.exponent));
    }
}

// The valid tokens of a row: how many, the first in the tail, the gate's threshold, and what sums of scores need.
struct PackedRow {
    int64_t count, head;
    int32_t threshold;
    float low, high, raw_low, raw_high;
    double total;
    bool non_finite;
};

// Writes compensated scores to w and the gate to `gate`, 0 or 1.
inline PackedRow compensate(const WeightsArguments& call, int64_t count, const float* raw, float* w, int32_t* keys,
                            float* lift, uint8_t* gate) {
    const WeightOptions& options = call.options;
    PackedRow row{count, 0, INT32_MIN, 0.0f, 0.0f, 0.0f, 0.0f, 0.0, false};
    if (options.compensation && options.gate) {
        row.head = static_cast<int64_t>(static_cast<double>(count) * options.tail_start);
        const int64_t tail = count - row.head;
        const int64_t top = static_cast<int64_t>(static_cast<double>(tail) * options.gated_share);
        for (int64_t i = 0; i < tail; i += LANES) {
            const I part = inside(tail, i) ? ordered(load_partial(raw + row.head + i, min<int64_t>(LANES, tail - i)))
                                           : broadcast_int(INT32_MIN);
            std::memcpy(keys + i, &part, sizeof(part));
        }
        row.threshold = gate_threshold(keys, tail, max<int64_t>(top, 1));
    }
    if (!options.compensation) row.head = count;
    write_lift(options, row.head, count, lift);
    F low = broadcast(INFINITY), high = broadcast(-INFINITY), raw_low = low, raw_high = high, non_finite = F{};
    D total = {};
    for (int64_t i = 0; i < count; i += LANES) {
        const I here = inside(count, i);
        const F x = select(here, load(raw + i), F{});
        F y = options.affine ? (x + 1.0f) * 0.5f : x;
        I opened = I{};
        if (i + LANES > row.head) {
            const I behind = ~first_lanes(max<int64_t>(row.head - i, 0));
            opened = here & behind & (ordered(x) >= broadcast_int(row.threshold));
            y = y * (1.0f + select(opened, load(lift + i), F{}));
        }
        const Bytes opened_bytes = __builtin_convertvector(opened & 1, Bytes);
        std::memcpy(gate + i, &opened_bytes, sizeof(opened_bytes));
        store(w + i, y);
        total += __builtin_convertvector(select(here, y, F{}), D);
        low = select(here, min(y, low), low), high = select(here, max(y, high), high);
        raw_low = select(here, min(x, raw_low), raw_low), raw_high = select(here, max(x, raw_high), raw_high);
        non_finite += x - x;
    }
    row.total = sum_doubles(total), row.low = min_lanes(low), row.high = max_lanes(high);
    row.raw_low = min_lanes(raw_low), row.raw_high = max_lanes(raw_high);
    row.non_finite = !(sum_lanes(non_finite) == 0.0f);
    return row;
}

// Maps w to [0, 1] in place, or to 0 where all are the same; returns the sum.
inline double normalize(const PackedRow& row, bool varies, float* w) {
    D total = {};
    const F low = broadcast(row.low), span = broadcast(varies ? row.high - row.low : 1.0f);
    for (int64_t i = 0; i < row.count; i += LANES) {
        const F x = select(inside(row.count, i), varies ? (load(w + i) - low) / span : F{}, F{});
        store(w + i, x);
        total += __builtin_convertvector(x, D);
    }
    return sum_doubles(total);
}

// The sum of the factors shifted and clamped, and how many lie between the bounds.
VGPO_INLINE void clamped_sum(const float* factors, int64_t count, const Bounds& bounds, double shift, double& total,
                             double& moving) {
    const D low = D{} + bounds.low, high = D{} + bounds.high;
    D sum = {};
    L between = {};
    int64_t i = 0;
    for (; i + LANES <= count; i += LANES) {
        const D x = __builtin_convertvector(load(factors + i), D) + shift;
        between += (x > low) & (x < high);
        sum += x < low ? low : x > high ? high : x;
    }
    for (; i < count; ++i) {
        const double x = factors[i] + shift;
        total += clamped(x, bounds);
        moving += x > bounds.low && x < bounds.high;
    }
    total += sum_doubles(sum);
    for (int lane = 0; lane < LANES; ++lane) moving -= static_cast<double>(between[lane]);
}

// Token factors 1 + psi from the normalized scores x, within the bounds and of that strength.
inline void write_factors(const Bounds& bounds, int64_t count, float mean, double strength, const float* x,
                          float* factors) {
    const F low = broadcast(static_cast<float>(bounds.low)), high = broadcast(static_cast<float>(bounds.high));
    I clipped = I{};
    for (int64_t i = 0; i < count; i += LANES) {
        const F factor = 1.0f + (load(x + i) - mean);
        clipped |= inside(count, i) & ((factor < low) | (factor > high));
        store(factors + i, factor);
    }
    const bool cuts = bounds.how != Clamping::none && count_set(clipped) > 0;
    if (!cuts && strength == 1.0) return;
    double shift = 0.0;
    if (cuts && bounds.how == Clamping::project)
        shift = shift_to_mean(static_cast<double>(count), bounds, [&](double s, double& total, double& moving) {
            clamped_sum(factors, count, bounds, s, total, moving);
        });
    for (int64_t i = 0; i < count; i += LANES) {
        F factor = load(factors + i);
        if (shift != 0.0) factor = __builtin_convertvector(__builtin_convertvector(factor, D) + shift, F);
        if (cuts) factor = max(min(factor, high), low);
        if (strength != 1.0) factor = 1.0f + static_cast<float>(strength) * (factor - 1.0f);
        store(factors + i, factor);
    }
}

// Puts the results of packed tokens to their columns; 1, 0 and no gate elsewhere.
inline void unpack_row(const WeightsArguments& call, int64_t row, const float* factors, const float* x, const uint8_t* gate,
                       bool visible) {
    const int64_t length = call.mask.size[1];
    int64_t next = 0;
    for (int64_t i = 0; i < length; i += LANES) {
        const int64_t some = min<int64_t>(LANES, length - i);
        const I valid = visible ? load_mask(call.mask.at(row, i), some, call.mask.stride[1]) : I{};
        const int64_t set = count_set(valid);
        F factor = broadcast(1.0f), normalized = F{};
        Bytes opened = {};
        if (set == LANES) {
            factor = factors ? load(factors + next) : factor;
            normalized = load(x + next);
            std::memcpy(&opened, gate + next, sizeof(opened));
            next += LANES;
        } else if (set > 0) {
            for (int64_t lane = 0; lane < some; ++lane) {
                if (!valid[lane]) continue;
                if (factors) factor[lane] = factors[next];
                normalized[lane] = x[next], opened[lane] = gate[next];
                ++next;
            }
        }
        store_partial(call.token.at(row, i), factor, some, call.token.stride[1]);
        store_partial(call.normalized.at(row, i), normalized, some, call.normalized.stride[1]);
        if (set == LANES && call.gate.stride[1] == 1) std::memcpy(call.gate.at(row, i), &opened, sizeof(opened));
        else
            for (int64_t lane = 0; lane < some; ++lane) *call.gate.at(row, i + lane) = opened[lane];
    }
}

// Writes a row's token results and score; returns its score within its group, infinite if it is left out of it.
inline double weigh_row(const WeightsArguments& call, int64_t row, float* buffer) {
    const WeightOptions& options = call.options;
    const int64_t length = call.mask.size[1], padded = divide_up(length, LANES) * LANES + LANES;
    float *raw = buffer, *w = raw + padded, *keys = w + padded, *lift = keys + padded;
    uint8_t* gate = reinterpret_cast<uint8_t*>(lift + padded);
    const bool visible = call.has_visual(row);
    int64_t count = 0;
    if (visible)
        with_type(call.focus.type, [&](auto type) {
            count = pack_scores(call, call.focus.as<decltype(type)>(), row, raw);
        });
    const PackedRow packed = compensate(call, count, raw, w, reinterpret_cast<int32_t*>(keys), lift, gate);
    const bool varies = packed.high > packed.low && packed.raw_high > packed.raw_low;
    const double members = static_cast<double>(max<int64_t>(count, 1));
    const double mean = normalize(packed, varies, w) / members;
    float* factors = options.intra ? raw : nullptr;
    if (factors) write_factors(options.token, count, static_cast<float>(mean), call.strength_of(row), w, factors);
    unpack_row(call, row, factors, w, gate, visible);
    double score = options.normalized_score ? mean : packed.total / members;
    if (!options.mean_score) score *= static_cast<double>(count);
    if (packed.non_finite) score = NAN;
    *call.score.at(row) = static_cast<float>(score);
    return count == 0 ? INFINITY : score;
}

void weights(View<float, 2> token, View<float, 1> trajectory, View<float, 2> normalized, View<uint8_t, 2> gate,
             View<float, 1> score, Floats<2> focus, View<uint8_t, 2> mask, View<int64_t, 1> groups,
             View<uint8_t, 1> visual, Maybe<View<uint8_t, 1>> negative, View<double, 1> options, double strength,
             int64_t threads) {
    const int64_t rows = focus.size[0], length = focus.size[1];
    expect_size("token", token, {rows, length});
    expect_size("trajectory", trajectory, {rows});
    expect_size("normalized", normalized, {rows, length});
    expect_size("gate", gate, {rows, length});
    expect_size("score", score, {rows});
    expect_size("mask", mask, {rows, length});
    expect_size("groups", groups, {rows});
    expect_size("visual", visual, {rows});
    expect_size("negative", negative, {rows});
    expect(length < INT32_MAX, "focus: expected fewer than 2^31 - 1 columns");
    WeightsArguments call{weight_options(options), focus, mask, visual, negative, strength, token, normalized,
                     gate, score};
    const int64_t rows_per_task = max<int64_t>(WEIGHTS_TASK_TOKENS / max<int64_t>(length, 1), 1);
    const int64_t tasks = divide_up(rows, rows_per_task);
    const int64_t padded = divide_up(length, LANES) * LANES + LANES;
    Scratch<float> buffers((WEIGHTS_BUFFERS + 1) * padded, threads);
    Scratch<double> scores(rows);
    auto weigh = [&](int64_t task, int64_t worker) {
        for (int64_t row = task * rows_per_task; row < min(rows, (task + 1) * rows_per_task); ++row)
            scores.of(0)[row] = weigh_row(call, row, buffers.of(worker));
    };
    parallel(tasks, threads, weigh);
    if (call.options.inter) weigh_groups(scores.of(0), groups, call.options.trajectory);
    for (int64_t row = 0; row < rows; ++row) {
        // Rows that are left out have the factor 1, of any strength.
        const double factor = call.options.inter ? scaled(scores.of(0)[row], call.strength_of(row)) : 1.0;
        *trajectory.at(row) = static_cast<float>(factor);
    }
}

}  // namespace vgpo::VGPO_TARGET

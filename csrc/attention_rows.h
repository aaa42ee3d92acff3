// The rows of attention and their memory, and the softmax that goes along a block of keys.
#pragma once
#include "attention_tiles.h"
#include "exp.h"

namespace vgpo::VGPO_TARGET::attention {

constexpr int64_t MOST_ROWS = 144;  // of a task: whole panels in every target
constexpr int64_t KEYS = 96;        // in a block: scores, keys and values stay in the second cache
constexpr int FEW = LANES < 8 ? LANES : 8;
constexpr int64_t PIECE = 512;  // keys that are worth a task
constexpr int64_t TASKS = 256;  // enough for any number of threads: keys are split until there are as many

constexpr uint8_t HIDDEN = 0, VISUAL = 2;
enum Sight : int32_t { NOBODY, SOME, EVERYBODY };
constexpr int32_t STRANGE = INT32_MIN;  // in Rows::change: values that are not finite, which some rows must not meet

// The rows of a task and what is known of them; memory of one worker.
struct Rows {
    int64_t count, width;                  // rows there are, and as many as are computed
    float *queries, *out;                  // packed; (width x stride)
    float *scores, *keys, *values;         // of a block: (KEYS x width), (KEYS x stride) twice
    float* weight;                         // of a block's keys: 1 for a visual one, -1 for a hidden one, else 0
    float *peak, *sum, *visual, *factor;   // by row: largest score, sums of exp, what sums so far are multiplied with
    int32_t *start, *end;                  // by row: the keys it sees
    int32_t *change, *sight;               // by key of a block: rows that begin less rows that end; a Sight
};

// How the memory of a worker is cut up.
struct Room {
    Room(int64_t rows, int64_t depth, int64_t workers)
        : stride(divide_up(depth, LANES) * LANES),
          // Rows an odd number of vectors apart: a power of two would put a column into few sets of the cache.
          block_stride(stride + (stride / LANES % 2 == 0 ? LANES : 0)),
          width(divide_up(larger<int64_t>(smaller(rows, MOST_ROWS), LANES), LANES) * LANES),
          floats(divide_up(width, TILE_COLUMNS) * TILE_COLUMNS * stride + width * stride + KEYS * width +
                     2 * KEYS * block_stride + KEYS * LANES + 4 * width, workers),
          integers(2 * width + 2 * KEYS + 1, workers) {}

    Rows rows(int64_t worker) const {
        float* f = floats.of(worker);
        int32_t* i = integers.of(worker);
        auto take = [](auto*& from, int64_t count) { return (from += count) - count; };
        Rows rows{};
        rows.scores = take(f, KEYS * width), rows.out = take(f, width * stride);
        rows.queries = take(f, divide_up(width, TILE_COLUMNS) * TILE_COLUMNS * stride);
        rows.keys = take(f, KEYS * block_stride), rows.values = take(f, KEYS * block_stride);
        rows.peak = take(f, width), rows.sum = take(f, width), rows.visual = take(f, width);
        rows.factor = take(f, width), rows.weight = take(f, KEYS * LANES);
        rows.start = take(i, width), rows.end = take(i, width);
        rows.change = take(i, KEYS + 1), rows.sight = take(i, KEYS);
        return rows;
    }

    const int64_t stride, block_stride, width;
    const Scratch<float> floats;
    const Scratch<int32_t> integers;
};

VGPO_INLINE I load_integers(const int32_t* p) {
    I x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}

// What is subtracted before exp: 0 for rows that have seen nothing, or infinity.
VGPO_INLINE F shift_of(F peak) { return select((peak > -INFINITY) & (peak < INFINITY), peak, F{}); }
VGPO_INLINE float shift_of(float peak) { return peak > -INFINITY && peak < INFINITY ? peak : 0.0f; }

// Where a vector holds `PER` rows for several keys: the sum, or the largest, of each row, in every place of the row.
template <int PER, class Fold>
VGPO_INLINE F fold_rows(F x, Fold fold) {
    if constexpr (PER == LANES) return x;
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width >= PER; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = fold(part[i], part[i + width]);
    for (int i = PER; i < LANES; ++i) part[i] = part[i % PER];
    return load(part);
}

// Makes scores probabilities but for a factor by row, and brings peak, sum, visual and factor up to date. PER is how
// many rows a vector holds; `first` the first of `count` keys; `masked` says that not every row sees every key.
template <int PER>
void soften(const Rows& rows, int64_t first, int64_t count, bool masked, float scale, float softcap) {
    constexpr int SHARE = LANES / PER;  // keys in a vector
    const int64_t line = SHARE > 1 ? LANES : rows.width, steps = divide_up(count, SHARE);
    for (int64_t column = 0; column < line; column += LANES) {
        float* scores = rows.scores + column;
        const F before = load(rows.peak + column);
        F peak = before;
        auto weight_of = [&](int64_t step) {
            return SHARE > 1 ? load(rows.weight + step * LANES) : all(rows.weight[step]);
        };
        auto scale_all = [&](auto capped, auto cut) {
            const I start = load_integers(rows.start + column), own_end = load_integers(rows.end + column);
            const I limit = all_of(static_cast<int32_t>(first + count)), end = own_end < limit ? own_end : limit;
            I key = all_of(static_cast<int32_t>(first)) + lane_numbers() / PER;
            for (int64_t step = 0; step < steps; ++step, key += SHARE) {
                F score = load(scores + step * line) * scale;
                if (decltype(capped)::value) score = tanh(score / softcap) * softcap;
                if (decltype(cut)::value)
                    score = select((key >= start) & (key < end) & (weight_of(step) >= 0.0f), score, all(-INFINITY));
                store(scores + step * line, score);
                peak = max(score, peak);
            }
        };
        with_count<2>(softcap > 0.0f ? 2 : 1, [&](auto c) {
            with_count<2>(masked ? 2 : 1, [&](auto m) {
                scale_all(Constant<decltype(c)::value - 1>{}, Constant<decltype(m)::value - 1>{});
            });
        });
        peak = fold_rows<PER>(peak, [](float a, float b) { return larger(a, b); });
        const F shift = shift_of(peak), factor = exp(before - shift);
        F sum{}, visual{};
        for (int64_t step = 0; step < steps; ++step) {
            const F p = exp(load(scores + step * line) - shift);
            store(scores + step * line, p);
            sum += p, visual += p * weight_of(step);
        }
        auto add = [](float a, float b) { return a + b; };
        store(rows.peak + column, peak), store(rows.factor + column, factor);
        store(rows.sum + column, load(rows.sum + column) * factor + fold_rows<PER>(sum, add));
        store(rows.visual + column, load(rows.visual + column) * factor + fold_rows<PER>(visual, add));
    }
}

// Copies a row, up to a whole vector; returns whether it is finite.
template <class T>
VGPO_INLINE bool copy_row(float* to, const T* from, int64_t depth, int64_t stride) {
    F strange{};
    for (int64_t d = 0; d < depth; d += LANES) {
        const F x = load_some(from + d * stride, smaller<int64_t>(LANES, depth - d), stride);
        store(to + d, x);
        strange += x - x;
    }
    return sum_lanes(strange) == 0.0f;
}

VGPO_INLINE void clear_row(float* to, int64_t length) { std::memset(to, 0, length * sizeof(float)); }

}  // namespace vgpo::VGPO_TARGET::attention

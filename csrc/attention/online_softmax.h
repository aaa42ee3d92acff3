// The rows of attention and their memory, and the softmax that goes along a block of keys.
#pragma once
#include "../simd/exp.h"
#include "key_products.h"
#include "visibility.h"

namespace vgpo::VGPO_TARGET::attention {

constexpr int64_t MAX_ROWS = 144;   // of a task: whole panels in every target
constexpr int64_t BLOCK_KEYS = 96;  // in a block: scores, keys and values stay in the second cache
constexpr int FEW_ROWS = LANES < 8 ? LANES : 8;
constexpr int64_t SPLIT_KEYS = 512;    // keys that are worth a task
constexpr int64_t TARGET_TASKS = 256;  // enough for any number of threads: keys are split until there are as many

constexpr uint8_t HIDDEN = 0, VISUAL = 2;
// In QueryRows::change: values that are not finite, on a key that is hidden from some rows.
constexpr int32_t NON_FINITE = INT32_MIN;

// The rows of a task, their sums and their block of keys; memory of one worker.
struct QueryRows {
    int64_t count, width;                  // of rows: valid, computed
    float *queries, *out;                  // packed; (width x stride)
    float *scores, *keys, *values;         // of a block: (BLOCK_KEYS x width), (BLOCK_KEYS x stride) twice
    float* weight;                         // of a block's keys: 1 for a visual one, -1 for a hidden one, else 0
    float *maximum, *sum, *visual, *factor;  // by row: largest score, sums of exp, factor of the sums so far
    int32_t *start, *end;                  // by row: its interval of keys
    int32_t *change, *visibility;          // by key of a block: rows that begin less rows that end; a Visibility
};

// The memory of every worker, and how it is divided.
struct Workspace {
    Workspace(int64_t rows, int64_t depth, int64_t workers)
        : stride(divide_up(depth, LANES) * LANES),
          // Rows an odd number of vectors apart: a power of two would put a column into few sets of the cache.
          block_stride(stride + (stride / LANES % 2 == 0 ? LANES : 0)),
          width(divide_up(max<int64_t>(min(rows, MAX_ROWS), LANES), LANES) * LANES),
          floats(divide_up(width, TILE_COLUMNS) * TILE_COLUMNS * stride + width * stride + BLOCK_KEYS * width +
                     2 * BLOCK_KEYS * block_stride + BLOCK_KEYS * LANES + 4 * width, workers),
          integers(2 * width + 2 * BLOCK_KEYS + 1, workers) {}

    QueryRows rows(int64_t worker) const {
        float* f = floats.of(worker);
        int32_t* i = integers.of(worker);
        auto take = [](auto*& from, int64_t count) { return (from += count) - count; };
        QueryRows rows{};
        rows.scores = take(f, BLOCK_KEYS * width), rows.out = take(f, width * stride);
        rows.queries = take(f, divide_up(width, TILE_COLUMNS) * TILE_COLUMNS * stride);
        rows.keys = take(f, BLOCK_KEYS * block_stride), rows.values = take(f, BLOCK_KEYS * block_stride);
        rows.maximum = take(f, width), rows.sum = take(f, width), rows.visual = take(f, width);
        rows.factor = take(f, width), rows.weight = take(f, BLOCK_KEYS * LANES);
        rows.start = take(i, width), rows.end = take(i, width);
        rows.change = take(i, BLOCK_KEYS + 1), rows.visibility = take(i, BLOCK_KEYS);
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

// Subtracted before exp: the maximum, 0 if that is infinite (no score yet, or one of inf).
VGPO_INLINE F shift_of(F maximum) { return select((maximum > -INFINITY) & (maximum < INFINITY), maximum, F{}); }
VGPO_INLINE float shift_of(float maximum) { return maximum > -INFINITY && maximum < INFINITY ? maximum : 0.0f; }

// Where a vector holds `PER` rows for several keys: the sum, or the largest, of each row, in every place of the row.
template <int PER, class Fold>
VGPO_INLINE F reduce_rows(F x, Fold fold) {
    if constexpr (PER == LANES) return x;
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width >= PER; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = fold(part[i], part[i + width]);
    for (int i = PER; i < LANES; ++i) part[i] = part[i % PER];
    return load(part);
}

// Makes scores probabilities but for a factor by row, and brings maximum, sum, visual and factor up to date. PER is how
// many rows a vector holds; `first` the first of `count` keys; `masked`: not every key is visible to every row.
template <int PER>
void online_softmax_update(const QueryRows& rows, int64_t first, int64_t count, bool masked, float scale, float softcap) {
    constexpr int SHARE = LANES / PER;  // keys in a vector
    const int64_t line = SHARE > 1 ? LANES : rows.width, steps = divide_up(count, SHARE);
    for (int64_t column = 0; column < line; column += LANES) {
        float* scores = rows.scores + column;
        const F before = load(rows.maximum + column);
        F maximum = before;
        auto weight_of = [&](int64_t step) {
            return SHARE > 1 ? load(rows.weight + step * LANES) : broadcast(rows.weight[step]);
        };
        auto scale_scores = [&](auto capped, auto cut) {
            const I start = load_integers(rows.start + column), own_end = load_integers(rows.end + column);
            const I limit = broadcast_int(static_cast<int32_t>(first + count)), end = own_end < limit ? own_end : limit;
            I key = broadcast_int(static_cast<int32_t>(first)) + lane_numbers() / PER;
            for (int64_t step = 0; step < steps; ++step, key += SHARE) {
                F score = load(scores + step * line) * scale;
                if (decltype(capped)::value) score = tanh(score / softcap) * softcap;
                if (decltype(cut)::value)
                    score = select((key >= start) & (key < end) & (weight_of(step) >= 0.0f), score, broadcast(-INFINITY));
                store(scores + step * line, score);
                maximum = max(score, maximum);
            }
        };
        with_count<2>(softcap > 0.0f ? 2 : 1, [&](auto c) {
            with_count<2>(masked ? 2 : 1, [&](auto m) {
                scale_scores(Constant<decltype(c)::value - 1>{}, Constant<decltype(m)::value - 1>{});
            });
        });
        maximum = reduce_rows<PER>(maximum, [](float a, float b) { return max(a, b); });
        const F shift = shift_of(maximum), factor = exp(before - shift);
        F sum{}, visual{};
        for (int64_t step = 0; step < steps; ++step) {
            const F p = exp(load(scores + step * line) - shift);
            store(scores + step * line, p);
            sum += p, visual += p * weight_of(step);
        }
        auto add = [](float a, float b) { return a + b; };
        store(rows.maximum + column, maximum), store(rows.factor + column, factor);
        store(rows.sum + column, load(rows.sum + column) * factor + reduce_rows<PER>(sum, add));
        store(rows.visual + column, load(rows.visual + column) * factor + reduce_rows<PER>(visual, add));
    }
}

// Copies a row, up to a whole vector; returns whether it is finite.
template <class T>
VGPO_INLINE bool copy_row(float* to, const T* from, int64_t depth, int64_t stride) {
    F non_finite{};
    for (int64_t d = 0; d < depth; d += LANES) {
        const F x = load_partial(from + d * stride, min<int64_t>(LANES, depth - d), stride);
        store(to + d, x);
        non_finite += x - x;
    }
    return sum_lanes(non_finite) == 0.0f;
}

VGPO_INLINE void clear_row(float* to, int64_t length) { std::memset(to, 0, length * sizeof(float)); }

}  // namespace vgpo::VGPO_TARGET::attention

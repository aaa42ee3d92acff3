// The focus score: prototypes of the visual tokens, then the largest cosine of each completion token to its own.
//
// Every row that counts is read from memory once, no other row ever. Sums of a fixed number of rows each are merged in
// order, so that they are the same whatever the number of threads.
#pragma once
#include "simd/vector.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t FOCUS_SUM_ROWS = 64;        // rows of a task that sums visual ones
constexpr int64_t FOCUS_SCORE_TOKENS = 32;    // tokens of a task that scores
constexpr int64_t FOCUS_MERGE_COLUMNS = 512;  // columns of a task that merges sums
constexpr int64_t FOCUS_PARTIALS = 32;        // terms of a partial sum
constexpr int FOCUS_UNROLL = 4;               // rows read side by side

// Rows of states by the numbers of their tokens, row * L + position.
template <class T>
struct FocusStates {
    View<T, 3> states;

    VGPO_INLINE const T* row(int64_t token) const {
        return states.at(token / states.size[1], token % states.size[1]);
    }
};

// ROWS rows, whose columns are side by side, and those to be read after them.
template <int ROWS, class T>
struct FocusRows {
    const T* at[ROWS];
    const T* next[ROWS];

    // Prefetches the next rows while these are read: the processor prefetches along a row only.
    VGPO_INLINE void prefetch_next(int64_t d) const {
        if (d * sizeof(T) % 64 != 0) return;
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) __builtin_prefetch(next[r] + d);
    }
};

// Calls body with the rows of `tokens`, `stride` numbers apart, of which `left` follow; rows whose columns are not
// contiguous are gathered into `buffer` first.
template <int ROWS, class T, class Body>
VGPO_INLINE void with_rows(const FocusStates<T>& from, const int64_t* tokens, int64_t stride, int64_t left, float* buffer,
                           int64_t width, Body& body) {
    const View<T, 3>& states = from.states;
    if (states.stride[2] == 1) {
        FocusRows<ROWS, T> rows;
        for (int r = 0; r < ROWS; ++r) {
            rows.at[r] = from.row(tokens[r * stride]);
            rows.next[r] = from.row(tokens[(r + (left >= 2 * ROWS ? ROWS : 0)) * stride]);
        }
        return body(rows);
    }
    FocusRows<ROWS, float> rows;
    for (int r = 0; r < ROWS; ++r) {
        const T* row = from.row(tokens[r * stride]);
        for (int64_t d = 0; d < states.size[2]; d += LANES)
            store(buffer + r * width + d,
                  load_partial(row + d * states.stride[2], min<int64_t>(LANES, states.size[2] - d), states.stride[2]));
        rows.at[r] = rows.next[r] = buffer + r * width;
    }
    body(rows);
}

// sum (up to whole vectors) += rows.
template <int ROWS, class T>
VGPO_INLINE void add_rows(float* sum, const FocusRows<ROWS, T>& rows, int64_t columns) {
    int64_t d = 0;
    for (; d + LANES <= columns; d += LANES) {
        rows.prefetch_next(d);
        F part = load(rows.at[0] + d);
#pragma GCC unroll 4
        for (int r = 1; r < ROWS; ++r) part += load(rows.at[r] + d);
        store(sum + d, load(sum + d) + part);
    }
    if (d == columns) return;
    F part = load_partial(rows.at[0] + d, columns - d);
    for (int r = 1; r < ROWS; ++r) part += load_partial(rows.at[r] + d, columns - d);
    store(sum + d, load(sum + d) + part);
}

// Inner products of rows with prototypes, and of rows with themselves.
template <int ROWS, int PROTOTYPES>
struct FocusProducts {
    float inner[ROWS][PROTOTYPES], square[ROWS];

    template <class T>
    VGPO_INLINE void run(const FocusRows<ROWS, T>& rows, const float* const (&prototypes)[PROTOTYPES], int64_t columns) {
        F total[ROWS][PROTOTYPES + 1] = {};
        for (int64_t from = 0; from < columns; from += FOCUS_PARTIALS * LANES) {
            const int64_t to = min(columns, from + FOCUS_PARTIALS * LANES);
            F part[ROWS][PROTOTYPES + 1] = {};
            int64_t d = from;
            for (; d + LANES <= to; d += LANES) {
                rows.prefetch_next(d);
                step(part, prototypes, d, [&](int r) { return load(rows.at[r] + d); });
            }
            if (d < to) step(part, prototypes, d, [&](int r) { return load_partial(rows.at[r] + d, to - d); });
            for (int r = 0; r < ROWS; ++r)
                for (int p = 0; p <= PROTOTYPES; ++p) total[r][p] += part[r][p];
        }
        for (int r = 0; r < ROWS; ++r) {
            for (int p = 0; p < PROTOTYPES; ++p) inner[r][p] = sum_lanes(total[r][p]);
            square[r] = sum_lanes(total[r][PROTOTYPES]);
        }
    }

private:
    template <class Load>
    static VGPO_INLINE void step(F (&part)[ROWS][PROTOTYPES + 1], const float* const (&prototypes)[PROTOTYPES], int64_t d,
                                 Load load_row) {
        F mean[PROTOTYPES];
#pragma GCC unroll 2
        for (int p = 0; p < PROTOTYPES; ++p) mean[p] = load(prototypes[p] + d);
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; ++r) {
            const F x = load_row(r);
#pragma GCC unroll 2
            for (int p = 0; p < PROTOTYPES; ++p) part[r][p] += x * mean[p];
            part[r][PROTOTYPES] += x * x;
        }
    }
};

// The larger of two, NaN where either is NaN.
VGPO_INLINE float max_or_nan(float a, float b) { return a != a || b <= a ? a : b; }

// Cosine from an inner product, a square and a norm: 0 where either is zero, in [-1, 1] or NaN.
VGPO_INLINE float cosine(float inner, float square, float norm) {
    const float norms = std::sqrt(square) * norm;
    const float x = norms == 0.0f ? 0.0f : inner / norms;
    return x > 1.0f ? 1.0f : x < -1.0f ? -1.0f : x;
}

// The prototypes: their means (width columns, 0 past D), their norms, and the bounds of their tokens.
struct FocusPrototypes {
    const float* means;
    const float* norms;
    const int64_t* bounds;
    int64_t width;

    VGPO_INLINE bool exists(int64_t p) const { return bounds[p] < bounds[p + 1]; }
};

// largest[r] = the largest of itself and the cosines of ROWS rows to prototypes p, p + 1, ...
template <int ROWS, int PROTOTYPES, class T>
VGPO_INLINE void score_some(float* largest, const FocusRows<ROWS, T>& rows, const FocusPrototypes& prototypes, int64_t p,
                            int64_t columns) {
    const float* means[PROTOTYPES];
    for (int i = 0; i < PROTOTYPES; ++i) means[i] = prototypes.means + (p + i) * prototypes.width;
    FocusProducts<ROWS, PROTOTYPES> products;
    products.run(rows, means, columns);
    for (int i = 0; i < PROTOTYPES; ++i)
        for (int r = 0; r < ROWS && prototypes.exists(p + i); ++r)
            largest[r] =
                max_or_nan(largest[r], cosine(products.inner[r][i], products.square[r], prototypes.norms[p + i]));
}

// largest[r] = the largest cosine of ROWS tokens to the prototypes in [begin, end), 0 if there is none.
template <int ROWS, class T>
void score_rows(float* largest, const FocusStates<T>& states, const int64_t* tokens, int64_t stride, int64_t left,
                const FocusPrototypes& prototypes, int64_t begin, int64_t end, float* buffer) {
    while (begin < end && !prototypes.exists(begin)) ++begin;
    for (int r = 0; r < ROWS; ++r) largest[r] = begin < end ? -1.0f : 0.0f;
    if (begin >= end) return;  // the rows are not read
    auto score = [&](const auto& rows) {
        int64_t p = begin;
        for (; p + 1 < end; p += 2) score_some<ROWS, 2>(largest, rows, prototypes, p, states.states.size[2]);
        if (p < end) score_some<ROWS, 1>(largest, rows, prototypes, p, states.states.size[2]);
    };
    with_rows<ROWS>(states, tokens, stride, left, buffer, prototypes.width, score);
}

// Sums FOCUS_SUM_ROWS rows of one prototype at most.
template <class T>
void sum_rows(float* sum, const FocusStates<T>& states, const int64_t* tokens, int64_t stride, int64_t count, float* buffer,
              int64_t width) {
    for (int64_t d = 0; d < width; d += LANES) store(sum + d, F{});
    auto add = [&](const auto& rows) { add_rows(sum, rows, states.states.size[2]); };
    int64_t r = 0;
    for (; r + FOCUS_UNROLL <= count; r += FOCUS_UNROLL)
        with_rows<FOCUS_UNROLL>(states, tokens + r * stride, stride, count - r, buffer, width, add);
    for (; r < count; ++r) with_rows<1>(states, tokens + r * stride, stride, count - r, buffer, width, add);
}

// mean = columns [from, to), whole vectors, of `count` sums over `tokens` tokens; returns the sum of its squares.
VGPO_INLINE float merge_sums(float* mean, const float* sums, int64_t count, int64_t width, int64_t from, int64_t to,
                             int64_t tokens) {
    F square{};
    for (int64_t d = from; d < to; d += LANES) {
        F total{};
        for (int64_t first = 0; first < count; first += FOCUS_PARTIALS) {
            F part{};
            for (int64_t i = first; i < min(count, first + FOCUS_PARTIALS); ++i) part += load(sums + i * width + d);
            total += part;
        }
        total = total / static_cast<float>(tokens);
        store(mean + d, total);
        square += total * total;
    }
    return sum_lanes(square);
}

template <class T>
void score_focus(View<float, 1> focus, FocusStates<T> states, View<int64_t, 1> visual, const int64_t* bounds, int64_t count,
                 View<int64_t, 1> completion, Maybe<View<int32_t, 1>> begin, Maybe<View<int32_t, 1>> end,
                 int64_t threads) {
    const int64_t columns = states.states.size[2], width = divide_up(columns, LANES) * LANES;
    Scratch<float> buffer(states.states.stride[2] == 1 ? 0 : FOCUS_UNROLL * width, threads);

    // The tasks of prototype p are [first_task[p], first_task[p + 1]).
    Scratch<int64_t> first_task(count + 1);
    first_task.of(0)[0] = 0;
    for (int64_t p = 0; p < count; ++p)
        first_task.of(0)[p + 1] = first_task.of(0)[p] + divide_up(bounds[p + 1] - bounds[p], FOCUS_SUM_ROWS);
    const int64_t* tasks = first_task.of(0);
    Scratch<float> sums(width * tasks[count]);
    auto sum = [&](int64_t task, int64_t worker) {
        int64_t p = 0, high = count;  // the last prototype whose tasks begin at or before this one
        while (high - p > 1) (tasks[(p + high) / 2] <= task ? p : high) = (p + high) / 2;
        const int64_t first = bounds[p] + (task - tasks[p]) * FOCUS_SUM_ROWS;
        sum_rows(sums.of(0) + task * width, states, visual.at(first), visual.stride[0],
                 min(FOCUS_SUM_ROWS, bounds[p + 1] - first), buffer.of(worker), width);
    };
    parallel(tasks[count], threads, sum);

    const int64_t pieces = divide_up(columns, FOCUS_MERGE_COLUMNS);
    Scratch<float> means(width * count), squares(pieces * count), norms(count);
    auto merge = [&](int64_t task, int64_t) {
        const int64_t p = task / pieces, from = task % pieces * FOCUS_MERGE_COLUMNS;
        squares.of(0)[task] = merge_sums(means.of(0) + p * width, sums.of(0) + tasks[p] * width, tasks[p + 1] - tasks[p],
                                         width, from, min(width, from + FOCUS_MERGE_COLUMNS), bounds[p + 1] - bounds[p]);
    };
    parallel(pieces * count, threads, merge);
    for (int64_t p = 0; p < count; ++p) {
        float square = 0.0f;
        for (int64_t i = 0; i < pieces; ++i) square += squares.of(0)[p * pieces + i];
        norms.of(0)[p] = std::sqrt(square);
    }

    const FocusPrototypes prototypes{means.of(0), norms.of(0), bounds, width};
    auto score = [&](int64_t task, int64_t worker) {
        const int64_t last = min(completion.size[0], (task + 1) * FOCUS_SCORE_TOKENS);
        auto first_of = [&](int64_t i) {
            return begin.present ? *begin.view.at(i) : *completion.at(i) / states.states.size[1];
        };
        auto end_of = [&](int64_t i) { return end.present ? *end.view.at(i) : first_of(i) + 1; };
        for (int64_t i = task * FOCUS_SCORE_TOKENS; i < last;) {
            int64_t same = 1;  // tokens from here on with the same prototypes
            while (same < FOCUS_UNROLL && i + same < last && first_of(i + same) == first_of(i) &&
                   end_of(i + same) == end_of(i))
                ++same;
            float largest[FOCUS_UNROLL];
            const int64_t rows = same == FOCUS_UNROLL ? same : 1;
            (rows == 1 ? score_rows<1, T> : score_rows<FOCUS_UNROLL, T>)(
                largest, states, completion.at(i), completion.stride[0], completion.size[0] - i, prototypes, first_of(i),
                end_of(i), buffer.of(worker));
            for (int64_t r = 0; r < rows; ++r) *focus.at(*completion.at(i + r)) = largest[r];
            i += rows;
        }
    };
    parallel(divide_up(completion.size[0], FOCUS_SCORE_TOKENS), threads, score);
}

VGPO_INLINE void expect_within(const char* what, const View<int64_t, 1>& numbers, int64_t high, bool rising = false) {
    int64_t before = 0;
    bool valid = true;
    for (int64_t i = 0; i < numbers.size[0]; ++i) {
        const int64_t x = *numbers.at(i);
        valid &= x >= before && x < high;
        if (rising) before = x;
    }
    expect(valid, what);
}

void visual_focus(View<float, 1> focus, Floats<3> states, View<int64_t, 1> visual, View<int64_t, 1> bounds,
                  View<int64_t, 1> completion, Maybe<View<int32_t, 1>> begin, Maybe<View<int32_t, 1>> end, int64_t threads) {
    const int64_t tokens = states.size[0] * states.size[1], count = bounds.size[0] - 1;
    expect_size("focus", focus, {tokens});
    expect_size("begin", begin, {completion.size[0]});
    expect_size("end", end, {completion.size[0]});
    expect(begin.present == end.present, "begin, end: expected both or none");
    expect(count >= 0, "bounds: expected at least one");
    expect(begin.present || count == states.size[0], "bounds: expected one more than rows of states, where begin is None");
    expect_within("visual: expected numbers of tokens", visual, tokens);
    expect_within("completion: expected numbers of tokens", completion, tokens);
    expect_within("bounds: expected rising numbers of visual tokens", bounds, visual.size[0] + 1, true);
    bool valid = true;
    for (int64_t i = 0; begin.present && i < completion.size[0]; ++i)
        valid &= *begin.view.at(i) >= 0 && *begin.view.at(i) <= *end.view.at(i) && *end.view.at(i) <= count;
    expect(valid, "begin, end: expected ranges of prototypes");
    Scratch<int64_t> copied(count + 1);
    for (int64_t p = 0; p <= count; ++p) copied.of(0)[p] = *bounds.at(p);
    with_type(states.type, [&](auto type) {
        const FocusStates<decltype(type)> typed{states.as<decltype(type)>()};
        score_focus(focus, typed, visual, copied.of(0), count, completion, begin, end, threads);
    });
}

}  // namespace vgpo::VGPO_TARGET

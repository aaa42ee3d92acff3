// Attention probabilities exp(score - lse), a tile of scores at a time, so that no map of scores is ever in memory.
//
// Selected keys are gathered and packed into panels as wide as a tile; a block of panels stays in the second cache while
// rows of queries, packed a tile at a time, pass over it. Which keys share a panel, and in what order sums run, follows
// from sizes, masks and segments alone.
#pragma once
#include "../simd/exp.h"
#include "../simd/product.h"
#include "visibility.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t PANEL_FLOATS = 128 * 1024;  // in a block of panels: 512 KB
constexpr int64_t MAX_PANELS = 32;            // in a block
constexpr int32_t NO_POSITION = INT32_MAX;    // the position of a lane without a key: in no interval

struct ScoreFormula {
    float scale, cap;  // score = scale * q.k, then cap * tanh(score / cap)
};

// What both kernels read.
template <class T>
struct AttentionInputs {
    View<T, 4> q, k;
    View<float, 3> lse;
    View<int32_t, 2> key_start, key_end;
    ScoreFormula formula;
};

// Queries side by side, of one head: what becomes of a tile of their scores.
struct QueryTile {
    float lse[TILE_ROWS];                      // infinity where it is -infinity, so that probabilities are 0
    int32_t start[TILE_ROWS], end[TILE_ROWS];  // the interval of a query; empty past the last query
    int32_t any_from, any_to;                  // keys outside are visible to no query
    int32_t all_from, all_to;                  // keys inside are visible to every query
};

// Keys side by side in a block: TILE_COLUMNS at most.
struct Panel {
    int32_t low, high;  // their smallest and largest position
    int32_t count;
    int32_t segment;
};

VGPO_INLINE Visibility visibility_of(const QueryTile& queries, const Panel& panel) {
    if (queries.any_from > panel.high || queries.any_to <= panel.low) return NONE;
    const bool all_visible = queries.all_from <= panel.low && panel.high < queries.all_to;
    return all_visible && panel.count == TILE_COLUMNS ? FULL : PARTIAL;
}

// Reads queries [first, first + count) of a head: their elements into `packed`, and the rest into a QueryTile.
template <class T>
QueryTile read_queries(float* packed, const AttentionInputs<T>& in, int64_t b, int64_t h, int64_t first, int64_t count) {
    pack_across<T>(packed, TILE_ROWS, count, in.q.size[3], in.q.stride[3], 1.0f,
                   [&](int64_t r) { return in.q.at(b, h, first + r); });
    QueryTile tile;
    tile.any_from = tile.all_to = INT32_MAX, tile.any_to = tile.all_from = 0;
    for (int r = 0; r < TILE_ROWS; ++r) {
        const bool there = r < count;
        const float lse = there ? *in.lse.at(b, h, first + r) : 0.0f;
        const int32_t start = there ? *in.key_start.at(b, first + r) : 0, end = there ? *in.key_end.at(b, first + r) : 0;
        tile.lse[r] = lse == -INFINITY ? INFINITY : lse;
        tile.start[r] = start, tile.end[r] = end;
        tile.all_from = max(tile.all_from, start), tile.all_to = min(tile.all_to, end);
        if (start >= end) continue;
        tile.any_from = min(tile.any_from, start), tile.any_to = max(tile.any_to, end);
    }
    return tile;
}

// Calls use(r, p) for each row of a tile, p its probabilities in TILE_VECTORS vectors, 0 where CUT and not visible.
template <bool CAPPED, bool CUT, class Use>
VGPO_INLINE void each_row(const float* scores, const QueryTile& queries, const int32_t* positions, ScoreFormula formula,
                          Use use) {
    const float inner = CAPPED ? formula.scale / formula.cap : formula.scale;
    for (int r = 0; r < TILE_ROWS; ++r, scores += TILE_COLUMNS) {
        F p[TILE_VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < TILE_VECTORS; ++v) {
            const F score = load(scores + v * LANES);
            const F capped = CAPPED ? tanh(score * inner) * formula.cap : score * inner;
            p[v] = exp(capped - queries.lse[r]);
            if (CUT) {
                I position;
                std::memcpy(&position, positions + v * LANES, sizeof(position));
                p[v] = select((position >= queries.start[r]) & (position < queries.end[r]), p[v], F{});
            }
        }
        use(r, p);
    }
}

// The same for a tile of packed queries and a panel of packed keys.
template <bool CAPPED, class Use>
VGPO_INLINE void each_probability(const float* packed, const QueryTile& queries, const float* keys, int64_t depth,
                                  const int32_t* positions, bool cut, ScoreFormula formula, Use use) {
    float scores[TILE_ROWS * TILE_COLUMNS];
    for (int64_t d = 0; d < depth || d == 0; d += SUM_DEPTH) {
        Tile tile;
        clear(tile);
        multiply(tile, packed + d * TILE_ROWS, keys + d * TILE_COLUMNS, min(SUM_DEPTH, depth - d));
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; ++r)
#pragma GCC unroll 3
            for (int v = 0; v < TILE_VECTORS; ++v) {
                float* score = scores + (r * TILE_VECTORS + v) * LANES;
                store(score, d == 0 ? tile.at[r][v] : load(score) + tile.at[r][v]);
            }
    }
    if (cut)
        each_row<CAPPED, true>(scores, queries, positions, formula, use);
    else
        each_row<CAPPED, false>(scores, queries, positions, formula, use);
}

// Packs the keys at `selected` into a panel, and writes down where they are.
template <class T>
Panel pack_keys(float* packed, int32_t* positions, const View<T, 4>& k, int64_t b, int64_t head, const int32_t* selected,
                int64_t count, int32_t segment) {
    pack_across<T>(packed, TILE_COLUMNS, count, k.size[3], k.stride[3], 1.0f,
                   [&](int64_t r) { return k.at(b, head, selected[r]); });
    Panel panel{NO_POSITION, -1, static_cast<int32_t>(count), segment};
    for (int64_t i = 0; i < TILE_COLUMNS; ++i) {
        positions[i] = i < count ? selected[i] : NO_POSITION;
        if (i >= count) continue;
        panel.low = min(panel.low, selected[i]), panel.high = max(panel.high, selected[i]);
    }
    return panel;
}

// Panels of keys of `depth` elements that a block holds.
inline int64_t panels_in_block(int64_t depth, int64_t floats) {
    return min(MAX_PANELS, max<int64_t>(1, floats / max<int64_t>(1, TILE_COLUMNS * depth)));
}

constexpr int64_t MIN_TASKS = 32;  // of a call, where its sizes allow it

template <class V>
void expect_attention(const V& q, const V& k, const View<float, 3>& lse, const View<int32_t, 2>& key_start,
                      const View<int32_t, 2>& key_end) {
    const int64_t B = q.size[0], Hq = q.size[1], Lq = q.size[2];
    expect(q.type == k.type, "k: expected the dtype of q");
    expect_size("k", k, {B, k.size[1], k.size[2], q.size[3]});
    expect(k.size[1] > 0 ? Hq % k.size[1] == 0 : Hq == 0, "k: expected a number of heads that divides that of q");
    expect(k.size[2] < NO_POSITION, "k: expected fewer keys");
    expect_size("lse", lse, {B, Hq, Lq});
    expect_size("key_start", key_start, {B, Lq});
    expect_size("key_end", key_end, {B, Lq});
}

}  // namespace vgpo::VGPO_TARGET

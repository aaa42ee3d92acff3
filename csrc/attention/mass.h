// attention_mass: probabilities summed over the keys of each segment.
#pragma once
#include "probability_tile.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t MIN_ROWS = 256, MAX_ROWS = 1024;  // of a task: enough to hide the time of packing its keys

// The memory of a worker.
struct MassScratch {
    float *packed, *keys;
    int32_t *positions, *order, *starts;
};

template <bool CAPPED, class T>
struct Mass {
    const View<float, 4>& out;
    const AttentionInputs<T>& in;
    const View<int32_t, 2>& segment_ids;
    MassScratch memory;
    int64_t b, head, first, last;  // a row of the batch, a key head, queries

    // Sorts the keys in [from, to) by segment: order[starts[s]], ..., order[starts[s + 1] - 1] are in segment s.
    void sort_keys(int64_t from, int64_t to) {
        const int32_t segments = static_cast<int32_t>(out.size[3]);
        int32_t* starts = memory.starts;
        for (int32_t s = 0; s <= segments; ++s) starts[s] = 0;
        auto segment_of = [&](int64_t key) {
            const int32_t segment = *segment_ids.at(b, key);
            return segment < segments ? segment : -1;
        };
        for (int64_t key = from; key < to; ++key)
            if (segment_of(key) >= 0) ++starts[segment_of(key)];
        for (int32_t s = 1; s <= segments; ++s) starts[s] += starts[s - 1];
        for (int64_t key = to - 1; key >= from; --key)
            if (segment_of(key) >= 0) memory.order[--starts[segment_of(key)]] = static_cast<int32_t>(key);
    }

    void run() {
        const int64_t segments = out.size[3], group = out.size[1] / in.k.size[1], Lk = in.k.size[2];
        int64_t from = Lk, to = 0;
        for (int64_t i = first; i < last; ++i) {
            const int64_t start = max(0, *in.key_start.at(b, i)), end = min<int64_t>(Lk, *in.key_end.at(b, i));
            if (start < end) from = min(from, start), to = max(to, end);
            for (int64_t h = head * group; h < (head + 1) * group; ++h)
                for (int64_t s = 0; s < segments; ++s) *out.at(b, h, i, s) = 0.0f;
        }
        sort_keys(from, to);
        const int64_t depth = in.k.size[3], most = panels_in_block(depth, PANEL_FLOATS);
        Panel panels[MAX_PANELS];
        int64_t count = 0;
        for (int64_t s = 0; s < segments; ++s)
            for (int32_t at = memory.starts[s]; at < memory.starts[s + 1]; at += TILE_COLUMNS) {
                const int64_t some = min(TILE_COLUMNS, memory.starts[s + 1] - at);
                panels[count] = pack_keys(memory.keys + count * TILE_COLUMNS * depth,
                                          memory.positions + count * TILE_COLUMNS, in.k, b, head, memory.order + at, some,
                                          static_cast<int32_t>(s));
                if (++count < most) continue;
                accumulate(panels, count);
                count = 0;
            }
        if (count > 0) accumulate(panels, count);
    }

    // All queries over a block of panels.
    void accumulate(const Panel* panels, int64_t count) {
        const int64_t group = out.size[1] / in.k.size[1];
        for (int64_t h = head * group; h < (head + 1) * group; ++h)
            for (int64_t i = first; i < last; i += TILE_ROWS) accumulate(panels, count, h, i);
    }

    void accumulate(const Panel* panels, int64_t count, int64_t h, int64_t i) {
        const int64_t depth = in.k.size[3], rows = min<int64_t>(TILE_ROWS, last - i);
        const QueryTile queries = read_queries(memory.packed, in, b, h, i, rows);
        F sums[TILE_ROWS] = {};
        for (int64_t panel = 0; panel < count; ++panel) {
            const Visibility visible = visibility_of(queries, panels[panel]);
            if (visible != NONE)
                each_probability<CAPPED>(memory.packed, queries, memory.keys + panel * TILE_COLUMNS * depth, depth,
                                         memory.positions + panel * TILE_COLUMNS, visible == PARTIAL, in.formula,
                                         [&](int r, const F* p) { sums[r] += p[0] + p[1] + p[2]; });
            const int32_t segment = panels[panel].segment;
            if (panel + 1 < count && panels[panel + 1].segment == segment) continue;
            for (int64_t r = 0; r < rows; ++r) *out.at(b, h, i + r, segment) += sum_lanes(sums[r]);
            for (int r = 0; r < TILE_ROWS; ++r) sums[r] = F{};
        }
    }
};

void attention_mass(View<float, 4> out, Floats<4> q, Floats<4> k, View<float, 3> lse, View<int32_t, 2> segment_ids,
                    View<int32_t, 2> key_start, View<int32_t, 2> key_end, double scale, double softcap,
                    int64_t threads) {
    const int64_t B = q.size[0], Hq = q.size[1], Lq = q.size[2], D = q.size[3], Hkv = k.size[1], Lk = k.size[2];
    const int64_t segments = out.size[3];
    expect_attention(q, k, lse, key_start, key_end);
    expect_size("out", out, {B, Hq, Lq, segments});
    expect_size("segment_ids", segment_ids, {B, Lk});
    expect(segments < NO_POSITION, "out: expected fewer segments");
    if (B * Hq * Lq * segments == 0) return;
    const int64_t group = Hq / Hkv;
    const int64_t rows = min(MAX_ROWS, max(MIN_ROWS, B * Hq * Lq / MIN_TASKS));
    const int64_t chunk = divide_up(divide_up(rows, group), TILE_ROWS) * TILE_ROWS, chunks = divide_up(Lq, chunk);
    const int64_t panels = panels_in_block(D, PANEL_FLOATS);
    Scratch<float> packed(TILE_ROWS * D, threads), keys(panels * TILE_COLUMNS * D, threads);
    Scratch<int32_t> positions(panels * TILE_COLUMNS, threads), order(Lk, threads), starts(segments + 1, threads);
    with_type(q.type, [&](auto t) {
        using T = decltype(t);
        const ScoreFormula formula{static_cast<float>(scale), static_cast<float>(softcap)};
        const AttentionInputs<T> in{q.as<T>(), k.as<T>(), lse, key_start, key_end, formula};
        auto body = [&](int64_t task, int64_t worker) {
            // In a causal mask later queries have more keys: the longest tasks come first.
            const int64_t pair = task % (B * Hkv), first = (chunks - 1 - task / (B * Hkv)) * chunk;
            const int64_t last = min(Lq, first + chunk);
            const MassScratch memory{packed.of(worker), keys.of(worker), positions.of(worker), order.of(worker),
                                     starts.of(worker)};
            if (softcap > 0.0)
                Mass<true, T>{out, in, segment_ids, memory, pair / Hkv, pair % Hkv, first, last}.run();
            else
                Mass<false, T>{out, in, segment_ids, memory, pair / Hkv, pair % Hkv, first, last}.run();
        };
        parallel(B * Hkv * chunks, threads, body);
    });
}

}  // namespace vgpo::VGPO_TARGET

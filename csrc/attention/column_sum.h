// attention_column_sum: probabilities summed over queries, or the largest of them, for each selected key.
#pragma once
#include "probability_tile.h"

namespace vgpo::VGPO_TARGET {

constexpr int64_t COLUMN_PANEL_FLOATS = 64 * 1024;  // of a task: 256 KB
constexpr int64_t TILES_IN_SUM = 64;                // then a sum joins the total, so that long sums stay accurate

enum class Reduction : int64_t { sum, mean, max };

struct ColumnScratch {
    float *packed, *keys;
    int32_t *positions, *slots, *selected;
};

template <class T>
struct Columns {
    const View<float, 3>& out;
    const AttentionInputs<T>& in;
    const View<int32_t, 2>& positions;
    ColumnScratch memory;
    int64_t b, h;

    VGPO_INLINE bool is_valid(int64_t slot) const {
        const int32_t position = *positions.at(b, slot);
        return position >= 0 && position < in.k.size[2];
    }

    // Lists at most `most` valid slots, after the first `from` of them. Returns how many.
    int64_t list_slots(int64_t from, int64_t most) {
        int64_t before = 0, count = 0;
        for (int64_t slot = 0; slot < positions.size[1] && count < most; ++slot) {
            if (!is_valid(slot) || before++ < from) continue;
            memory.slots[count] = static_cast<int32_t>(slot);
            memory.selected[count++] = *positions.at(b, slot);
        }
        return count;
    }

    // Number of queries with a visible key.
    int64_t count_queries() const {
        int64_t count = 0;
        for (int64_t i = 0; i < in.q.size[2]; ++i)
            count += *in.key_start.at(b, i) < *in.key_end.at(b, i) && *in.lse.at(b, h, i) != -INFINITY;
        return count;
    }

    // The slots of block `number`, `panels` panels long. Valid slots are counted off first;
    // the invalid ones are written by the block whose range of slots they lie in.
    template <bool CAPPED>
    void run(int64_t number, int64_t panels, Reduction reduction) {
        const int64_t width = panels * TILE_COLUMNS, depth = in.k.size[3];
        for (int64_t slot = number * width; slot < min((number + 1) * width, positions.size[1]); ++slot)
            if (!is_valid(slot)) *out.at(b, h, slot) = 0.0f;
        const int64_t count = list_slots(number * width, width), full = divide_up(count, TILE_COLUMNS);
        if (count == 0) return;
        Panel list[MAX_PANELS];
        for (int64_t i = 0; i < full; ++i)
            list[i] = pack_keys(memory.keys + i * TILE_COLUMNS * depth, memory.positions + i * TILE_COLUMNS, in.k, b,
                                h / (in.q.size[1] / in.k.size[1]), memory.selected + i * TILE_COLUMNS,
                                min<int64_t>(TILE_COLUMNS, count - i * TILE_COLUMNS), 0);
        F sums[MAX_PANELS][TILE_VECTORS] = {}, totals[MAX_PANELS][TILE_VECTORS] = {};
        int64_t tiles = 0;
        for (int64_t i = 0; i < in.q.size[2]; i += TILE_ROWS) {
            const QueryTile queries =
                read_queries(memory.packed, in, b, h, i, min<int64_t>(TILE_ROWS, in.q.size[2] - i));
            for (int64_t panel = 0; panel < full; ++panel)
                if (reduction == Reduction::max)
                    accumulate<CAPPED, true>(sums[panel], list[panel], panel, queries);
                else
                    accumulate<CAPPED, false>(sums[panel], list[panel], panel, queries);
            if (reduction == Reduction::max || ++tiles % TILES_IN_SUM) continue;
            for (int64_t panel = 0; panel < full; ++panel)
                for (int v = 0; v < TILE_VECTORS; ++v) totals[panel][v] += sums[panel][v], sums[panel][v] = F{};
        }
        const float queries = reduction == Reduction::mean ? max<int64_t>(1, count_queries()) : 1;
        for (int64_t i = 0; i < count; ++i) {
            const int64_t panel = i / TILE_COLUMNS, v = i % TILE_COLUMNS / LANES, lane = i % LANES;
            *out.at(b, h, memory.slots[i]) = (totals[panel][v][lane] + sums[panel][v][lane]) / queries;
        }
    }

    template <bool CAPPED, bool MAX>
    VGPO_INLINE void accumulate(F* sums, const Panel& panel, int64_t number, const QueryTile& queries) {
        const Visibility visible = visibility_of(queries, panel);
        if (visible == NONE) return;
        const int64_t depth = in.k.size[3];
        F tile[TILE_VECTORS] = {};
        each_probability<CAPPED>(memory.packed, queries, memory.keys + number * TILE_COLUMNS * depth, depth,
                                 memory.positions + number * TILE_COLUMNS, visible == PARTIAL, in.formula,
                                 [&](int, const F* p) {
                                     for (int v = 0; v < TILE_VECTORS; ++v)
                                         tile[v] = MAX ? max_or_nan(tile[v], p[v]) : tile[v] + p[v];
                                 });
        for (int v = 0; v < TILE_VECTORS; ++v) sums[v] = MAX ? max_or_nan(sums[v], tile[v]) : sums[v] + tile[v];
    }

    static VGPO_INLINE F max_or_nan(F a, F b) { return select((a > b) | (a != a), a, b); }
};

void attention_column_sum(View<float, 3> out, Floats<4> q, Floats<4> k, View<float, 3> lse,
                          View<int32_t, 2> positions, View<int32_t, 2> key_start, View<int32_t, 2> key_end,
                          int64_t reduction, double scale, double softcap, int64_t threads) {
    const int64_t B = q.size[0], Hq = q.size[1], D = q.size[3], slots = positions.size[1];
    expect_attention(q, k, lse, key_start, key_end);
    expect_size("positions", positions, {B, slots});
    expect_size("out", out, {B, Hq, slots});
    expect(slots < NO_POSITION, "positions: expected fewer slots");
    expect(reduction >= 0 && reduction <= 2, "reduction: expected 0, 1 or 2");
    if (B * Hq * slots == 0) return;
    const int64_t panels = divide_up(slots, TILE_COLUMNS);
    const int64_t needed = divide_up(panels, panels_in_block(D, COLUMN_PANEL_FLOATS));
    const int64_t panels_per_block = divide_up(panels, min(panels, max(needed, divide_up(MIN_TASKS, B * Hq))));
    const int64_t blocks = divide_up(panels, panels_per_block), width = panels_per_block * TILE_COLUMNS;
    Scratch<float> packed(TILE_ROWS * D, threads), keys(width * D, threads);
    Scratch<int32_t> places(width, threads), listed(width, threads), selected(width, threads);
    with_type(q.type, [&](auto t) {
        using T = decltype(t);
        const ScoreFormula formula{static_cast<float>(scale), static_cast<float>(softcap)};
        const AttentionInputs<T> in{q.as<T>(), k.as<T>(), lse, key_start, key_end, formula};
        auto body = [&](int64_t task, int64_t worker) {
            const ColumnScratch memory{packed.of(worker), keys.of(worker), places.of(worker), listed.of(worker),
                                       selected.of(worker)};
            const int64_t head = task / blocks, number = task % blocks;
            Columns<T> columns{out, in, positions, memory, head / Hq, head % Hq};
            if (softcap > 0.0)
                columns.template run<true>(number, panels_per_block, static_cast<Reduction>(reduction));
            else
                columns.template run<false>(number, panels_per_block, static_cast<Reduction>(reduction));
        };
        parallel(B * Hq * blocks, threads, body);
    });
}

}  // namespace vgpo::VGPO_TARGET

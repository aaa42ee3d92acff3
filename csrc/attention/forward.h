// Attention that also sums the probabilities of visual keys: an online softmax over blocks of keys.
//
// The queries of a group of heads are the rows of a task, and lie in lanes: no step works across lanes, and keys and
// values are not transposed; scores are (keys x rows). Up to FEW_ROWS rows, as in decoding, read keys and values in
// place, each once; more rows work on copies in fp32, in cache.
#pragma once
#include "online_softmax.h"

namespace vgpo::VGPO_TARGET::attention {

template <class T>
struct Forward {
    View<T, 4> out, q, k, v;
    View<float, 3> mass, lse;
    View<uint8_t, 2> kinds;
    View<int32_t, 2> key_start, key_end;
    float scale, softcap;
    int64_t group, depth, blocks, splits;
    const Workspace* workspace;
    float* partial;  // of a task: sums (3 x width), out (width x stride)

    struct Place {
        int64_t batch, head, first, split;  // of keys and values; the first row
    };
    Place place(int64_t task) const {
        const int64_t block = task / splits % blocks, pair = task / splits / blocks;
        return {pair / k.size[1], pair % k.size[1], block * workspace->width, task % splits};
    }
    int64_t rows_of(const Place& at) const { return min(workspace->width, q.size[2] * group - at.first); }
    // Row r of a place: its query, its head.
    int64_t query(const Place& at, int64_t r) const { return (at.first + r) / group; }
    int64_t head(const Place& at, int64_t r) const { return at.head * group + (at.first + r) % group; }

    void run(int64_t task, int64_t worker) const {
        const Place at = place(task);
        QueryRows rows = workspace->rows(worker);
        rows.count = rows_of(at);
        if (rows.count > FEW_ROWS) return attend<0>(rows, at, task);
        if (rows.count > 4) return attend<FEW_ROWS>(rows, at, task);
        if (rows.count > 2) return attend<4>(rows, at, task);
        return attend<2>(rows, at, task);
    }

    // WIDTH is how many of few rows are computed, 0 for many rows.
    template <int WIDTH>
    void attend(QueryRows& rows, const Place& at, int64_t task) const {
        constexpr bool MANY = WIDTH == 0;
        constexpr int PER = MANY ? LANES : WIDTH;
        rows.width = MANY ? divide_up(rows.count, LANES) * LANES : WIDTH;
        int64_t low = k.size[2], high = 0;
        const int64_t lanes = divide_up(rows.width, LANES) * LANES;
        for (int64_t r = 0; r < lanes; ++r) {
            const int64_t row = r % rows.width;  // of few rows each lane holds one
            int64_t start = 0, end = 0;
            if (row < rows.count) {
                start = max<int64_t>(*key_start.at(at.batch, query(at, row)), 0);
                end = min<int64_t>(*key_end.at(at.batch, query(at, row)), k.size[2]);
                if (start < end) low = min(low, start), high = max(high, end);
            }
            rows.start[r] = static_cast<int32_t>(start), rows.end[r] = static_cast<int32_t>(end);
            rows.maximum[r] = -INFINITY, rows.sum[r] = 0.0f, rows.visual[r] = 0.0f;
        }
        clear_row(rows.out, rows.width * workspace->stride);
        if (low < high) {
            const int64_t split = divide_up(high - low, splits), from = low + at.split * split;
            pack_queries<MANY>(rows, at);
            for (int64_t first = from; first < min(high, from + split); first += BLOCK_KEYS)
                attend_block<WIDTH, PER>(rows, at, first, min(BLOCK_KEYS, min(high, from + split) - first));
        }
        if (splits == 1) return finish(rows, at);
        float* to = partial + task * (workspace->stride + 3) * workspace->width;
        std::memcpy(to, rows.maximum, rows.count * sizeof(float));
        std::memcpy(to + workspace->width, rows.sum, rows.count * sizeof(float));
        std::memcpy(to + 2 * workspace->width, rows.visual, rows.count * sizeof(float));
        std::memcpy(to + 3 * workspace->width, rows.out, rows.count * workspace->stride * sizeof(float));
    }

    template <bool MANY>
    void pack_queries(const QueryRows& rows, const Place& at) const {
        auto row = [&](int64_t r) { return q.at(at.batch, head(at, r), query(at, r), 0); };
        if (MANY) {
            for (int64_t r = 0; r < rows.width; r += TILE_COLUMNS)
                pack_across<T>(rows.queries + r * depth, TILE_COLUMNS, min<int64_t>(TILE_COLUMNS, rows.count - r),
                               depth, q.stride[3], 1.0f, [&](int64_t i) { return row(r + i); });
            return;
        }
        for (int64_t r = 0; r < rows.width; ++r) {
            if (r < rows.count) copy_row(rows.queries + r * workspace->stride, row(r), depth, q.stride[3]);
            else clear_row(rows.queries + r * workspace->stride, workspace->stride);
        }
    }

    template <int WIDTH, int PER>
    void attend_block(const QueryRows& rows, const Place& at, int64_t first, int64_t count) const {
        constexpr bool MANY = WIDTH == 0;
        bool all_visible = true;
        if (!mark_visibility<PER == LANES ? 1 : WIDTH>(rows, at, first, count, all_visible)) return;
        const bool direct = !MANY && depth % LANES == 0;
        const bool keys_direct = direct && k.stride[3] == 1, values_direct = direct && v.stride[3] == 1 && all_visible;
        if (!keys_direct)
            for (int64_t i = 0; i < count; ++i) {
                float* to = rows.keys + i * workspace->block_stride;
                if (rows.visibility[i] == NONE) clear_row(to, workspace->stride);
                else copy_row(to, k.at(at.batch, at.head, first + i, 0), depth, k.stride[3]);
            }
        if constexpr (MANY)
            score_panels(rows.scores, rows.width, rows.queries, rows.keys, workspace->block_stride, count, depth);
        else if (keys_direct)
            score_few<WIDTH>(rows, k.at(at.batch, at.head, first, 0), k.stride[2],
                             values_direct ? v.at(at.batch, at.head, first, 0) : nullptr, v.stride[2], count);
        else
            score_few<WIDTH>(rows, rows.keys, workspace->block_stride, static_cast<const T*>(nullptr), 0, count);
        online_softmax_update<PER>(rows, first, count, !all_visible || count % (LANES / PER) != 0, scale, softcap);
        const int64_t vectors = workspace->stride / LANES;
        if (values_direct)
            return add_values<WIDTH>(rows.out, workspace->stride, rows.factor, rows.scores, rows.width,
                                     v.at(at.batch, at.head, first, 0), v.stride[2], count, vectors);
        bool non_finite = false;
        for (int64_t i = 0; i < count; ++i) non_finite |= copy_values(rows, at, first, i);
        add_values<WIDTH>(rows.out, workspace->stride, rows.factor, rows.scores, rows.width, rows.values,
                          workspace->block_stride, count, vectors);
        if (non_finite) add_non_finite(rows, at, first, count);
    }

    // Fills weight and visibility for a block of keys; returns whether any key is visible to any row. `all_visible`
    // becomes false unless every key is visible to every row.
    template <int REPEAT>  // how often each weight is written
    bool mark_visibility(const QueryRows& rows, const Place& at, int64_t first, int64_t count,
                         bool& all_visible) const {
        bool any = false;
        for (int64_t i = 0; i <= count; ++i) rows.change[i] = 0;
        for (int64_t r = 0; r < rows.count; ++r) {
            const int64_t start = max<int64_t>(rows.start[r] - first, 0);
            const int64_t end = min<int64_t>(rows.end[r] - first, count);
            all_visible &= start == 0 && end == count;
            if (start >= end) continue;
            any = true;
            ++rows.change[start], --rows.change[end];
        }
        if (!any) return false;
        for (int64_t i = count * REPEAT; i < divide_up(count * REPEAT, LANES) * LANES; ++i) rows.weight[i] = 0.0f;
        int64_t visible_rows = 0;
        for (int64_t i = 0; i < count; ++i) {
            const uint8_t kind = *kinds.at(at.batch, first + i);
            const float weight = kind == HIDDEN ? -1.0f : kind == VISUAL ? 1.0f : 0.0f;
            for (int r = 0; r < REPEAT; ++r) rows.weight[i * REPEAT + r] = weight;
            visible_rows += rows.change[i];
            all_visible &= kind != HIDDEN;
            rows.visibility[i] = kind == HIDDEN || visible_rows == 0 ? NONE : visible_rows < rows.count ? PARTIAL : FULL;
        }
        return true;
    }

    // Scores of few rows; meanwhile the values on the same keys are fetched, where an address is given.
    template <int WIDTH, class K>
    void score_few(const QueryRows& rows, const K* keys, int64_t stride, const T* values, int64_t values_stride,
                   int64_t count) const {
        constexpr int SHARE = LANES / WIDTH;
        for (int64_t first = 0; first < count; first += SHARE) {
            const K* at[SHARE];
            for (int i = 0; i < SHARE; ++i) {
                const int64_t key = min<int64_t>(first + i, count - 1);
                at[i] = keys + key * stride;
                if (!values) continue;
                const char* line = reinterpret_cast<const char*>(values + key * values_stride);
                for (int64_t byte = 0; byte < depth * static_cast<int64_t>(sizeof(T)); byte += 64)
                    __builtin_prefetch(line + byte);
            }
            store(rows.scores + first * WIDTH,
                  dots<WIDTH>(at, rows.queries, workspace->stride, workspace->stride / LANES));
        }
    }

    // Returns whether the values on the key are left to add_non_finite: they must not enter the sums of the
    // rows that the key is hidden from, not even times 0.
    bool copy_values(const QueryRows& rows, const Place& at, int64_t first, int64_t i) const {
        float* to = rows.values + i * workspace->block_stride;
        const bool visible = rows.visibility[i] != NONE;
        const bool finite = visible && copy_row(to, v.at(at.batch, at.head, first + i, 0), depth, v.stride[3]);
        const bool non_finite = !finite && rows.visibility[i] == PARTIAL;
        if (non_finite) rows.change[i] = NON_FINITE;
        if (non_finite || !visible) clear_row(to, workspace->stride);
        return non_finite;
    }

    void add_non_finite(const QueryRows& rows, const Place& at, int64_t first, int64_t count) const {
        for (int64_t i = 0; i < count; ++i) {
            if (rows.change[i] != NON_FINITE) continue;
            copy_row(rows.values, v.at(at.batch, at.head, first + i, 0), depth, v.stride[3]);
            for (int64_t r = 0; r < rows.count; ++r) {
                if (first + i < rows.start[r] || first + i >= rows.end[r]) continue;
                const float p = rows.scores[i * rows.width + r];
                for (int64_t d = 0; d < workspace->stride; d += LANES) {
                    float* place = rows.out + r * workspace->stride + d;
                    store(place, load(place) + p * load(rows.values + d));
                }
            }
        }
    }

    void finish(const QueryRows& rows, const Place& at) const {
        for (int64_t r = 0; r < rows.count; ++r) {
            const float inverse = rows.sum[r] == 0.0f ? 0.0f : 1.0f / rows.sum[r];
            T* to = out.at(at.batch, head(at, r), query(at, r), 0);
            for (int64_t d = 0; d < depth; d += LANES)
                store_partial(to + d * out.stride[3], load(rows.out + r * workspace->stride + d) * inverse,
                              min<int64_t>(LANES, depth - d), out.stride[3]);
            *mass.at(at.batch, head(at, r), query(at, r)) = rows.visual[r] * inverse;
            *lse.at(at.batch, head(at, r), query(at, r)) =
                static_cast<float>(shift_of(rows.maximum[r]) + std::log(static_cast<double>(rows.sum[r])));
        }
    }

    // Adds up the splits of a block of rows, in their order.
    void merge(int64_t block, int64_t worker) const {
        const Place at = place(block * splits);
        QueryRows rows = workspace->rows(worker);
        rows.count = rows_of(at);
        const int64_t size = (workspace->stride + 3) * workspace->width;
        const float* from = partial + block * splits * size;
        for (int64_t r = 0; r < rows.count; ++r) {
            float maximum = -INFINITY, sum = 0.0f, visual = 0.0f;
            for (int64_t i = 0; i < splits; ++i) maximum = max(maximum, from[i * size + r]);
            float* to = rows.out + r * workspace->stride;
            clear_row(to, workspace->stride);
            for (int64_t i = 0; i < splits; ++i) {
                const float* split = from + i * size + r;
                // A split without a score holds zeros, or NaN.
                const float factor =
                    split[0] > -INFINITY ? exp(broadcast(shift_of(split[0]) - shift_of(maximum)))[0] : 1.0f;
                sum += factor * split[workspace->width], visual += factor * split[2 * workspace->width];
                const float* part = from + i * size + 3 * workspace->width + r * workspace->stride;
                for (int64_t d = 0; d < workspace->stride; d += LANES)
                    store(to + d, load(to + d) + factor * load(part + d));
            }
            rows.maximum[r] = maximum, rows.sum[r] = sum, rows.visual[r] = visual;
        }
        finish(rows, at);
    }
};

template <class T>
void forward(Forward<T> work, int64_t threads) {
    const int64_t rows = work.group * work.q.size[2];
    const Workspace workspace(rows, work.depth, threads);
    work.workspace = &workspace;
    work.blocks = divide_up(rows, workspace.width);
    const int64_t tasks = work.q.size[0] * work.k.size[1] * work.blocks;
    work.splits = max<int64_t>(min(divide_up(work.k.size[2], SPLIT_KEYS), divide_up(TARGET_TASKS, tasks)), 1);
    const Scratch<float> partial(work.splits > 1 ? tasks * work.splits * (workspace.stride + 3) * workspace.width : 0);
    work.partial = partial.of(0);
    auto run = [&](int64_t task, int64_t worker) { work.run(task, worker); };
    parallel(tasks * work.splits, threads, run);
    if (work.splits == 1) return;
    auto merge = [&](int64_t block, int64_t worker) { work.merge(block, worker); };
    parallel(tasks, threads, merge);
}

}  // namespace vgpo::VGPO_TARGET::attention

namespace vgpo::VGPO_TARGET {

void visual_attention(Floats<4> out, View<float, 3> mass, View<float, 3> lse, Floats<4> q, Floats<4> k, Floats<4> v,
                      View<uint8_t, 2> key_kinds, View<int32_t, 2> key_start, View<int32_t, 2> key_end, double scale,
                      double softcap, int64_t threads) {
    const int64_t B = q.size[0], Hq = q.size[1], Lq = q.size[2], D = q.size[3], Hkv = k.size[1], Lk = k.size[2];
    expect_size("k", k, {B, Hkv, Lk, D});
    expect_size("v", v, {B, Hkv, Lk, D});
    expect_size("out", out, {B, Hq, Lq, D});
    expect_size("mass", mass, {B, Hq, Lq});
    expect_size("lse", lse, {B, Hq, Lq});
    expect_size("key_kinds", key_kinds, {B, Lk});
    expect_size("key_start", key_start, {B, Lq});
    expect_size("key_end", key_end, {B, Lq});
    expect(k.type == q.type && v.type == q.type && out.type == q.type, "q, k, v, out: expected one dtype");
    expect(Hq == 0 || (Hkv > 0 && Hq % Hkv == 0), "q: expected a multiple of k's heads");
    expect(Lk < (int64_t{1} << 31) - attention::BLOCK_KEYS, "k: too many keys");
    if (B == 0 || Hq == 0 || Lq == 0) return;
    with_type(q.type, [&](auto type) {
        using T = decltype(type);
        attention::forward<T>({out.as<T>(), q.as<T>(), k.as<T>(), v.as<T>(), mass, lse, key_kinds, key_start, key_end,
                               static_cast<float>(scale), static_cast<float>(softcap), Hq / Hkv, D, 0, 0, nullptr,
                               nullptr},
                              threads);
    });
}

}  // namespace vgpo::VGPO_TARGET

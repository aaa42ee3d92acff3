// Matrix products: a tile in registers, the panels it reads, and a whole product in blocks.
#pragma once
#include "vector.h"

namespace vgpo::VGPO_TARGET {

// A tile is TILE_ROWS x TILE_COLUMNS: as many accumulators as leave registers for a row of the right panel and one
// broadcast element of the left one.
constexpr int TILE_VECTORS = 3;
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;

constexpr int64_t SUM_DEPTH = 128;  // terms of a score that are added up before they join the others

struct Tile {
    F at[TILE_ROWS][TILE_VECTORS];
};

// Adds left (depth x TILE_ROWS) transposed times right (depth x TILE_COLUMNS), both packed, to `tile`.
VGPO_INLINE void multiply(Tile& tile, const float* left, const float* right, int64_t depth) {
    for (int64_t d = 0; d < depth; ++d, left += TILE_ROWS, right += TILE_COLUMNS) {
        F columns[TILE_VECTORS];
#pragma GCC unroll 3
        for (int v = 0; v < TILE_VECTORS; ++v) columns[v] = load(right + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < TILE_ROWS; ++r) {
            const F x = broadcast(left[r]);
#pragma GCC unroll 3
            for (int v = 0; v < TILE_VECTORS; ++v) tile.at[r][v] += x * columns[v];
        }
    }
}

VGPO_INLINE void clear(Tile& tile) {
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < TILE_VECTORS; ++v) tile.at[r][v] = F{};
}

constexpr int TRANSPOSED = 4;

// Four rows of LANES elements, load_row(i) * scale, become the first `count` of LANES rows of four, `width` apart.
template <class LoadRow>
VGPO_INLINE void transpose(float* out, int width, int64_t count, float scale, LoadRow load_row) {
    typedef float Four __attribute__((vector_size(16)));
    Four rows[4][LANES / 4];
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
        const F x = load_row(i) * scale;
        std::memcpy(rows[i], &x, sizeof(x));
    }
#pragma GCC unroll 4
    for (int part = 0; part < LANES / 4; ++part) {
        const Four a = rows[0][part], b = rows[1][part], c = rows[2][part], d = rows[3][part];
        const Four ab = {a[0], b[0], a[1], b[1]}, cd = {c[0], d[0], c[1], d[1]};
        const Four ab2 = {a[2], b[2], a[3], b[3]}, cd2 = {c[2], d[2], c[3], d[3]};
        const Four columns[4] = {{ab[0], ab[1], cd[0], cd[1]}, {ab[2], ab[3], cd[2], cd[3]},
                                 {ab2[0], ab2[1], cd2[0], cd2[1]}, {ab2[2], ab2[3], cd2[2], cd2[3]}};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
            if (part * 4 + i < count) std::memcpy(out + (part * 4 + i) * width, &columns[i], sizeof(Four));
    }
}

// Writes `count` rows of `depth` elements, element d of row r to out[d * width + r], and 0 for the rows missing up to
// `width`. row(r) is the address of a row's first element.
template <class T, class Row>
VGPO_INLINE void pack_across(float* out, int width, int64_t count, int64_t depth, int64_t stride, float scale, Row row) {
    int r = 0;
    if (stride == 1)
        for (; r + TRANSPOSED <= count; r += TRANSPOSED) {
            const T* from[TRANSPOSED];
            for (int i = 0; i < TRANSPOSED; ++i) from[i] = row(r + i);
            for (int64_t d = 0; d < depth; d += LANES)
                transpose(out + d * width + r, width, min<int64_t>(LANES, depth - d), scale, [&](int i) {
                    return depth - d >= LANES ? load(from[i] + d) : load_partial(from[i] + d, depth - d);
                });
        }
    for (; r < width; ++r) {
        if (r >= count) {
            for (int64_t d = 0; d < depth; ++d) out[d * width + r] = 0.0f;
            continue;
        }
        const T* from = row(r);
        int64_t d = 0;
        for (; d < depth; d += LANES) {
            const int64_t some = min<int64_t>(LANES, depth - d);
            float part[LANES];
            store(part, load_partial(from + d * stride, some, stride) * scale);
            for (int64_t i = 0; i < some; ++i) out[(d + i) * width + r] = part[i];
        }
    }
}

// Writes `depth` rows of `count` elements side by side, to out[d * width + r], and 0 for the elements missing up to `width`.
// row(d) is the address of the first element.
template <class T, class Row>
VGPO_INLINE void pack_along(float* out, int width, int64_t count, int64_t depth, Row row) {
    for (int64_t d = 0; d < depth; ++d, out += width) {
        const T* from = row(d);
        int64_t r = 0;
        if (width % LANES == 0) {
            for (; r + LANES <= count; r += LANES) store(out + r, load(from + r));
            for (; r < width; r += LANES) store(out + r, r < count ? load_partial(from + r, count - r) : F{});
        } else if (sizeof(T) == sizeof(float) && count == width && width == TILE_ROWS) {
            std::memcpy(out, from, TILE_ROWS * sizeof(float));
        } else {
            for (; r < count; ++r) out[r] = to_float(from[r]);
            for (; r < width; ++r) out[r] = 0.0f;
        }
    }
}

// Packs rows [first, first + count) of matrix (rows x depth), columns [start, start + depth), for one side of a tile.
template <class T>
void pack(float* out, int width, const View<T, 2>& matrix, int64_t first, int64_t count, int64_t start, int64_t depth) {
    if (matrix.stride[0] == 1)
        return pack_along<T>(out, width, count, depth, [&](int64_t d) { return matrix.at(first, start + d); });
    pack_across<T>(out, width, count, depth, matrix.stride[1], 1.0f,
                   [&](int64_t r) { return matrix.at(first + r, start); });
}

// Blocks of a product: a panel of the right side and a block of the left stay in the second cache, all panels of a block
// of the right in the last. Deep, so that `out` is read and written few times.
constexpr int64_t BLOCK_DEPTH = 512;
constexpr int64_t BLOCK_ROWS = 128;
constexpr int64_t BLOCK_PANELS = 64;

// out (m x n) = left (m x k) times right (n x k) transposed, or that added to `out`. Sums run over k in one order.
template <class T>
void multiply(View<float, 2> out, View<T, 2> left, View<T, 2> right, bool add, int64_t threads) {
    const int64_t rows = left.size[0], columns = right.size[0], depth = left.size[1];
    const int64_t wide = BLOCK_PANELS * TILE_COLUMNS;
    const int64_t row_blocks = divide_up(rows, BLOCK_ROWS);
    Scratch<float> panels(min(wide, divide_up(columns, TILE_COLUMNS) * TILE_COLUMNS) * BLOCK_DEPTH);
    Scratch<float> blocks(BLOCK_ROWS * BLOCK_DEPTH, threads);
    for (int64_t column = 0; column < columns; column += wide) {
        const int64_t count = divide_up(min(wide, columns - column), TILE_COLUMNS);
        for (int64_t start = 0; start < max<int64_t>(depth, 1); start += BLOCK_DEPTH) {
            const int64_t deep = min(BLOCK_DEPTH, depth - start);
            auto pack_right = [&](int64_t panel, int64_t) {
                const int64_t first = column + panel * TILE_COLUMNS;
                pack(panels.of(0) + panel * TILE_COLUMNS * deep, TILE_COLUMNS, right, first,
                     min<int64_t>(TILE_COLUMNS, columns - first), start, deep);
            };
            parallel(count, threads, pack_right);
            // Few rows share a block: pieces of the columns are tasks of their own, so that there are enough.
            const int64_t pieces = min(count, divide_up(16, row_blocks)), piece = divide_up(count, pieces);
            auto multiply_block = [&](int64_t task, int64_t worker) {
                const int64_t first = task / pieces * BLOCK_ROWS, high = min(BLOCK_ROWS, rows - first);
                const int64_t from = task % pieces * piece, to = min(count, from + piece);
                float* block = blocks.of(worker);
                if (from >= to) return;
                for (int64_t r = 0; r < high; r += TILE_ROWS)
                    pack(block + r * deep, TILE_ROWS, left, first + r, min<int64_t>(TILE_ROWS, high - r), start, deep);
                for (int64_t panel = from; panel < to; ++panel) {
                    const int64_t place = column + panel * TILE_COLUMNS;
                    for (int64_t r = 0; r < high; r += TILE_ROWS) {
                        Tile tile;
                        clear(tile);
                        multiply(tile, block + r * deep, panels.of(0) + panel * TILE_COLUMNS * deep, deep);
                        const int64_t tall = min<int64_t>(TILE_ROWS, high - r);
#pragma GCC unroll 8
                        for (int i = 0; i < TILE_ROWS; ++i) {
                            if (i >= tall) break;
#pragma GCC unroll 3
                            for (int v = 0; v < TILE_VECTORS; ++v) {
                                const int64_t some = min<int64_t>(LANES, columns - place - v * LANES);
                                if (some <= 0) break;
                                float* to_place = out.at(first + r + i, place + v * LANES);
                                const bool keep = add || start > 0;
                                const F before = keep ? load_partial(to_place, some, out.stride[1]) : F{};
                                store_partial(to_place, before + tile.at[i][v], some, out.stride[1]);
                            }
                        }
                    }
                }
            };
            parallel(row_blocks * pieces, threads, multiply_block);
        }
    }
}

// out (m, n) float = left (m, k) @ right (k, n), or that added to it; left and right of one type.
void product(View<float, 2> out, Floats<2> left, Floats<2> right, bool add, int64_t threads) {
    expect_size("right", right, {left.size[1]});
    expect_size("out", out, {left.size[0], right.size[1]});
    expect(left.type == right.type, "right: expected the type of left");
    if (out.size[0] == 0 || out.size[1] == 0) return;
    const Floats<2> across{right.data, right.type, {right.size[1], right.size[0]}, {right.stride[1], right.stride[0]}};
    with_type(left.type, [&](auto type) {
        using T = decltype(type);
        multiply(out, left.as<T>(), across.as<T>(), add, threads);
    });
}

}  // namespace vgpo::VGPO_TARGET

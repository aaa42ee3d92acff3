// Matrix products: a tile in registers, the panels it reads, and a whole product in blocks.
#pragma once
#include "simd.h"

namespace vgpo::VGPO_TARGET {

// A tile is TILE_ROWS x TILE_COLUMNS: as many accumulators as leave registers for a row of the right panel and one
// broadcast element of the left one.
constexpr int TILE_VECTORS = 3;
constexpr int TILE_COLUMNS = TILE_VECTORS * LANES;
constexpr int TILE_ROWS = LANES == 16 ? 8 : 4;

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
            const F x = all(left[r]);
#pragma GCC unroll 3
            for (int v = 0; v < TILE_VECTORS; ++v) tile.at[r][v] += x * columns[v];
        }
    }
}

VGPO_INLINE void clear(Tile& tile) {
    for (int r = 0; r < TILE_ROWS; ++r)
        for (int v = 0; v < TILE_VECTORS; ++v) tile.at[r][v] = F{};
}

// Writes `count` rows of `depth` elements, element d of row r to out[d * width + r], and 0 for the rows that lack up to
// `width`. row(r) is the address of a row's first element.
template <class T, class Row>
VGPO_INLINE void pack_across(float* out, int width, int64_t count, int64_t depth, int64_t stride, float scale, Row row) {
    for (int r = 0; r < width; ++r) {
        if (r >= count) {
            for (int64_t d = 0; d < depth; ++d) out[d * width + r] = 0.0f;
            continue;
        }
        const T* from = row(r);
        int64_t d = 0;
        for (; d < depth; d += LANES) {
            const int64_t some = smaller<int64_t>(LANES, depth - d);
            float part[LANES];
            store(part, load_some(from + d * stride, some, stride) * scale);
            for (int64_t i = 0; i < some; ++i) out[(d + i) * width + r] = part[i];
        }
    }
}

// Writes `depth` rows of `count` elements side by side, to out[d * width + r], and 0 for the elements that lack.
// row(d) is the address of the first element.
template <class T, class Row>
VGPO_INLINE void pack_along(float* out, int width, int64_t count, int64_t depth, Row row) {
    for (int64_t d = 0; d < depth; ++d, out += width) {
        const T* from = row(d);
        int64_t r = 0;
        if (width % LANES == 0) {
            for (; r + LANES <= count; r += LANES) store(out + r, load(from + r));
            for (; r < width; r += LANES) store(out + r, r < count ? load_some(from + r, count - r) : F{});
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

// Blocks of a product: a panel of the right side stays in the first caches, a block of the left in the second, all
// panels of a block of the right in the last.
constexpr int64_t BLOCK_DEPTH = 256;
constexpr int64_t BLOCK_ROWS = 256;
constexpr int64_t BLOCK_PANELS = 64;

// out (m x n) = left (m x k) times right (n x k) transposed, or that added to `out`. Sums run over k in one order.
template <class L, class R>
void multiply(View<float, 2> out, View<L, 2> left, View<R, 2> right, bool add, int64_t threads) {
    const int64_t rows = left.size[0], columns = right.size[0], depth = left.size[1];
    const int64_t wide = BLOCK_PANELS * TILE_COLUMNS;
    const int64_t row_blocks = divide_up(rows, BLOCK_ROWS);
    Scratch<float> panels(smaller(wide, divide_up(columns, TILE_COLUMNS) * TILE_COLUMNS) * BLOCK_DEPTH);
    Scratch<float> blocks(BLOCK_ROWS * BLOCK_DEPTH, threads);
    for (int64_t column = 0; column < columns; column += wide) {
        const int64_t count = divide_up(smaller(wide, columns - column), TILE_COLUMNS);
        for (int64_t start = 0; start < larger<int64_t>(depth, 1); start += BLOCK_DEPTH) {
            const int64_t deep = smaller(BLOCK_DEPTH, depth - start);
            auto pack_right = [&](int64_t panel, int64_t) {
                const int64_t first = column + panel * TILE_COLUMNS;
                pack(panels.of(0) + panel * TILE_COLUMNS * deep, TILE_COLUMNS, right, first,
                     smaller<int64_t>(TILE_COLUMNS, columns - first), start, deep);
            };
            parallel(count, threads, pack_right);
            // Few rows share a block: pieces of the columns are tasks of their own, so that there are enough.
            const int64_t pieces = smaller(count, divide_up(16, row_blocks)), piece = divide_up(count, pieces);
            auto multiply_block = [&](int64_t task, int64_t worker) {
                const int64_t first = task / pieces * BLOCK_ROWS, high = smaller(BLOCK_ROWS, rows - first);
                const int64_t from = task % pieces * piece, to = smaller(count, from + piece);
                float* block = blocks.of(worker);
                if (from >= to) return;
                for (int64_t r = 0; r < high; r += TILE_ROWS)
                    pack(block + r * deep, TILE_ROWS, left, first + r, smaller<int64_t>(TILE_ROWS, high - r), start, deep);
                for (int64_t panel = from; panel < to; ++panel) {
                    const int64_t place = column + panel * TILE_COLUMNS;
                    for (int64_t r = 0; r < high; r += TILE_ROWS) {
                        Tile tile;
                        clear(tile);
                        multiply(tile, block + r * deep, panels.of(0) + panel * TILE_COLUMNS * deep, deep);
                        const int64_t tall = smaller<int64_t>(TILE_ROWS, high - r);
#pragma GCC unroll 8
                        for (int i = 0; i < TILE_ROWS; ++i) {
                            if (i >= tall) break;
#pragma GCC unroll 3
                            for (int v = 0; v < TILE_VECTORS; ++v) {
                                const int64_t some = smaller<int64_t>(LANES, columns - place - v * LANES);
                                if (some <= 0) break;
                                float* to_place = out.at(first + r + i, place + v * LANES);
                                const bool keep = add || start > 0;
                                const F before = keep ? load_some(to_place, some, out.stride[1]) : F{};
                                store_some(to_place, before + tile.at[i][v], some, out.stride[1]);
                            }
                        }
                    }
                }
            };
            parallel(row_blocks * pieces, threads, multiply_block);
        }
    }
}

// out (m, n) float = left (m, k) @ right (k, n), or that added to it; left and right of any floating type.
void product(View<float, 2> out, Floats<2> left, Floats<2> right, bool add, int64_t threads) {
    expect_size("right", right, {left.size[1]});
    expect_size("out", out, {left.size[0], right.size[1]});
    if (out.size[0] == 0 || out.size[1] == 0) return;
    const Floats<2> across{right.data, right.type, {right.size[1], right.size[0]}, {right.stride[1], right.stride[0]}};
    with_type(left.type, [&](auto l) {
        with_type(right.type, [&](auto r) {
            multiply(out, left.as<decltype(l)>(), across.as<decltype(r)>(), add, threads);
        });
    });
}

}  // namespace vgpo::VGPO_TARGET

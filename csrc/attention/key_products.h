// The products of attention: queries in lanes against a block of keys, or few queries against keys in place.
#pragma once
#include "../simd/product.h"

namespace vgpo::VGPO_TARGET::attention {

// Calls function with the compile-time constant that equals `count`, one of 1 to MOST.
template <int N>
struct Constant {
    static constexpr int value = N;
};
template <int MOST, class Function>
VGPO_INLINE void with_count(int64_t count, Function function) {
    if constexpr (MOST > 1) {
        if (count < MOST) return with_count<MOST - 1>(count, function);
    }
    function(Constant<MOST>{});
}

// tile[r] = the sum over d < depth of left[r * row + d * step] times VECTORS vectors at right + d * stride.
template <int ROWS, int VECTORS, class T>
VGPO_INLINE void outer_products(F (&tile)[ROWS][VECTORS], const float* left, int64_t row, int64_t step, const T* right,
                                int64_t stride, int64_t depth) {
    for (int r = 0; r < ROWS; ++r)
        for (int v = 0; v < VECTORS; ++v) tile[r][v] = F{};
    for (int64_t d = 0; d < depth; ++d, left += step, right += stride) {
        F columns[VECTORS];
#pragma GCC unroll 8
        for (int v = 0; v < VECTORS; ++v) columns[v] = load(right + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < ROWS; ++r) {
            const F x = broadcast(left[r * row]);
#pragma GCC unroll 8
            for (int v = 0; v < VECTORS; ++v) tile[r][v] += x * columns[v];
        }
    }
}

// scores (keys x width) = keys (rows `stride` apart) times the queries, packed in panels of TILE_COLUMNS; `scores` and
// `keys` are allocated up to a multiple of TILE_ROWS keys.
inline void score_panels(float* scores, int64_t width, const float* queries, const float* keys, int64_t stride,
                         int64_t count, int64_t depth) {
    for (int64_t column = 0; column < width; column += TILE_COLUMNS, queries += TILE_COLUMNS * depth) {
        with_count<TILE_VECTORS>(min<int64_t>(TILE_VECTORS, (width - column) / LANES), [&](auto vectors) {
            constexpr int VECTORS = decltype(vectors)::value;
            for (int64_t key = 0; key < count; key += TILE_ROWS) {
                for (int64_t d = 0; d < depth || d == 0; d += SUM_DEPTH) {
                    F tile[TILE_ROWS][VECTORS];
                    outer_products(tile, keys + key * stride + d, stride, 1, queries + d * TILE_COLUMNS, TILE_COLUMNS,
                                   min(SUM_DEPTH, depth - d));
                    for (int r = 0; r < TILE_ROWS; ++r)
                        for (int v = 0; v < VECTORS; ++v) {
                            float* score = scores + (key + r) * width + column + v * LANES;
                            store(score, d == 0 ? tile[r][v] : load(score) + tile[r][v]);
                        }
                }
            }
        });
    }
}

// out (width rows, `stride` apart) = out times factor (width), by row, plus the transposed probabilities (keys x width)
// times values (keys x vectors). WIDTH is 0 for a multiple of LANES that is known at run time only.
template <int WIDTH, class T>
VGPO_INLINE void add_values(float* out, int64_t stride, const float* factor, const float* probabilities, int64_t width,
                            const T* values, int64_t values_stride, int64_t count, int64_t vectors) {
    constexpr int ROWS = WIDTH > 0 && WIDTH < TILE_ROWS ? WIDTH : TILE_ROWS;
    constexpr int MOST = ROWS == 8 ? 3 : ROWS == 4 ? (LANES == 16 ? 4 : 3) : LANES == 16 ? 8 : 4;
    const int64_t strips = divide_up(vectors, MOST);
    for (int64_t strip = 0; strip < strips; ++strip) {
        const int64_t from = strip * vectors / strips, to = (strip + 1) * vectors / strips;
        with_count<MOST>(to - from, [&](auto wide) {
            constexpr int VECTORS = decltype(wide)::value;
            for (int64_t row = 0; row < width; row += ROWS) {
                F tile[ROWS][VECTORS];
                outer_products(tile, probabilities + row, 1, width, values + from * LANES, values_stride, count);
                for (int r = 0; r < ROWS; ++r)
                    for (int v = 0; v < VECTORS; ++v) {
                        float* place = out + (row + r) * stride + (from + v) * LANES;
                        store(place, load(place) * factor[row + r] + tile[r][v]);
                    }
            }
        });
    }
}

// --- dot products with keys in place ---

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define VGPO_SHUFFLE
#endif
#endif

// {a0 + a1, a2 + a3, ..., b0 + b1, ...}
VGPO_INLINE F add_neighbours(F a, F b) {
#if !defined(VGPO_SHUFFLE)
    F sum{};
    for (int i = 0; i < LANES; ++i) {
        const int at = 2 * i % LANES;
        sum[i] = i < LANES / 2 ? a[at] + a[at + 1] : b[at] + b[at + 1];
    }
    return sum;
#elif VGPO_LANES == 16
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#elif VGPO_LANES == 8
    return __builtin_shufflevector(a, b, 0, 2, 4, 6, 8, 10, 12, 14) +
           __builtin_shufflevector(a, b, 1, 3, 5, 7, 9, 11, 13, 15);
#else
    return __builtin_shufflevector(a, b, 0, 2, 4, 6) + __builtin_shufflevector(a, b, 1, 3, 5, 7);
#endif
}

// The sums of the lanes of COUNT vectors, which are overwritten.
template <int COUNT>
VGPO_INLINE F lane_sums(F* at) {
    if constexpr (COUNT == 1) return at[0];
#pragma GCC unroll 8
    for (int i = 0; i < COUNT / 2; ++i) at[i] = add_neighbours(at[2 * i], at[2 * i + 1]);
    if constexpr (COUNT > 1) return lane_sums<COUNT / 2>(at);
}

// The products of LANES / WIDTH keys with WIDTH queries (rows `stride` apart), those of one key side by side.
template <int WIDTH, class T>
VGPO_INLINE F dots(const T* const (&keys)[LANES / WIDTH], const float* queries, int64_t stride, int64_t vectors) {
    F at[LANES] = {};
    for (int64_t v = 0; v < vectors; ++v, queries += LANES) {
        F key[LANES / WIDTH];
#pragma GCC unroll 8
        for (int i = 0; i < LANES / WIDTH; ++i) key[i] = load(keys[i] + v * LANES);
#pragma GCC unroll 8
        for (int r = 0; r < WIDTH; ++r) {
            const F query = load(queries + r * stride);
#pragma GCC unroll 8
            for (int i = 0; i < LANES / WIDTH; ++i) at[i * WIDTH + r] += key[i] * query;
        }
    }
    return lane_sums<LANES>(at);
}

}  // namespace vgpo::VGPO_TARGET::attention

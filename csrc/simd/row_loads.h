// Pieces of a row as vectors: masks, and values of any dtype and stride as float.
#pragma once
#include "vector.h"

namespace vgpo::VGPO_TARGET {

typedef uint8_t Bytes __attribute__((vector_size(VGPO_LANES)));

// Which of the first `count` elements, `stride` apart, are not 0; the other lanes are not set.
VGPO_INLINE I load_mask(const uint8_t* p, int64_t count, int64_t stride) {
    Bytes bytes = {};
    if (stride == 1 && count >= LANES) {
        std::memcpy(&bytes, p, sizeof(bytes));
    } else {
        for (int64_t i = 0; i < count && i < LANES; ++i) bytes[i] = p[i * stride];
    }
    return __builtin_convertvector(bytes, I) != 0;
}

VGPO_INLINE int64_t count_set(I mask) {
    int64_t total = 0;
    for (int i = 0; i < LANES; ++i) total -= mask[i];
    return total;
}

template <class T>
VGPO_INLINE void read_row(const T* p, int64_t count, int64_t stride, float* out) {
    if (stride == 0 && count > 0) {
        const F value = broadcast(to_float(*p));
        for (int64_t i = 0; i < count; i += LANES) store(out + i, value);
        return;
    }
    for (int64_t i = 0; i < count; i += LANES)
        store(out + i, load_partial(p + i * stride, min<int64_t>(LANES, count - i), stride));
}

// `count` elements of a row from column `start` on, as whole vectors of floats: in place where they are that already,
// else written to `buffer`, which holds `count` rounded up to whole vectors. Lanes from `count` on may hold anything.
inline const float* read_row(const Floats<2>& from, int64_t row, int64_t start, int64_t count, float* buffer) {
    if (from.type == Type::f32 && from.stride[1] == 1 && count % LANES == 0) return from.as<float>().at(row, start);
    with_type(from.type, [&](auto type) {
        read_row(from.as<decltype(type)>().at(row, start), count, from.stride[1], buffer);
    });
    return buffer;
}

}  // namespace vgpo::VGPO_TARGET

// Tensors as kernels take them: a pointer, sizes and strides in elements. No torch, no Python.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>

// Never emitted on their own: three targets share these functions, and the linker keeps one copy of what is emitted.
#define VGPO_INLINE inline __attribute__((always_inline))

namespace vgpo {

struct bf16 {
    uint16_t bits;
};
struct half {
    uint16_t bits;
};

// Codes of dtypes; `vgpo_kernels/_native.py` holds the same.
enum class Type : int64_t { f32 = 0, bf16 = 1, f16 = 2, f64 = 3, i64 = 4, i32 = 5, u8 = 6 };

template <class T>
constexpr Type type_of();
template <>
constexpr Type type_of<float>() { return Type::f32; }
template <>
constexpr Type type_of<bf16>() { return Type::bf16; }
template <>
constexpr Type type_of<half>() { return Type::f16; }
template <>
constexpr Type type_of<double>() { return Type::f64; }
template <>
constexpr Type type_of<int64_t>() { return Type::i64; }
template <>
constexpr Type type_of<int32_t>() { return Type::i32; }
template <>
constexpr Type type_of<uint8_t>() { return Type::u8; }

// A tensor of N dimensions of one dtype; strides of 0, and any alignment of rows, are legal.
template <class T, int N>
struct View {
    T* data;
    int64_t size[N];
    int64_t stride[N];

    template <class... Index>
    VGPO_INLINE T* at(Index... index) const {
        static_assert(sizeof...(Index) <= N, "more indices than dimensions");
        const int64_t given[] = {static_cast<int64_t>(index)..., 0};
        int64_t offset = 0;
        for (int d = 0; d < static_cast<int>(sizeof...(Index)); ++d) offset += given[d] * stride[d];
        return data + offset;
    }
};

// A tensor of N dimensions of float, bf16 or half: `as<T>()` once `with_type` has told which.
template <int N>
struct Floats {
    void* data;
    Type type;
    int64_t size[N];
    int64_t stride[N];

    template <class T>
    VGPO_INLINE View<T, N> as() const {
        View<T, N> view{static_cast<T*>(data), {}, {}};
        for (int d = 0; d < N; ++d) view.size[d] = size[d], view.stride[d] = stride[d];
        return view;
    }
};

// An argument that Python may leave out, as None.
template <class V>
struct Maybe {
    bool present;
    V view;
};

// Calls function(T{}) with T the element type behind `type`.
template <class Function>
VGPO_INLINE void with_type(Type type, Function function) {
    if (type == Type::f32) function(float{});
    if (type == Type::bf16) function(bf16{});
    if (type == Type::f16) function(half{});
}

// Throws std::invalid_argument, a ValueError in Python, unless the sizes are those expected.
template <class V>
void expect_size(const char* name, const V& view, std::initializer_list<int64_t> sizes) {
    int d = 0;
    for (int64_t size : sizes) {
        if (view.size[d] != size)
            throw std::invalid_argument(std::string(name) + ": expected size " + std::to_string(size) + " in dimension " +
                                        std::to_string(d) + ", got " + std::to_string(view.size[d]));
        ++d;
    }
}

// The same for an argument that may be absent.
template <class V>
void expect_size(const char* name, const Maybe<V>& maybe, std::initializer_list<int64_t> sizes) {
    if (maybe.present) expect_size(name, maybe.view, sizes);
}

inline void expect(bool truth, const char* what) {
    if (!truth) throw std::invalid_argument(what);
}

}  // namespace vgpo

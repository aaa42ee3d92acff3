// Vectors of float, by the compiler's vector extension: one source for every instruction set.
//
// A file that is compiled for a target defines VGPO_TARGET (the namespace) and VGPO_LANES (floats in a vector), and
// includes kernels.h; everything below lives in that namespace. No template of the standard library is used here:
// its copy, made for one target, could be the one that the linker keeps for all.
#pragma once
#include "../target.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace vgpo::VGPO_TARGET {

#include "../signatures.h"

constexpr int LANES = VGPO_LANES;
typedef float F __attribute__((vector_size(4 * VGPO_LANES)));
typedef int32_t I __attribute__((vector_size(4 * VGPO_LANES)));
typedef uint32_t U __attribute__((vector_size(4 * VGPO_LANES)));
typedef uint16_t H __attribute__((vector_size(2 * VGPO_LANES)));

template <class T>
VGPO_INLINE T min(T a, T b) { return b < a ? b : a; }
template <class T>
VGPO_INLINE T max(T a, T b) { return a < b ? b : a; }
VGPO_INLINE int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

VGPO_INLINE F broadcast(float x) { return x - F{}; }  // a subtraction of 0 is folded away, an addition is not: -0 + 0 is 0
VGPO_INLINE I broadcast_int(int32_t x) { return I{} + x; }

template <class To, class From>
VGPO_INLINE To bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "bits: sizes differ");
    To to;
    std::memcpy(&to, &from, sizeof(to));
    return to;
}

// Element by element: where `mask` is set `a`, else `b`.
VGPO_INLINE F select(I mask, F a, F b) { return mask ? a : b; }

// Where a or b is a NaN: b. By lanes: where a pragma switches instructions on, GCC before 13 does not define __AVX512F__
// and the like. The forms with a mask, of all lanes, are those about which GCC does not warn.
#if defined(__x86_64__) && VGPO_LANES == 16
VGPO_INLINE F max(F a, F b) { return bits<F>(_mm512_maskz_max_ps(0xffff, bits<__m512>(a), bits<__m512>(b))); }
VGPO_INLINE F min(F a, F b) { return bits<F>(_mm512_maskz_min_ps(0xffff, bits<__m512>(a), bits<__m512>(b))); }
#elif defined(__x86_64__) && VGPO_LANES == 8
VGPO_INLINE F max(F a, F b) { return bits<F>(_mm256_max_ps(bits<__m256>(a), bits<__m256>(b))); }
VGPO_INLINE F min(F a, F b) { return bits<F>(_mm256_min_ps(bits<__m256>(a), bits<__m256>(b))); }
#else
VGPO_INLINE F max(F a, F b) { return select(a > b, a, b); }
VGPO_INLINE F min(F a, F b) { return select(a < b, a, b); }
#endif

// --- conversions ---

VGPO_INLINE F widen(H h, bf16) { return bits<F>(__builtin_convertvector(h, U) << 16); }

VGPO_INLINE H narrow(F x, bf16) {
    const U u = bits<U>(x);
    const U rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
    const U quiet = (u >> 16) | 0x40;
    return __builtin_convertvector((u & 0x7fffffff) > 0x7f800000 ? quiet : rounded, H);
}

#if defined(__x86_64__) && VGPO_LANES == 16
VGPO_INLINE F widen(H h, half) { return bits<F>(_mm512_maskz_cvtph_ps(0xffff, bits<__m256i>(h))); }
VGPO_INLINE H narrow(F x, half) {
    return bits<H>(_mm512_maskz_cvtps_ph(0xffff, bits<__m512>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif defined(__x86_64__) && VGPO_LANES == 8
VGPO_INLINE F widen(H h, half) { return bits<F>(_mm256_cvtph_ps(bits<__m128i>(h))); }
VGPO_INLINE H narrow(F x, half) {
    return bits<H>(_mm256_cvtps_ph(bits<__m256>(x), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#else
VGPO_INLINE F widen(H h, half) {
    const U u = __builtin_convertvector(h, U), magnitude = u & 0x7fff;
    const F scaled = bits<F>(magnitude << 13) * 0x1p112f;  // moves the exponent's bias, subnormal numbers included
    const U special = (magnitude << 13) | 0x7f800000;
    return bits<F>((magnitude >= 0x7c00 ? special : bits<U>(scaled)) | ((u & 0x8000) << 16));
}
VGPO_INLINE H narrow(F x, half) {
    const U u = bits<U>(x), sign = (u >> 16) & 0x8000, magnitude = u & 0x7fffffff;
    // Below 2^-14 the sum with 0.5 rounds to a multiple of 2^-24, the spacing of subnormal half numbers.
    const U small = bits<U>(bits<F>(magnitude) + 0.5f) - 0x3f000000;
    const U normal = (magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13;
    const U infinite = magnitude > 0x7f800000 ? U{} + 0x7e00 : U{} + 0x7c00;
    const U rounded = magnitude < 0x38800000 ? small : normal;
    return __builtin_convertvector((magnitude >= 0x477ff000 ? infinite : rounded) | sign, H);
}
#endif

// --- memory; any alignment ---

VGPO_INLINE F load(const float* p) {
    F x;
    std::memcpy(&x, p, sizeof(x));
    return x;
}
VGPO_INLINE void store(float* p, F x) { std::memcpy(p, &x, sizeof(x)); }

template <class T>
VGPO_INLINE F load(const T* p) {
    H h;
    std::memcpy(&h, p, sizeof(h));
    return widen(h, T{});
}
template <class T>
VGPO_INLINE void store(T* p, F x) {
    const H h = narrow(x, T{});
    std::memcpy(p, &h, sizeof(h));
}

// The first `count` elements; the others are 0, or are not written.
template <class T>
VGPO_INLINE F load_partial(const T* p, int64_t count) {
    T part[LANES] = {};
    std::memcpy(part, p, count * sizeof(T));
    return load(part);
}
template <class T>
VGPO_INLINE void store_partial(T* p, F x, int64_t count) {
    T part[LANES];
    store(part, x);
    std::memcpy(p, part, count * sizeof(T));
}

// The same, `stride` elements apart.
template <class T>
VGPO_INLINE F load_partial(const T* p, int64_t count, int64_t stride) {
    if (stride == 1) return count == LANES ? load(p) : load_partial(p, count);
    T part[LANES] = {};
    for (int64_t i = 0; i < count; ++i) part[i] = p[i * stride];
    return load(part);
}
template <class T>
VGPO_INLINE void store_partial(T* p, F x, int64_t count, int64_t stride) {
    if (stride == 1) return count == LANES ? store(p, x) : store_partial(p, x, count);
    T part[LANES];
    store(part, x);
    for (int64_t i = 0; i < count; ++i) p[i * stride] = part[i];
}

// One element.
VGPO_INLINE float to_float(float x) { return x; }
VGPO_INLINE float to_float(bf16 x) { return bits<float>(static_cast<uint32_t>(x.bits) << 16); }
VGPO_INLINE float to_float(half x) { return load_partial(&x, 1)[0]; }
template <class T>
VGPO_INLINE void from_float(T* p, float x) { store_partial(p, broadcast(x), 1); }

// --- over the lanes, in one order for every target's own width ---

VGPO_INLINE float sum_lanes(F x) {
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] += part[i + width];
    return part[0];
}
VGPO_INLINE float max_lanes(F x) {
    float part[LANES];
    store(part, x);
    for (int width = LANES / 2; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) part[i] = max(part[i], part[i + width]);
    return part[0];
}
VGPO_INLINE float min_lanes(F x) { return -max_lanes(-x); }

VGPO_INLINE I lane_numbers() {
    I x;
    for (int i = 0; i < LANES; ++i) x[i] = i;
    return x;
}
VGPO_INLINE I first_lanes(int64_t count) { return lane_numbers() < broadcast_int(static_cast<int32_t>(count)); }

// --- threads and their memory ---

template <class Body>
void parallel(int64_t tasks, int64_t threads, Body& body) {
    run_parallel(
        tasks, threads,
        [](void* context, int64_t task, int64_t worker) { (*static_cast<Body*>(context))(task, worker); }, &body);
}

// Memory for one call, a part for each worker, allocated before the work begins; throws std::bad_alloc.
template <class T>
class Scratch {
public:
    Scratch(int64_t elements, int64_t workers = 1) : stride_(divide_up(elements * sizeof(T), 64) * 64) {
        data_ = static_cast<char*>(std::aligned_alloc(64, max<int64_t>(stride_ * workers, 64)));
        if (!data_) throw std::bad_alloc();
    }
    ~Scratch() { std::free(data_); }
    Scratch(const Scratch&) = delete;
    Scratch& operator=(const Scratch&) = delete;

    VGPO_INLINE T* of(int64_t worker) const { return reinterpret_cast<T*>(data_ + worker * stride_); }

private:
    int64_t stride_;  // bytes
    char* data_;
};

}  // namespace vgpo::VGPO_TARGET

// The kernels for x86-64 processors with AVX2, FMA and F16C.
#if defined(__x86_64__)
#include "target.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define VGPO_TARGET avx2
#define VGPO_LANES 8
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

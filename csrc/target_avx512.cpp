// The kernels for x86-64 processors with AVX-512 (F, BW, DQ, VL).
#if defined(__x86_64__)
#include "target.h"
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define VGPO_TARGET avx512
#define VGPO_LANES 16
#include "kernels.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

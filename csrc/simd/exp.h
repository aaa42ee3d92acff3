// exp and tanh of vectors. Stated and tested (tests/package/test_package_vector_math.py), against float64:
//   exp:  relative error below 2^-22 where the result is a normal number, absolute below 2^-148 below that;
//         exact 0, 1 and infinity at -inf, 0 and inf; NaN stays NaN.
//   tanh: relative error below 2^-21; NaN stays NaN.
#pragma once
#include "vector.h"

namespace vgpo::VGPO_TARGET {

// x = n ln 2 + r with |r| <= ln 2 / 2; a polynomial of degree 7 in r (coefficients of Cephes' expf), scaled by 2^n.
VGPO_INLINE F exp(F x) {
    x = max(broadcast(-110.0f), min(broadcast(90.0f), x));
    const F magic = broadcast(12582912.0f);  // 1.5 * 2^23: what is added to it is rounded to an integer
    const F n = (x * 1.44269504088896341f + magic) - magic;
    F r = x - n * 0.693359375f;  // exact: few bits
    r = r + n * 2.12194440e-4f;
    F p = broadcast(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
#if defined(__x86_64__) && VGPO_LANES == 16
    return bits<F>(_mm512_maskz_scalef_ps(0xffff, bits<__m512>(p), bits<__m512>(n)));
#else
    // In two steps: 2^n alone may be no float.
    const I exponent = __builtin_convertvector(select(n == n, n, F{}), I), first = exponent >> 1, second = exponent - first;
    return p * bits<F>((first + 127) << 23) * bits<F>((second + 127) << 23);
#endif
}

// Close to 0 an odd polynomial (coefficients of Cephes' tanhf), else 1 - 2 / (1 + exp(2 |x|)).
VGPO_INLINE F tanh(F x) {
    const F magnitude = bits<F>(bits<U>(x) & 0x7fffffff), square = x * x;
    F p = broadcast(-5.70498872745e-3f);
    p = p * square + 2.06390887954e-2f;
    p = p * square - 5.37397155531e-2f;
    p = p * square + 1.33314422036e-1f;
    p = p * square - 3.33332819422e-1f;
    const F near = p * square * x + x;
    const F far = 1.0f - 2.0f / (1.0f + exp(magnitude + magnitude));
    const F signed_far = bits<F>(bits<U>(far) | (bits<U>(x) & 0x80000000));
    return select(magnitude < 0.625f, near, signed_far);
}

}  // namespace vgpo::VGPO_TARGET

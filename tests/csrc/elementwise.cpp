// exp, tanh and the conversions of csrc/simd over a vector, as a C function for the tests: of the portable target, or of
// -DVGPO_TARGET=NAME -DVGPO_LANES=COUNT with the compiler's flags for its instructions.
#if !defined(VGPO_TARGET)
#define VGPO_TARGET portable
#define VGPO_LANES 4
#endif
#include "../../csrc/simd/exp.h"

using namespace vgpo;
using namespace vgpo::VGPO_TARGET;

// out = exp(x), tanh(x) or x if `which` is 0, 1 or 2; types as in csrc/view.h, strides in elements.
extern "C" __attribute__((visibility("default"))) void elementwise(void* out, int64_t out_type, int64_t out_stride,
                                                                   const void* x, int64_t x_type, int64_t x_stride,
                                                                   int64_t count, int64_t which) {
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = VGPO_TARGET::min<int64_t>(LANES, count - i);
        F value{};
        with_type(static_cast<Type>(x_type), [&](auto type) {
            value = load_partial(static_cast<const decltype(type)*>(x) + i * x_stride, some, x_stride);
        });
        value = which == 0 ? VGPO_TARGET::exp(value) : which == 1 ? VGPO_TARGET::tanh(value) : value;
        with_type(static_cast<Type>(out_type), [&](auto type) {
            store_partial(static_cast<decltype(type)*>(out) + i * out_stride, value, some, out_stride);
        });
    }
}

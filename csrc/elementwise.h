// The functions of exp.h and the conversions of simd.h over a vector, so that tests reach them.
#pragma once
#include "exp.h"

namespace vgpo::VGPO_TARGET {

void elementwise(Floats<1> out, Floats<1> x, int64_t which, int64_t) {
    expect_size("out", out, {x.size[0]});
    expect(which >= 0 && which <= 2, "which: expected 0, 1 or 2");
    for (int64_t i = 0; i < x.size[0]; i += LANES) {
        const int64_t some = smaller<int64_t>(LANES, x.size[0] - i);
        F value{};
        with_type(x.type, [&](auto type) {
            value = load_some(x.as<decltype(type)>().at(i), some, x.stride[0]);
        });
        value = which == 0 ? exp(value) : which == 1 ? tanh(value) : value;
        with_type(out.type, [&](auto type) {
            store_some(out.as<decltype(type)>().at(i), value, some, out.stride[0]);
        });
    }
}

}  // namespace vgpo::VGPO_TARGET

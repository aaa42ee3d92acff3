// What every target defines; included inside a namespace, once for each.
// `threads` is how many may work. Sizes are checked first: std::invalid_argument names what does not fit.

// out (m, n) = left (m, k) @ right (k, n), or that added to `out`.
void product(View<float, 2> out, Floats<2> left, Floats<2> right, bool add, int64_t threads);

// out (n) = exp(x), or tanh(x) where `which` is 1: for the tests of exp.h.
void elementwise(View<float, 1> out, View<float, 1> x, int64_t which, int64_t threads);

#undef VGPO_KERNELS
#define VGPO_KERNELS(X) X(product) X(elementwise)

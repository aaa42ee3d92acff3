// What every target defines; included inside a namespace, once for each.
// `threads` is how many may work. Sizes are checked first: std::invalid_argument names what does not fit.

// out (m, n) = left (m, k) @ right (k, n), or that added to `out`.
void product(View<float, 2> out, Floats<2> left, Floats<2> right, bool add, int64_t threads);

// out (n) = exp(x), or tanh(x) where `which` is 1: for the tests of exp.h.
void elementwise(View<float, 1> out, View<float, 1> x, int64_t which, int64_t threads);

// The policy loss of tokens (B, T) and `gradient`, its derivative by logps, times 1 / (tokens of the row) if row_mean;
// both 0 where mask is. rows (B, 10): what `reduce_rows` of vgpo_kernels/policy_loss/terms.py takes. One ratio a row if
// `sequence`. `settings` as in terms.h. old None: logps without gradient.
void policy_loss(View<float, 2> loss, View<float, 2> gradient, View<float, 2> rows, Floats<2> logps,
                 Maybe<Floats<2>> old, Floats<2> advantages, View<uint8_t, 2> mask, Maybe<Floats<2>> ref,
                 Maybe<Floats<2>> token_weights, Maybe<Floats<1>> trajectory_weights, View<double, 1> settings,
                 bool sequence, bool row_mean, int64_t threads);

#undef VGPO_KERNELS
#define VGPO_KERNELS(X) X(product) X(elementwise) X(policy_loss)

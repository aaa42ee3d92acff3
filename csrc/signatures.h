// What every target defines; included inside a namespace, once for each.
// `threads` is how many may work. Sizes are checked first: std::invalid_argument names what does not fit.

// out (m, n) = left (m, k) @ right (k, n), both of one type, or that added to `out`.
void product(View<float, 2> out, Floats<2> left, Floats<2> right, bool add, int64_t threads);

// The policy loss of tokens (B, T) and `gradient`, its derivative by logps, times 1 / (tokens of the row) if row_mean;
// both 0 where mask is. rows (B, 10): what `reduce_rows` of vgpo_kernels/policy_loss/terms.py takes. One ratio a row if
// `sequence`. `settings` as in loss/terms.h. old None: logps without gradient.
void policy_loss(View<float, 2> loss, View<float, 2> gradient, View<float, 2> rows, Floats<2> logps,
                 Maybe<Floats<2>> old, Floats<2> advantages, View<uint8_t, 2> mask, Maybe<Floats<2>> ref,
                 Maybe<Floats<2>> token_weights, Maybe<Floats<1>> trajectory_weights, View<double, 1> settings,
                 bool sequence, bool row_mean, int64_t threads);

// Token weights, normalized scores and gate (rows, tokens), trajectory weights and scores (rows), as `weights` of
// vgpo_kernels/weights/reference.py. `options` as in weights/tokens.h; `visual`: rows with a visual token;
// `negative`: rows whose strength is multiplied by an option, None: none. The score of a row with a focus that is not
// finite is NaN, and other results are then of no meaning.
void weights(View<float, 2> token, View<float, 1> trajectory, View<float, 2> normalized, View<uint8_t, 2> gate,
             View<float, 1> score, Floats<2> focus, View<uint8_t, 2> mask, View<int64_t, 1> groups,
             View<uint8_t, 1> visual, Maybe<View<uint8_t, 1>> negative, View<double, 1> options, double strength,
             int64_t threads);

// out (B, Hq, Lq, S) = sums, by segment, of the probabilities exp(score - lse) of the keys in [key_start, key_end) of a
// query; score = scale * q.k, then softcap * tanh(score / softcap) where softcap > 0. q (B, Hq, Lq, D),
// k (B, Hkv, Lk, D), lse (B, Hq, Lq), segment_ids (B, Lk): a key outside [0, S) is in no segment; key_start, key_end (B, Lq).
void attention_mass(View<float, 4> out, Floats<4> q, Floats<4> k, View<float, 3> lse, View<int32_t, 2> segment_ids,
                    View<int32_t, 2> key_start, View<int32_t, 2> key_end, double scale, double softcap,
                    int64_t threads);

// out (B, Hq, n) = the sum (reduction 0), mean (1) or maximum (2), over queries, of those probabilities of the keys at
// positions (B, n); 0 where a position is outside [0, Lk). The mean is over queries with an interval and a finite lse.
void attention_column_sum(View<float, 3> out, Floats<4> q, Floats<4> k, View<float, 3> lse,
                          View<int32_t, 2> positions, View<int32_t, 2> key_start, View<int32_t, 2> key_end,
                          int64_t reduction, double scale, double softcap, int64_t threads);

// focus (B * L) at each of `completion` = the largest cosine of that token's state to the prototypes in [begin, end),
// or 0 without any; the rest of `focus` stays. states (B, L, D). Tokens are numbered row * L + position; prototype p is
// the mean state of tokens visual[bounds[p] : bounds[p + 1]]. Where begin and end are None, prototype b is that of row b.
void visual_focus(View<float, 1> focus, Floats<3> states, View<int64_t, 1> visual, View<int64_t, 1> bounds,
                  View<int64_t, 1> completion, Maybe<View<int32_t, 1>> begin, Maybe<View<int32_t, 1>> end, int64_t threads);

// Logits are (batch, length, V); the softmax is taken of z = softcap tanh(logits / softcap) / temperature, or of
// z = logits / temperature where softcap is 0. Rows that are not valid are not read; their results are 0. Everything
// by token is (batch, length); a target outside of the vocabulary gives NaN.

// logps = z[target] - lse, lse = log sum exp z, entropy = lse - sum softmax(z) z.
void logits_logprobs(View<float, 2> logps, View<float, 2> lse, Maybe<View<float, 2>> entropy, Floats<3> logits,
                     View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid, double temperature, double softcap,
                     int64_t threads);

// out = the derivative of sum(grad_logps logps + grad_entropy entropy + grad_lse lse) by the logits; `out` may
// be the logits.
void logits_gradient(Floats<3> out, Floats<3> logits, View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid,
                     View<float, 2> lse, Maybe<View<float, 2>> entropy, Maybe<View<float, 2>> grad_logps,
                     Maybe<View<float, 2>> grad_entropy, Maybe<View<float, 2>> grad_lse, double temperature,
                     double softcap, int64_t threads);

// logps and entropy as above, and out (may be the logits) = the derivative by the logits of the token-level loss of
// `settings` times row_weights.
void logits_loss(Floats<3> out, View<float, 2> logps, View<float, 2> entropy, Floats<3> logits,
                 View<int64_t, 2> targets, Maybe<View<uint8_t, 2>> valid, Maybe<View<float, 2>> old_logps,
                 View<float, 2> advantages, Maybe<View<float, 2>> ref_logps, Maybe<View<float, 2>> row_weights,
                 double temperature, double softcap, View<double, 1> settings, int64_t threads);

// out (n) = KL(softmax(z_p) || softmax(z_q)) of each row of logits (n, V).
void logits_kl(View<float, 1> out, Floats<2> logits_p, Floats<2> logits_q, double temperature, double softcap,
               int64_t threads);

// Attention with an online softmax: out (B, Hq, Lq, D) of q's type, the probabilities on visual keys summed and the
// natural log of the softmax's denominator, both (B, Hq, Lq); 0, 0 and -inf for a query without a visible key. k and v
// (B, Hkv, Lk, D) of q's type. Visible to query i are the keys from key_start[i] to below key_end[i] (B, Lq) whose key_kinds
// (B, Lk) is not 0; kind 2 is visual. score = scale * q.k, then softcap * tanh(score / softcap) unless softcap is 0.
void visual_attention(Floats<4> out, View<float, 3> mass, View<float, 3> lse, Floats<4> q, Floats<4> k, Floats<4> v,
                      View<uint8_t, 2> key_kinds, View<int32_t, 2> key_start, View<int32_t, 2> key_end, double scale,
                      double softcap, int64_t threads);

#undef VGPO_KERNELS
#define VGPO_KERNELS(X) \
    X(product) \
    X(policy_loss) X(weights) \
    X(attention_mass) X(attention_column_sum) X(visual_attention) \
    X(logits_logprobs) X(logits_gradient) X(logits_loss) X(logits_kl) \
    X(visual_focus)

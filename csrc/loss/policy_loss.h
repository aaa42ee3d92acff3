// The policy loss on log-probabilities, with its gradient and what its metrics are made of.
#pragma once
#include "../simd/row_loads.h"
#include "terms.h"

namespace vgpo::VGPO_TARGET {

// A row is worked on in pieces: few terms to a lane keep sums exact, and all of a piece's inputs fit the first cache.
constexpr int64_t LOSS_CHUNK = 64 * LANES;
constexpr int64_t LOSS_TASK_TOKENS = 16384;  // tokens that are worth a task
constexpr int64_t LOSS_INPUTS = 5;    // of floats, by token
constexpr int64_t LOSS_COLUMNS = 10;  // `ROW_COLUMNS` of vgpo_kernels/policy_loss/terms.py

struct LossArguments {
    Settings settings;
    bool sequence, row_mean;
    View<float, 2> loss, gradient, rows;
    Floats<2> logps, advantages;
    View<uint8_t, 2> mask;
    Maybe<Floats<2>> old, ref, token_weights;
    Maybe<Floats<1>> trajectory_weights;
};

// What is summed over the tokens of a row.
struct LossSums {
    double loss, tokens, low, high, dual, change, kl, ratio, proxy, gradient;
    float ratio_max;
};

// The same over a piece, in lanes.
struct LossLanes {
    F loss, change, kl, ratio, proxy, gradient, ratio_max;
    I tokens, low, high, dual;
};

VGPO_INLINE void add(LossSums& sums, const LossLanes& lanes) {
    sums.loss += sum_lanes(lanes.loss), sums.change += sum_lanes(lanes.change), sums.kl += sum_lanes(lanes.kl);
    sums.ratio += sum_lanes(lanes.ratio), sums.proxy += sum_lanes(lanes.proxy);
    sums.gradient += sum_lanes(lanes.gradient);
    sums.tokens += count_set(lanes.tokens), sums.low += count_set(lanes.low), sums.high += count_set(lanes.high);
    sums.dual += count_set(lanes.dual);
    float part[LANES];
    store(part, lanes.ratio_max);
    for (float ratio : part) sums.ratio_max = ratio > sums.ratio_max || ratio != ratio ? ratio : sums.ratio_max;
}

// The number of valid tokens of a row, and the sum of their log-ratios where the row has one ratio.
inline void count_and_sum(const LossArguments& call, int64_t row, float* buffer, double& tokens, double& log_ratio) {
    const bool sums_ratios = call.sequence;
    for (int64_t start = 0; start < call.mask.size[1]; start += LOSS_CHUNK) {
        const int64_t count = min(LOSS_CHUNK, call.mask.size[1] - start), stride = call.mask.stride[1];
        const uint8_t* mask = call.mask.at(row, start);
        const float *logps = nullptr, *old = nullptr;
        if (sums_ratios) {
            logps = read_row(call.logps, row, start, count, buffer);
            old = call.old.present ? read_row(call.old.view, row, start, count, buffer + LOSS_CHUNK) : logps;
        }
        I valid_count = I{};
        F sum = F{};
        for (int64_t i = 0; i < count; i += LANES) {
            const I valid = load_mask(mask + i * stride, count - i, stride);
            valid_count += valid;
            if (sums_ratios) sum += select(valid, load(logps + i) - load(old + i), F{});
        }
        tokens += count_set(valid_count);
        log_ratio += sum_lanes(sum);
    }
}

// Writes loss and gradient, by row_weight, of `count` tokens from `start` on. What of the gradient comes through the
// row's ratio is summed up instead.
inline void loss_chunk(const LossArguments& call, int64_t row, int64_t start, int64_t count, float row_log_ratio,
                       float row_weight, float* buffer, LossSums& sums) {
    const Settings& settings = call.settings;
    auto read = [&](const Floats<2>& from, int place) {
        return read_row(from, row, start, count, buffer + place * LOSS_CHUNK);
    };
    const bool has_old = call.old.present, has_ref = call.ref.present, has_weights = call.token_weights.present;
    const float *logps = read(call.logps, 0), *advantages = read(call.advantages, 1);
    const float* old = has_old ? read(call.old.view, 2) : logps;
    const float* ref = has_ref ? read(call.ref.view, 3) : logps;
    const float* weights = has_weights ? read(call.token_weights.view, 4) : logps;
    float row_factor = 1.0f;
    if (call.trajectory_weights.present)
        with_type(call.trajectory_weights.view.type, [&](auto type) {
            row_factor = to_float(*call.trajectory_weights.view.as<decltype(type)>().at(row));
        });
    const uint8_t* mask = call.mask.at(row, start);
    LossLanes lanes{};
    for (int64_t i = 0; i < count; i += LANES) {
        const int64_t some = min<int64_t>(LANES, count - i);
        const I valid = load_mask(mask + i * call.mask.stride[1], some, call.mask.stride[1]);
        const F logp = select(valid, load(logps + i), F{});
        F advantage = load(advantages + i);
        if (has_weights) advantage *= load(weights + i);
        advantage = select(valid, advantage * row_factor, F{});
        const F change = logp - select(valid, load(old + i), F{});
        const F log_ratio = call.sequence ? broadcast(row_log_ratio) : change;
        F loss, gradient;
        surrogate(settings, logp, log_ratio, advantage, loss, gradient);
        F through_ratio{};
        if (call.sequence && !settings.cispo) {
            through_ratio = gradient;
            gradient = F{};
        }
        if (has_ref) {
            F kl, by_logp;
            kl_to_reference(settings, logp, log_ratio, select(valid, load(ref + i), F{}), call.sequence, kl, by_logp);
            lanes.kl += select(valid, kl, F{});
            if (settings.beta != 0.0f) {
                loss += settings.beta * kl;
                gradient += settings.beta * by_logp;
                if (settings.kl_weighted) through_ratio += settings.beta * kl;
            }
        }
        lanes.gradient += select(valid, through_ratio, F{});
        loss = select(valid, loss, F{});
        store_partial(call.loss.at(row, start + i), loss, some, call.loss.stride[1]);
        store_partial(call.gradient.at(row, start + i), select(valid, gradient * row_weight, F{}), some,
                   call.gradient.stride[1]);

        const F plain_ratio = exp(log_ratio), ratio = select(valid, plain_ratio, F{});
        const F moved = call.sequence ? exp(change) : plain_ratio;
        const I negative = advantage < 0.0f, positive = advantage > 0.0f;
        lanes.loss += loss;
        lanes.tokens += valid;
        lanes.low += negative & (log_ratio < settings.low);
        lanes.high += positive & (log_ratio > settings.high);
        lanes.dual += negative & (log_ratio > settings.high_negative);
        if (has_old) lanes.change += k3(change, moved);
        lanes.ratio += ratio;
        lanes.proxy -= logp;
        lanes.ratio_max = select((ratio > lanes.ratio_max) | (ratio != ratio), ratio, lanes.ratio_max);
    }
    add(sums, lanes);
}

// Adds `value` to the gradient of a row's valid tokens.
inline void add_to_row(const LossArguments& call, int64_t row, float value) {
    const int64_t length = call.mask.size[1], stride = call.gradient.stride[1];
    for (int64_t i = 0; i < length; i += LANES) {
        const int64_t some = min<int64_t>(LANES, length - i);
        float* p = call.gradient.at(row, i);
        const I valid = load_mask(call.mask.at(row, i), some, call.mask.stride[1]);
        store_partial(p, load_partial(p, some, stride) + select(valid, broadcast(value), F{}), some, stride);
    }
}

inline void loss_row(const LossArguments& call, int64_t row, float* buffer) {
    const int64_t length = call.mask.size[1];
    double tokens = 0.0, log_ratio = 0.0;
    if (call.sequence || call.row_mean) count_and_sum(call, row, buffer, tokens, log_ratio);
    const double inverse = 1.0 / max(tokens, 1.0), row_weight = call.row_mean ? inverse : 1.0;
    LossSums sums{};
    for (int64_t start = 0; start < length; start += LOSS_CHUNK)
        loss_chunk(call, row, start, min(LOSS_CHUNK, length - start), static_cast<float>(log_ratio * inverse),
                   static_cast<float>(row_weight), buffer, sums);
    // A row with one ratio, the mean of its tokens': each of them moves it by an equal share.
    if (call.sequence && (!call.settings.cispo || call.settings.kl_weighted))
        add_to_row(call, row, static_cast<float>(sums.gradient * inverse * row_weight));
    const double columns[LOSS_COLUMNS] = {sums.loss * row_weight, sums.tokens, sums.low,   sums.high,  sums.dual,
                                          sums.change,            sums.kl,     sums.ratio, sums.proxy, sums.ratio_max};
    for (int64_t c = 0; c < LOSS_COLUMNS; ++c) *call.rows.at(row, c) = static_cast<float>(columns[c]);
}

void policy_loss(View<float, 2> loss, View<float, 2> gradient, View<float, 2> rows, Floats<2> logps,
                 Maybe<Floats<2>> old, Floats<2> advantages, View<uint8_t, 2> mask, Maybe<Floats<2>> ref,
                 Maybe<Floats<2>> token_weights, Maybe<Floats<1>> trajectory_weights, View<double, 1> settings,
                 bool sequence, bool row_mean, int64_t threads) {
    const int64_t count = logps.size[0], length = logps.size[1];
    expect_size("loss", loss, {count, length});
    expect_size("gradient", gradient, {count, length});
    expect_size("rows", rows, {count, LOSS_COLUMNS});
    expect_size("old", old, {count, length});
    expect_size("advantages", advantages, {count, length});
    expect_size("mask", mask, {count, length});
    expect_size("ref", ref, {count, length});
    expect_size("token_weights", token_weights, {count, length});
    expect_size("trajectory_weights", trajectory_weights, {count});
    const LossArguments call{settings_of(settings), sequence, row_mean, loss, gradient,      rows,
                        logps,                 advantages, mask,   old,  ref,           token_weights,
                        trajectory_weights};
    Scratch<float> buffers(LOSS_INPUTS * LOSS_CHUNK, threads);
    const int64_t rows_per_task = max<int64_t>(LOSS_TASK_TOKENS / max<int64_t>(length, 1), 1);
    auto task = [&](int64_t number, int64_t worker) {
        const int64_t end = min(count, (number + 1) * rows_per_task);
        for (int64_t row = number * rows_per_task; row < end; ++row) loss_row(call, row, buffers.of(worker));
    };
    parallel(divide_up(count, rows_per_task), threads, task);
}

}  // namespace vgpo::VGPO_TARGET

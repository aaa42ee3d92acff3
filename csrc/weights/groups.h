// What token and trajectory weights share, and the weights of trajectories within their groups.
#pragma once
#include "../simd/row_loads.h"

namespace vgpo::VGPO_TARGET {

// Trajectory scores this close (relative) differ by float32's rounding only, and count as equal.
constexpr double SCORE_RESOLUTION = 0x1p-22;

enum class Clamping { none, cut, project };

struct Bounds {
    Clamping how;
    double low, high;
};

// The shift s with sum(clamp(factor + s, low, high)) = count, for factors in [0, 2]: the sum is low * count at
// low - 2, high * count at `high`, and linear in between while no factor reaches a bound, so that Newton's steps end in
// the exact piece; halvings where they leave what is known. sum(s, total, moving) gives the sum and how many factors
// lie between the bounds.
template <class Sum>
VGPO_INLINE double shift_to_mean(double count, const Bounds& bounds, Sum sum) {
    double below = bounds.low - 2.0, above = bounds.high, shift = 0.0;
    for (int round = 0; round < 100; ++round) {
        double total = 0.0, moving = 0.0;
        sum(shift, total, moving);
        const double next = moving > 0.0 ? shift + (count - total) / moving : shift;
        if (std::fabs(count - total) <= 1e-14 * count) return next;
        (total < count ? below : above) = shift;
        shift = next > below && next < above ? next : (below + above) * 0.5;
    }
    return shift;
}

VGPO_INLINE double clamped(double x, const Bounds& bounds) {
    return x < bounds.low ? bounds.low : x > bounds.high ? bounds.high : x;
}

// A factor at that strength, in the type of the factor.
template <class T>
VGPO_INLINE T scaled(T factor, double strength) {
    return strength == 1.0 ? factor : 1 + static_cast<T>(strength) * (factor - 1);
}

// Sorts `rows`, numbers of rows, by group, rows of a group in their order. `spare` is as long.
inline void sort_by_group(int64_t* rows, int64_t* spare, int64_t count, const View<int64_t, 1>& groups) {
    for (int64_t width = 1; width < count; width *= 2) {
        for (int64_t start = 0; start < count; start += 2 * width) {
            const int64_t middle = min(start + width, count), end = min(start + 2 * width, count);
            int64_t left = start, right = middle;
            for (int64_t i = start; i < end; ++i) {
                const bool from_left = left < middle && (right == end || *groups.at(rows[left]) <= *groups.at(rows[right]));
                spare[i] = from_left ? rows[left++] : rows[right++];
            }
        }
        std::memcpy(rows, spare, count * sizeof(*rows));
    }
}

// Turns the scores of a group's `count` rows into 1 + phi. A row with an infinite score is left out and gets 1.
inline void weigh_group(double* scores, const int64_t* rows, int64_t count, const Bounds& bounds) {
    double low = INFINITY, high = -INFINITY, members = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        const double score = scores[rows[i]];
        if (score == INFINITY) continue;
        low = min(low, score), high = max(high, score), members += 1.0;
    }
    const bool differ = high - low > SCORE_RESOLUTION * max(std::fabs(low), std::fabs(high));
    double mean = 0.0;
    for (int64_t i = 0; i < count; ++i) {
        double& score = scores[rows[i]];
        if (score == INFINITY) continue;
        score = differ ? (score - low) / (high - low) : 0.0;
        mean += score;
    }
    mean /= max(members, 1.0);
    bool clipped = false;
    for (int64_t i = 0; i < count; ++i) {
        double& score = scores[rows[i]];
        if (score == INFINITY) continue;
        score = 1.0 + (score - mean);
        clipped = clipped || score < bounds.low || score > bounds.high;
    }
    double shift = 0.0;
    if (bounds.how == Clamping::project && clipped)
        shift = shift_to_mean(members, bounds, [&](double s, double& total, double& moving) {
            for (int64_t i = 0; i < count; ++i) {
                const double factor = scores[rows[i]] + s;
                if (factor == INFINITY) continue;
                total += clamped(factor, bounds);
                moving += factor > bounds.low && factor < bounds.high;
            }
        });
    for (int64_t i = 0; i < count; ++i) {
        double& factor = scores[rows[i]];
        if (factor == INFINITY) factor = 1.0;
        else if (bounds.how != Clamping::none) factor = clamped(factor + shift, bounds);
    }
}

// The same for every group of rows with one label.
inline void weigh_groups(double* scores, const View<int64_t, 1>& groups, const Bounds& bounds) {
    const int64_t count = groups.size[0];
    Scratch<int64_t> order(count, 2);
    int64_t* rows = order.of(0);
    for (int64_t i = 0; i < count; ++i) rows[i] = i;
    sort_by_group(rows, order.of(1), count, groups);
    for (int64_t first = 0, last; first < count; first = last) {
        for (last = first + 1; last < count && *groups.at(rows[last]) == *groups.at(rows[first]);) ++last;
        weigh_group(scores, rows + first, last - first, bounds);
    }
}

}  // namespace vgpo::VGPO_TARGET

// Kernels of every target that this processor has, against plain loops in double. Exits 0, or says what is wrong.
// For processors and compilers that Python's tests do not reach.
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <stdexcept>
#include <thread>
#include <vector>

#include "../../csrc/capability.h"
#include "../../csrc/parallel.h"
#include "../../csrc/view.h"

namespace vgpo::portable {
#include "../../csrc/signatures.h"
}
#if defined(__x86_64__)
namespace vgpo::avx2 {
#include "../../csrc/signatures.h"
}
namespace vgpo::avx512 {
#include "../../csrc/signatures.h"
}
#endif

extern "C" void elementwise(void* out, int64_t out_type, int64_t out_stride, const void* x, int64_t x_type,
                            int64_t x_stride, int64_t count, int64_t which);

namespace {

using namespace vgpo;

const char* target = "portable";

// In place of torch's parallel-for: a thread for each number.
int32_t on_threads(int64_t begin, int64_t end, int64_t, void (*body)(int64_t, int64_t, void*), void* context) {
    std::vector<std::thread> threads;
    for (int64_t i = begin; i < end; ++i) threads.emplace_back(body, i, i + 1, context);
    for (std::thread& thread : threads) thread.join();
    return 0;
}

void require(bool condition, const char* what, int64_t where, double got, double expected) {
    if (condition) return;
    std::fprintf(stderr, "selfcheck: %s: %s at %lld: expected %.9g, got %.9g\n", target, what,
                 static_cast<long long>(where), expected, got);
    std::exit(1);
}

void require_close(const char* what, int64_t where, double got, double expected, double tolerance) {
    require(std::abs(got - expected) <= tolerance * (1 + std::abs(expected)), what, where, got, expected);
}

// Numbers in [-1, 1), the same everywhere.
float next_number() {
    static uint64_t state = 88172645463325252u;
    state ^= state << 13, state ^= state >> 7, state ^= state << 17;
    return static_cast<float>(static_cast<int64_t>(state >> 40)) / static_cast<float>(1 << 23) - 1.0f;
}

std::vector<float> numbers(int64_t count, float scale = 1.0f) {
    std::vector<float> values(count);
    for (float& value : values) value = scale * next_number();
    return values;
}

float widened(float x) { return x; }
// From sign, exponent and digits, by arithmetic.
float widened(int bits, int digits, int exponents, int bias) {
    const int exponent = bits >> digits & ((1 << exponents) - 1), fraction = bits & ((1 << digits) - 1);
    const int whole = fraction | (exponent ? 1 << digits : 0);
    return std::ldexp(static_cast<float>(whole), (exponent ? exponent : 1) - bias - digits) * (bits >> 15 ? -1 : 1);
}
float widened(bf16 x) { return widened(x.bits, 7, 8, 127); }
float widened(half x) { return widened(x.bits, 10, 5, 15); }

// Of either sign, from 0x3e00 to 0x3fff for bf16, from 0 and the subnormal numbers up to 0x3bff for half: about 1.
uint16_t random_bits(int first, int count) {
    const int sign = next_number() < 0 ? 0x8000 : 0;
    return static_cast<uint16_t>(sign | (first + static_cast<int>((1 + next_number()) / 2 * count)));
}
void fill(float& x) { x = next_number(); }
void fill(bf16& x) { x.bits = random_bits(0x3e00, 0x200); }
void fill(half& x) { x.bits = random_bits(0, 0x3c00); }

template <class T>
Floats<2> matrix(std::vector<T>& values, int64_t rows, int64_t columns, bool across) {
    return {values.data(), type_of<T>(), {rows, columns}, {across ? 1 : columns, across ? rows : 1}};
}

// Odd sizes: less than a tile, more than a block of the depth. Both orders of strides.
template <class T, class Kernel>
void check_product(Kernel* product) {
    const int64_t sizes[][3] = {{1, 1, 1}, {3, 7, 2}, {37, 301, 53}, {5, 0, 9}, {70, 20, 260}};
    for (const auto& size : sizes) {
        const int64_t m = size[0], k = size[1], n = size[2];
        std::vector<T> left(m * k + 1), right(k * n + 1);
        for (T& x : left) fill(x);
        for (T& x : right) fill(x);
        for (int layout = 0; layout < 4; ++layout) {
            const bool left_across = layout & 1, right_across = layout & 2;
            std::vector<float> out(m * n, 0.5f);
            product({out.data(), {m, n}, {n, 1}}, matrix(left, m, k, left_across), matrix(right, k, n, right_across),
                    layout == 3, 3);
            for (int64_t i = 0; i < m; ++i) {
                for (int64_t j = 0; j < n; ++j) {
                    double sum = layout == 3 ? 0.5 : 0.0, size_of_terms = 1.0;
                    for (int64_t d = 0; d < k; ++d) {
                        const double a = widened(left[left_across ? d * m + i : i * k + d]);
                        const double b = widened(right[right_across ? j * k + d : d * n + j]);
                        sum += a * b, size_of_terms += std::abs(a * b);
                    }
                    const double got = out[i * n + j];
                    require(std::abs(got - sum) <= 1e-5 * size_of_terms, "product", i * n + j, got, sum);
                }
            }
        }
    }
}

void check_elementwise() {
    const float infinity = std::numeric_limits<float>::infinity();
    std::vector<float> x = numbers(1003, 80.0f);
    x[0] = 0.0f, x[1] = -infinity, x[2] = infinity, x[3] = -100.0f;
    const int64_t count = x.size();
    std::vector<float> out(count);
    elementwise(out.data(), 0, 1, x.data(), 0, 1, count, 0);
    require(out[0] == 1.0f && out[1] == 0.0f && out[2] == infinity, "exp of 0 and infinities", 0, out[0], 1);
    for (int64_t i = 3; i < count; ++i) {
        const double expected = std::exp(static_cast<double>(x[i]));
        require(std::abs(out[i] - expected) <= 0x1p-22 * expected + 0x1p-148, "exp", i, out[i], expected);
    }
    elementwise(out.data(), 0, 1, x.data(), 0, 1, count, 1);
    for (int64_t i = 0; i < count; ++i) require_close("tanh", i, out[i], std::tanh(static_cast<double>(x[i])), 0x1p-21);
    x[0] = std::nanf("");
    elementwise(out.data(), 0, 1, x.data(), 0, 1, 1, 0);
    require(std::isnan(out[0]), "exp of NaN", 0, out[0], x[0]);
}

// Sizes that do not fit are refused.
template <class Kernel>
void check_sizes(Kernel* product) {
    std::vector<float> left(6), right(6), out(4);
    try {
        product({out.data(), {2, 2}, {2, 1}}, matrix(left, 2, 3, false), matrix(right, 2, 3, false), false, 1);
    } catch (const std::invalid_argument&) {
        return;
    }
    require(false, "a wrong size was taken", 0, 2, 3);
}

// Ratios clipped to [low, high] on the log scale, some tokens masked, whose values are NaN.
template <class Kernel>
void check_policy_loss(Kernel* policy_loss) {
    const int64_t rows = 5, tokens = 333;
    const double low = -0.2, high = 0.25;
    std::vector<float> logps = numbers(rows * tokens), old = logps, advantages = numbers(rows);
    for (float& value : old) value += 0.4f * next_number();
    std::vector<uint8_t> mask(rows * tokens);
    for (int64_t i = 0; i < rows * tokens; ++i) {
        mask[i] = next_number() < 0.5f;
        if (!mask[i]) logps[i] = std::nanf("");
    }
    std::vector<float> loss(rows * tokens, -9.0f), gradient = loss, sums(rows * 10);
    const double infinity = std::numeric_limits<double>::infinity();
    std::vector<double> settings = {0, low, high, infinity, 0, infinity, infinity, 0};
    policy_loss({loss.data(), {rows, tokens}, {tokens, 1}}, {gradient.data(), {rows, tokens}, {tokens, 1}},
                {sums.data(), {rows, 10}, {10, 1}}, matrix(logps, rows, tokens, false),
                {true, matrix(old, rows, tokens, false)}, {advantages.data(), Type::f32, {rows, tokens}, {1, 0}},
                {mask.data(), {rows, tokens}, {tokens, 1}}, {false, {}}, {false, {}}, {false, {}},
                {settings.data(), {8}, {1}}, false, false, 3);
    for (int64_t i = 0; i < rows * tokens; ++i) {
        const double advantage = advantages[i / tokens], log_ratio = static_cast<double>(logps[i]) - old[i];
        const bool clipped = advantage < 0 ? log_ratio < low : log_ratio > high;
        const double bounded = clipped ? advantage < 0 ? low : high : log_ratio;
        const double expected = mask[i] ? -std::exp(bounded) * advantage : 0;
        require_close("policy loss", i, loss[i], expected, 1e-6);
        require_close("policy gradient", i, gradient[i], clipped || !mask[i] ? 0 : expected, 1e-6);
    }
}

#define CHECK(name, space)                   \
    target = name;                           \
    check_product<float>(space::product);    \
    check_product<bf16>(space::product);     \
    check_product<half>(space::product);     \
    check_sizes(space::product);             \
    check_policy_loss(space::policy_loss);   \
    std::printf("selfcheck: %s is right\n", name)

}  // namespace

int main() {
    parallel_for = on_threads;
    check_elementwise();
    CHECK("portable", portable);
#if defined(__x86_64__)
    if (best_capability() >= 1) {
        CHECK("avx2", avx2);
    }
    if (best_capability() >= 2) {
        CHECK("avx512", avx512);
    }
#endif
}

// SPDX-License-Identifier: BSD-3-Clause
// Chooses the instruction set and divides the work of a step among threads.
//
// Any number of threads gives the same bits. Sums: the chunks of partial sums depend on the shape alone, and partial sums
// are added in the order of the chunks. Channels may go to any thread, since no step mixes them. Elementwise: an
// element's bits depend on its inputs alone.
#include "run.hpp"

#include <algorithm>
#include <cstring>

#include "parallel.hpp"

namespace syncbn {
namespace {

constexpr int64_t THREADED = 1 << 17;  // elements: waking a thread costs as much as a tenth of them
constexpr int64_t CHUNK = 1 << 17;     // at least so many elements in a chunk
constexpr int64_t FAR = 4 << 20;       // bytes: second-level caches hold 0.5 to 2 MB

#define SYNCBN_STEPS(isa)                                                                                           \
    {                                                                                                               \
        #isa, isa::local_moments, isa::finalize, isa::update_running, isa::normalize_coefficients, isa::normalize, \
            isa::backward_sums, isa::narrow_values, isa::backward_coefficients, isa::backward_input                 \
    }
const Steps ALL[] = {
#if defined(SYNCBN_X86)
    SYNCBN_STEPS(avx512), SYNCBN_STEPS(avx2),
#endif
    SYNCBN_STEPS(baseline)};

bool can_run(const Steps& steps) {
#if defined(SYNCBN_X86)
    __builtin_cpu_init();
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    if (!std::strcmp(steps.name, "avx2")) return avx2;
    if (!std::strcmp(steps.name, "avx512"))
        return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
               __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#endif
    return !std::strcmp(steps.name, "baseline");
}

const Steps* in_use = std::find_if(std::begin(ALL), std::end(ALL), can_run);

int64_t elements(const Shape& k) { return k.N * k.C * k.S; }
int64_t threads_for(const Shape& k, int64_t threads) { return elements(k) < THREADED ? 1 : threads; }

Shape with_distance(Shape k) {
    const int64_t size = k.dtype == DType::float64 ? 8 : k.dtype == DType::float32 ? 4 : 2;
    k.far = elements(k) * size > FAR;
    return k;
}

// Calls part(Part, partial sums) over the work of a sum and adds the partial sums up. Returns [2, padded(C)].
template <class Call> std::vector<double> sum_up(const Shape& k, int64_t threads, Call part) {
    const int64_t items = k.rows ? k.N * k.S : k.N * segments(k.S), width = 2 * padded(k.C);
    const int64_t wanted = k.rows || k.C < 32 ? elements(k) / CHUNK : 1;
    const int64_t chunks = std::max<int64_t>(1, std::min({wanted, MAX_CHUNKS, k.rows ? items / 8 : items}));
    const int64_t workers = threads_for(k, threads);
    const int64_t blocks = k.rows ? (k.C + BLOCK - 1) / BLOCK : chunks > 1 ? 1 : std::min(k.C, workers);
    std::vector<double> sums(chunks * width);
    if (items == 0) return sums;
    parallel_for(workers, chunks * blocks, [&](int64_t i) {
        const int64_t chunk = i / blocks, b = i % blocks;
        const int64_t c_first = k.rows ? b * BLOCK : k.C * b / blocks;
        const int64_t c_last = k.rows ? std::min(k.C, c_first + BLOCK) : k.C * (b + 1) / blocks;
        part(Part{items * chunk / chunks, items * (chunk + 1) / chunks, c_first, c_last}, sums.data() + chunk * width);
    });
    for (int64_t chunk = 1; chunk < chunks; ++chunk)
        for (int64_t i = 0; i < width; ++i) sums[i] += sums[chunk * width + i];
    return sums;
}

// Calls part(Part) over the work of an elementwise step.
template <class Call> void each(const Shape& k, int64_t threads, Call part) {
    const int64_t items = k.rows ? k.N * k.S : k.N * k.C * segments(k.S);
    const int64_t workers = threads_for(k, threads), parts = workers == 1 ? 1 : std::min(items, 4 * workers);
    parallel_for(workers, parts, [&](int64_t i) {
        part(Part{items * i / parts, items * (i + 1) / parts, 0, k.C});
    });
}

}  // namespace

std::vector<std::string> instruction_sets() {
    std::vector<std::string> names;
    for (const Steps& steps : ALL)
        if (can_run(steps)) names.push_back(steps.name);
    return names;
}

const char* instruction_set() { return in_use->name; }

bool use_instruction_set(const std::string& name) {
    for (const Steps& steps : ALL)
        if (name == steps.name && can_run(steps)) return in_use = &steps, true;
    return false;
}

void run_local_moments(const Shape& shape, const Elements& x, int64_t threads, double* sum_x, double* sum_x2) {
    const Shape k = with_distance(shape);
    const auto sums = sum_up(k, threads, [&](const Part& part, double* out) { in_use->local_moments(k, x, part, out); });
    std::copy_n(sums.data(), k.C, sum_x);
    std::copy_n(sums.data() + padded(k.C), k.C, sum_x2);
}

void run_normalize(Shape k, const Elements& x, const Elements& y, int64_t C, const Finalize& f, int64_t threads) {
    std::vector<double> memory(3 * C + 4 * padded(C));
    double *var = memory.data(), *scratch = var + C, *coefficients = scratch + 2 * C;
    in_use->finalize(C, f.wire, f.eps, f.mean, var, f.invstd);
    if (f.running.mean.data != nullptr && f.running.count_global > 0) in_use->update_running(C, f.mean, var, f.running);
    if (elements(k) == 0) return;
    in_use->normalize_coefficients(k, f.mean, f.invstd, f.weight, f.bias, scratch, coefficients);
    k = with_distance(k);
    each(k, threads, [&](const Part& part) { in_use->normalize(k, x, y, coefficients, part); });
}

void run_backward_sums(const Shape& shape, const Elements& grad_y, const Elements& x, const double* mean,
                       const double* invstd, int64_t threads, double* wire) {
    const Shape k = with_distance(shape);
    const auto sums = sum_up(k, threads, [&](const Part& part, double* out) {
        in_use->backward_sums(k, grad_y, x, mean, part, out);
    });
    std::copy_n(sums.data(), k.C, wire);
    const double* products = sums.data() + padded(k.C);
    const double offset = k.dtype == DType::float64 ? 0.0 : 1.0;
    for (int64_t c = 0; c < k.C; ++c) wire[k.C + c] = (products[c] - offset * mean[c] * sums[c]) * invstd[c];
}

void run_backward_input(Shape k, const Elements& grad_y, const Elements& x, const Elements& grad_x, const Global& g,
                        int64_t threads) {
    if (elements(k) == 0) return;
    std::vector<double> memory(k.C + 4 * padded(k.C));
    double *scratch = memory.data(), *coefficients = scratch + k.C;
    in_use->backward_coefficients(k, g.wire, g.count_global, g.mean, g.invstd, g.weight, scratch, coefficients);
    k = with_distance(k);
    each(k, threads, [&](const Part& part) { in_use->backward_input(k, grad_y, x, grad_x, coefficients, part); });
}

void run_narrow(int64_t C, const double* from, const Values& to) {
    if (to.data != nullptr) in_use->narrow_values(C, from, to);
}

}  // namespace syncbn

#include "outer.h"

#include <omp.h>

#include <algorithm>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

bool has_outer() { return kernels().outer != nullptr; }

void outer(const OuterProblem& p, int num_threads) {
    constexpr int64_t WORTH_A_THREAD = 1 << 20;  // products: about the cost of waking a thread
    const int64_t strips = (p.height + 31) / 32, worth = p.rows * p.height * p.width / WORTH_A_THREAD;
    const int threads = static_cast<int>(std::min(std::clamp<int64_t>(worth, 1, std::max(num_threads, 1)), strips));
    if (!p.height || !p.width) return;
    Scratch scratch(threads, outer_scratch((strips + threads - 1) / threads * 32, p.width));
    const auto kernel = kernels().outer;
#pragma omp parallel for schedule(static, 1) num_threads(threads) if (threads > 1)
    for (int thread = 0; thread < threads; ++thread)
        kernel(p, strips * thread / threads * 32, std::min(strips * (thread + 1) / threads * 32, p.height), scratch.slice(thread));
}

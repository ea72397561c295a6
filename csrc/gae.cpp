#include "gae.h"

#include <algorithm>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void gae(const GaeProblem& problem, int num_threads) {
    const auto kernel = kernels().gae;
    const int32_t* bounds = problem.cu_seqlens;
    const auto episode_at = [&](int64_t token) { return std::lower_bound(bounds, bounds + problem.batch, token) - bounds; };
    // Equal runs of tokens, each with the episodes that begin in it.
    parallel_rows(bounds[problem.batch], 2, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, episode_at(begin), episode_at(end)); });
}

#include "rope.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void rope_forward(const RopeProblem& problem, int num_threads) {
    const auto kernel = kernels().rope_forward;
    parallel_rows(problem.tokens, (problem.q.heads + problem.k.heads) * problem.half * 2, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void rope_backward(const RopeProblem& problem, int num_threads) {
    const auto kernel = kernels().rope_backward;
    parallel_sums(problem.tokens, (problem.q.heads + problem.k.heads) * problem.half * 2,
                  problem.dweight ? 4 * rope_room(problem.half) : 0, num_threads, problem.dweight,
                  [&](int64_t begin, int64_t end, float* dweight) { kernel(problem, begin, end, dweight); });
}

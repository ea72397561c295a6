#include "rope.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void rope(const RopeProblem& problem, int num_threads) {
    const auto kernel = kernels().rope;
    parallel_rows(problem.tokens, problem.heads * problem.half * 2, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

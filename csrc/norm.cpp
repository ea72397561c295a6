#include "norm.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void norm_forward(const NormProblem& problem, int num_threads) {
    const auto kernel = kernels().norm_forward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void norm_backward(const NormProblem& problem, int num_threads) {
    const auto kernel = kernels().norm_backward;
    parallel_sums(problem.rows, problem.columns, problem.columns, num_threads, problem.dweight,
                  [&](int64_t begin, int64_t end, float* dweight) { kernel(problem, begin, end, dweight); });
}

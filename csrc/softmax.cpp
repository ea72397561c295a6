#include "softmax.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void softmax_forward(const SoftmaxProblem& problem, int num_threads) {
    const auto kernel = kernels().softmax_forward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void softmax_backward(const SoftmaxProblem& problem, int num_threads) {
    const auto kernel = kernels().softmax_backward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

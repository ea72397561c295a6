#include "swiglu.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void swiglu_forward(const SwigluProblem& problem, int num_threads) {
    const auto kernel = kernels().swiglu_forward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void swiglu_backward(const SwigluProblem& problem, int num_threads) {
    const auto kernel = kernels().swiglu_backward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

#include "loss.h"

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void loss_forward(const LossProblem& problem, int num_threads) {
    const auto kernel = kernels().loss_forward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void loss_backward(const LossProblem& problem, int num_threads) {
    const auto kernel = kernels().loss_backward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void divergence(const DivergenceProblem& problem, int num_threads) {
    const auto kernel = kernels().divergence;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

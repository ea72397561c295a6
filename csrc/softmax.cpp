#include "softmax.h"

#include <omp.h>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

void softmax_forward(const SoftmaxProblem& problem, int num_threads) {
    const auto kernel = kernels().softmax_forward;
    // One row of room a thread, made before the threads are: an error can be thrown only here.
    Scratch rows(num_threads > 0 ? num_threads : 1, problem.columns);
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end, rows.slice(omp_get_thread_num())); });
}

void softmax_backward(const SoftmaxProblem& problem, int num_threads) {
    const auto kernel = kernels().softmax_backward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

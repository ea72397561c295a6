#include "norm.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void norm_forward(const NormProblem& problem, int num_threads) {
    const auto kernel = kernels().norm_forward;
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

// The weight's gradient sums over rows: each run of rows into its own partial sum, then the runs in order. The runs
// do not depend on the number of threads, so neither does the rounding.
void norm_backward(const NormProblem& problem, int num_threads) {
    constexpr int64_t RUN = 128;
    const int64_t runs = (problem.rows + RUN - 1) / RUN, width = (problem.columns + 15) / 16 * 16;
    const auto kernel = kernels().norm_backward;
    std::vector<float> partial(static_cast<size_t>(runs * width), 0.0f);
    parallel_rows(runs, RUN * problem.columns, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run)
            kernel(problem, run * RUN, std::min((run + 1) * RUN, problem.rows), partial.data() + run * width);
    });
    for (int64_t j = 0; j < problem.columns; ++j) {
        double total = 0;
        for (int64_t run = 0; run < runs; ++run) total += partial[run * width + j];
        problem.dweight[j] = static_cast<float>(total);
    }
}

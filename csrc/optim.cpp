#include "optim.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

double optim(const OptimProblem& problem, int num_threads) {
    constexpr int64_t RUN = 16384;  // elements; the same whatever the number of threads, and so is the rounding of the sums
    struct Task {
        const OptimSpan* span;
        int64_t begin;
    };
    std::vector<Task> tasks;
    for (const OptimSpan* span = problem.spans; span != problem.spans + problem.count; ++span)
        for (int64_t begin = 0; begin < span->size; begin += RUN) tasks.push_back({span, begin});
    std::vector<double> sums(tasks.size());
    const auto kernel = kernels().optim;
    parallel_rows(static_cast<int64_t>(tasks.size()), RUN, num_threads, [&](int64_t first, int64_t last) {
        for (int64_t i = first; i < last; ++i) {
            const auto& [span, begin] = tasks[i];
            sums[i] = kernel(problem, *span, begin, std::min(span->size - begin, RUN));
        }
    });
    double total = 0;
    for (double sum : sums) total += sum;
    return total;
}

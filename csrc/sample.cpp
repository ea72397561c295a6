#include "sample.h"

#include <omp.h>

#include <stdexcept>
#include <string>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

void sample(const SampleProblem& problem, int num_threads) {
    const auto kernel = kernels().sample;
    Scratch rooms(num_threads > 0 ? num_threads : 1, sample_room(problem.columns));
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end, rooms.slice(omp_get_thread_num())); });
    for (int64_t r = 0; r < problem.rows; ++r)
        if (problem.tokens[r] < 0)
            throw std::invalid_argument("sample: expected logits below inf and not all -inf, got row " + std::to_string(r) +
                                        " that is NaN, +inf or all -inf");
}

#include "sample.h"

#include <omp.h>

#include <cmath>
#include <sstream>
#include <stdexcept>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"
#include "scratch.h"

namespace {

template <class... Words>
[[noreturn]] void refuse(const Words&... words) {
    std::ostringstream text;
    ((text << "sample: expected ") << ... << words);
    throw std::invalid_argument(text.str());
}

void check(const SampleSettings& s, int64_t r) {
    if (!(s.temperature >= 0 && std::isfinite(s.temperature)))
        refuse("a finite temperature of 0 or more, got ", s.temperature, " in row ", r);
    if (s.top_k < 0) refuse("top_k of 0 or more, got ", s.top_k, " in row ", r);
    if (!(s.top_p > 0 && s.top_p <= 1)) refuse("top_p above 0 and at most 1, got ", s.top_p, " in row ", r);
    if (!(s.min_p >= 0 && s.min_p <= 1)) refuse("min_p from 0 to 1, got ", s.min_p, " in row ", r);
}

}  // namespace

void sample(const SampleProblem& problem, int num_threads) {
    for (int64_t r = 0; r < problem.rows; ++r) check(problem.of(r), r);
    const auto kernel = kernels().sample;
    Scratch rooms(num_threads > 0 ? num_threads : 1, sample_room(problem.columns));
    parallel_rows(problem.rows, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end, rooms.slice(omp_get_thread_num())); });
    for (int64_t r = 0; r < problem.rows; ++r) {
        if (problem.tokens[r] == SAMPLE_NO_ROW)
            refuse("logits below inf and not all -inf, got row ", r, " that is NaN, +inf or all -inf");
        if (problem.tokens[r] == SAMPLE_NO_MASK) refuse("a mask that allows a token above -inf, got none in row ", r);
    }
}

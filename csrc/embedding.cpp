#include "embedding.h"

#include <algorithm>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void embedding_forward(const EmbeddingProblem& problem, int num_threads) {
    const auto kernel = kernels().embedding_forward;
    parallel_rows(problem.tokens, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
}

void embedding_backward(const EmbeddingProblem& given, int num_threads) {
    EmbeddingProblem problem = given;
    // A counting sort in which every row counts one more than its tokens: what writing it costs. Once the tokens are laid
    // down from behind, starts[row] is the work before the row, and equal runs of work are found in it.
    std::vector<int64_t> starts(static_cast<size_t>(problem.vocabulary + 1)), order(static_cast<size_t>(problem.tokens));
    for (int64_t n = 0; n < problem.tokens; ++n) ++starts[problem.ids[n]];
    for (int64_t row = 1; row <= problem.vocabulary; ++row) starts[row] += starts[row - 1] + 1;
    for (int64_t n = problem.tokens; n-- > 0;) order[--starts[problem.ids[n]] - problem.ids[n]] = n;
    problem.order = order.data(), problem.starts = starts.data();
    const auto kernel = kernels().embedding_backward;
    const auto row_at = [&](int64_t work) { return std::lower_bound(starts.begin(), starts.end() - 1, work) - starts.begin(); };
    parallel_rows(starts.back(), problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, row_at(begin), row_at(end)); });
}

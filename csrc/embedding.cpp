#include "embedding.h"

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
    // A counting sort: starts[row] ends where the row's tokens begin once those of every row are laid down from behind.
    std::vector<int64_t> starts(static_cast<size_t>(problem.vocabulary + 1)), order(static_cast<size_t>(problem.tokens));
    for (int64_t n = 0; n < problem.tokens; ++n) ++starts[problem.ids[n]];
    for (int64_t row = 1; row <= problem.vocabulary; ++row) starts[row] += starts[row - 1];
    for (int64_t n = problem.tokens; n-- > 0;) order[--starts[problem.ids[n]]] = n;
    problem.order = order.data(), problem.starts = starts.data();

    // Equal runs of work, which is a row's tokens and the row itself: `work` of them lie before row_at(work).
    const auto kernel = kernels().embedding_backward;
    const auto row_at = [&](int64_t work) {
        int64_t low = 0, high = problem.vocabulary;
        while (low < high) {
            const int64_t middle = (low + high) / 2;
            middle + starts[middle] < work ? low = middle + 1 : high = middle;
        }
        return low;
    };
    parallel_rows(problem.tokens + problem.vocabulary, problem.columns, num_threads,
                  [&](int64_t begin, int64_t end) { kernel(problem, row_at(begin), row_at(end)); });
}

#include "ppo_loss.h"

#include <algorithm>
#include <cmath>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

void ppo_loss(PpoLossProblem problem, float* terms, int num_threads) {
    const int64_t blocks = (problem.tokens + PPO_BLOCK - 1) / PPO_BLOCK;
    std::vector<double> sums(static_cast<size_t>(blocks * PPO_TERMS));
    problem.sums = sums.data();
    const auto kernel = kernels().ppo_loss;
    parallel_rows(blocks, 4 * PPO_BLOCK, num_threads, [&](int64_t begin, int64_t end) { kernel(problem, begin, end); });
    for (int term = 0; term < PPO_TERMS; ++term) {
        double total = 0, highest = 0;
        for (int64_t block = 0; block < blocks; ++block) {
            const double x = sums[block * PPO_TERMS + term];
            total += x, highest = std::max(highest, x);
        }
        terms[term] = static_cast<float>(total / problem.tokens);
        if (term == PPO_RATIO) terms[term] = static_cast<float>(std::exp(highest));
    }
    if (std::isnan(terms[PPO_KL2])) terms[PPO_RATIO] = terms[PPO_KL2];  // a maximum over NaN is not to be trusted
}

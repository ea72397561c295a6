// One half of the PPO loss, policy or value, over the tokens given: the mean, what is measured beside it, and the gradient,
// in one read. Source: Schulman et al., arXiv 1707.06347, eq. 7; value clipping as in eq. 9's term of Ziegler et al. 2019.
#pragma once
#include <cstdint>

constexpr int64_t PPO_BLOCK = 1024;  // tokens summed in fp32; their sums are added in fp64, in order

// What a block sums up, and `terms` in the end: means over the tokens, and e^(largest |log ratio|). With r the ratio of this
// policy to the one that sampled: KL1 = -log r, KL2 = (log r)^2 / 2, KL3 = r - 1 - log r; REF_* the same of the reference.
enum PpoTerm { PPO_LOSS, PPO_CLIPPED, PPO_RATIO, PPO_KL1, PPO_KL2, PPO_KL3, PPO_REF_KL1, PPO_REF_KL3, PPO_TERMS };

struct PpoLossProblem {
    int64_t tokens;                    // at least one
    bool value;                        // the value half: of the terms only PPO_LOSS and PPO_CLIPPED
    double clip;
    const float *x, *old, *target;     // (tokens,): log-probs and advantages, or values and returns
    const float* ref;                  // (tokens,) log-probs of the reference, or null
    float* grad;                       // (tokens,): of the loss in x; or null
    double* sums;                      // (blocks, PPO_TERMS), made there
};

void ppo_loss(PpoLossProblem problem, float* terms, int num_threads);

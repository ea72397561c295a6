// Generalised advantage estimates over ragged episodes, from the last token of each to its first:
//   A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1},  V and A after the last token 0;  returns_t = A_t + V_t.
// Sums are fp64 and rounded once. Source: Schulman et al., arXiv 1506.02438, eq. 16.
#pragma once
#include <cstdint>

struct GaeProblem {
    const int32_t* cu_seqlens;  // (batch + 1,), rising from 0 to the number of tokens
    int64_t batch;
    double gamma, gamma_lambda;
    const float *rewards, *values;  // (tokens,), as are the next two
    float *advantages, *returns;
};

void gae(const GaeProblem& problem, int num_threads);

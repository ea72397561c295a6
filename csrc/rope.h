// Rotary position embedding: the pair (x[i], x[i + D/2]) of each head turns by angle position * base^(-2i/D), where a weight is
// given after RMSNorm of the head. Arrays: (tokens, heads, D), fp32 or bf16, strides in elements. The angles come as a table.
// Source: Su et al., arXiv 2104.09864, eq. 34, with the halves paired as in Hugging Face's Llama; norm and rotation in the order
// of Qwen3 (arXiv 2505.09388, section 2).
#pragma once
#include <cstdint>

#include "attention.h"

struct RopeHeads {
    int64_t heads;
    Rows x, out;          // backward: out is the gradient of x, which is only read where there is a weight
    Rows dout;            // backward only
    const float* weight;  // (D,), or null for no norm
};

struct RopeProblem {
    int64_t tokens, half;  // half = D / 2
    int dtype;
    const int64_t* positions;      // (tokens,), each below the table's length: checked by the caller
    const float *cosines, *sines;  // (length, half)
    float eps;
    RopeHeads q, k;  // k may have no heads
    float* dweight;  // backward: (2 * rope_room(half)) for q, the same for k; null without weights
};

// What dweight holds of half a weight: whole registers.
constexpr int64_t rope_room(int64_t half) { return (half + 15) / 16 * 16; }

void rope_forward(const RopeProblem& problem, int num_threads);
void rope_backward(const RopeProblem& problem, int num_threads);

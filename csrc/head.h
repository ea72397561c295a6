// From hidden states and the output matrix in bf16 to the log-probability of a target and the entropy of each row, and back,
// without the logits: tiles of them exist in the L1 cache. Sums are fp32; sources and formulas as in loss.h.
#pragma once
#include <cstdint>

struct HeadProblem {
    int64_t rows, vocabulary, dim;      // dim: a multiple of 32
    const uint16_t *hidden, *weight;    // (rows, dim) and (vocabulary, dim), contiguous
    const int64_t* targets;             // (rows,), each in [0, vocabulary): checked by the caller
    float temperature;
    float *logprob, *entropy;           // (rows,); backward reads entropy
    double* lse;                        // (rows,); backward reads it
    const float *logprob_grad, *entropy_grad;  // (rows,), backward only
    float *dhidden, *dweight;           // (head_padded(rows), dim) and (vocabulary, dim), backward only
};

constexpr int64_t HEAD_TOKENS = 128, HEAD_WORDS = 128;  // of a task: forward one, backward both
constexpr int64_t head_padded(int64_t rows) { return (rows + HEAD_TOKENS - 1) / HEAD_TOKENS * HEAD_TOKENS; }

struct HeadRows {
    uint16_t *rows, *pairs;  // (head_padded(rows), dim), padded with zeros, and the same with the pairs of rows together
};

// Floats of scratch that one task needs.
constexpr int64_t head_forward_scratch(int64_t dim) { return HEAD_TOKENS * dim / 2 + 32 * dim / 2 + 64 * 32; }
constexpr int64_t head_backward_scratch(int64_t dim) {
    return HEAD_WORDS * dim * 2 + 32 * dim / 2 + HEAD_TOKENS * 32 + HEAD_TOKENS * 32 / 2 + HEAD_TOKENS * HEAD_WORDS / 2 + 32 * dim;
}

// Whether this CPU has kernels for it.
bool has_head();
void head_forward(const HeadProblem& problem, int num_threads);
// The order of the sums, and with it their rounding, depends on the number of threads.
void head_backward(const HeadProblem& problem, int num_threads);

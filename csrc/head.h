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
    const float *logprob_grad, *entropy_grad, *lse_grad;  // (rows,), backward only
    float *dhidden, *dweight;           // (head_padded(rows), dim) and (vocabulary, dim), backward only
    int64_t words = 0;                  // of the vocabulary that a task of the backward pass takes, a multiple of 32
};

constexpr int64_t HEAD_TOKENS = 128;  // of a task forward
constexpr int64_t HEAD_BLOCK = 256;   // tokens at a time backward, at most
constexpr int64_t HEAD_CHUNK = 64;    // of them, whose logits are there at a time
constexpr int64_t head_padded(int64_t rows) { return (rows + HEAD_TOKENS - 1) / HEAD_TOKENS * HEAD_TOKENS; }

struct HeadRows {  // two times (head_padded(rows), dim), padded with zeros
    const uint16_t *rows, *turned;     // as they are, and as A of a product over the rows (Operand in product_bf16.inc)
    int64_t turned_row, turned_step;
};

// Floats of scratch that one task needs.
constexpr int64_t head_forward_scratch(int64_t dim) { return HEAD_TOKENS * dim / 2 + 32 * dim / 2 + 64 * 32; }
constexpr int64_t head_backward_scratch(int64_t dim, int64_t words) {
    return words * dim * 2 + 32 * dim / 2 + HEAD_CHUNK * 32 + HEAD_BLOCK * 32 / 2 + HEAD_BLOCK * words / 2 + 32 * dim;
}

// Whether this CPU has kernels for it.
bool has_head();
void head_forward(const HeadProblem& problem, int num_threads);
// The same of two models with their own dims, bit for bit, in one pass, and kl (rows,): KL(policy || reference) of each row in nats.
void head_divergence(const HeadProblem& policy, const HeadProblem& reference, float* kl, int num_threads);
// The order of the sums, and with it their rounding, depends on the number of threads.
void head_backward(const HeadProblem& problem, int num_threads);

// Log-probability of a target and entropy of each row of logits, at a temperature, in one read of the row; and the
// gradient of both, written over the logits. logits: (rows, columns), fp32 or bf16, row stride in elements.
#pragma once
#include <cstdint>

struct LossProblem {
    int64_t rows, columns, stride;
    int dtype;
    void* logits;            // backward overwrites them with their gradient
    const int64_t* targets;  // (rows,), each in [0, columns): checked by the caller
    float temperature;
    float *logprob, *entropy;  // (rows,); backward reads entropy
    double* lse;               // (rows,); backward reads it. fp32 would lose e^(z - lse) where logits are large
    const float *logprob_grad, *entropy_grad, *lse_grad;  // (rows,), backward only
};

void loss_forward(const LossProblem& problem, int num_threads);
void loss_backward(const LossProblem& problem, int num_threads);

// KL(softmax(logits / T) || softmax(ref / T)) of each row in nats, from the log-sum-exps that loss_forward found.
struct DivergenceProblem {
    int64_t rows, columns;
    const float *logits, *ref;  // (rows, columns), contiguous
    float temperature;
    const double *lse, *ref_lse;  // (rows,)
    float* kl;                    // (rows,)
};

void divergence(const DivergenceProblem& problem, int num_threads);

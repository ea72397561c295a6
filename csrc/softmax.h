// Softmax of each row of a contiguous (rows, columns) array of fp32 or bf16, and its gradient. Sums are fp32.
#pragma once
#include <cstdint>

struct SoftmaxProblem {
    int64_t rows, columns;
    int dtype;
    const void* x;   // forward: input; backward: the forward's output y
    const void* dy;  // backward only
    void* out;       // forward: y; backward: dx = y * (dy - sum(y * dy))
    bool streams;    // past the caches
};

void softmax_forward(const SoftmaxProblem& problem, int num_threads);
void softmax_backward(const SoftmaxProblem& problem, int num_threads);

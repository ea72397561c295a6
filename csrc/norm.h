// RMSNorm of each row of a contiguous (rows, columns) array: y = x / sqrt(mean(x^2) + eps) * weight, and its gradient.
// x, y, dy, dx are fp32 or bf16; weight and all sums are fp32. Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
#pragma once
#include <cstdint>

struct NormProblem {
    int64_t rows, columns;
    int dtype;
    const void* x;
    const float* weight;  // (columns,)
    float eps;
    void* y;
    float* scale;     // (rows,): 1 / rms, written by forward and read by backward
    const void* dy;   // backward only, as are these
    void* dx;
    float* dweight;   // (columns,)
};

void norm_forward(const NormProblem& problem, int num_threads);
void norm_backward(const NormProblem& problem, int num_threads);

// RMSNorm of each row of a contiguous (rows, columns) array: y = x / sqrt(mean(x^2) + eps) * weight, and its gradient.
// With a residual it is the norm of total = x + residual, which is kept. All arrays are fp32 or bf16 but weight and dweight;
// those and all sums are fp32. Source: Zhang and Sennrich, arXiv 1910.07467, eq. 4.
#pragma once
#include <cstdint>

struct NormProblem {
    int64_t rows, columns;
    int dtype;
    const void* x;         // backward: total, where there was a residual
    const void* residual;  // forward only; null for none
    const float* weight;   // (columns,)
    float eps;
    void *y, *total;   // forward; total only with a residual
    float* scale;      // (rows,): 1 / rms, written by forward and read by backward
    const void *dy, *dtotal;  // backward; dtotal, the other gradient of total, may be null
    void* dx;          // backward: of x, and of the residual too
    float* dweight;    // backward: (columns,)
    bool streams;      // past the caches
};

void norm_forward(const NormProblem& problem, int num_threads);
void norm_backward(const NormProblem& problem, int num_threads);

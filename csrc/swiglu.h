// silu(gate) * up, element by element, and its gradient; silu(g) = g / (1 + e^-g). fp32 or bf16.
// gate and up: (rows, columns) with a row stride in elements, so that both may be halves of one product.
// Source: Shazeer, arXiv 2002.05202, eq. 6.
#pragma once
#include <cstdint>

struct SwigluProblem {
    int64_t rows, columns;
    int dtype;
    const void *gate, *up;
    int64_t gate_stride, up_stride;
    const void* dout;  // backward only, contiguous
    void *out;         // forward, contiguous
    void *dgate, *dup;  // backward
    int64_t gradient_stride;  // of both
    bool streams;  // past the caches
};

void swiglu_forward(const SwigluProblem& problem, int num_threads);
void swiglu_backward(const SwigluProblem& problem, int num_threads);

// out = x^T y in fp32 from bf16, the gradient of a weight: a sum over the rows, whose order does not depend on the number of threads.
#pragma once
#include <cstdint>

struct OuterProblem {
    int64_t rows, height, width;  // of x and y; columns of x and of y, which out has as rows and columns
    const uint16_t *x, *y;        // elements of a row side by side, rows x_stride and y_stride apart
    int64_t x_stride, y_stride;
    float* out;                   // (height, width), contiguous
};

constexpr int64_t OUTER_RUN = 512;  // rows at a time: a strip of both sides stays in the caches
constexpr int64_t outer_padded(int64_t columns) { return (columns + 31) / 32 * 32; }
// Floats of scratch for `height` of the columns of x: both sides as they are packed and turned, and sums of whole tiles.
constexpr int64_t outer_scratch(int64_t height, int64_t width) {
    return (outer_padded(height) + outer_padded(width)) * OUTER_RUN + outer_padded(height) * outer_padded(width);
}

// Whether this CPU has a kernel for it.
bool has_outer();
void outer(const OuterProblem& problem, int num_threads);

// out = x^T y in fp32 from bf16, the gradient of a weight: a sum over the rows, whose order does not depend on the number of threads.
#pragma once
#include <cstdint>

struct OuterProblem {
    int64_t rows, height, width;  // of x and y; columns of x and of y, which out has as rows and columns
    const uint16_t *x, *y;        // elements of a row side by side, rows x_stride and y_stride apart
    int64_t x_stride, y_stride;
    float* out;                   // (height, width), contiguous
};

constexpr int64_t OUTER_RUN = 256;  // rows at a time
constexpr int64_t outer_padded(int64_t columns) { return (columns + 31) / 32 * 32; }
// Floats of scratch for `height` of the columns of x: 32 rows of the wider side, both sides turned, and sums of whole tiles.
constexpr int64_t outer_scratch(int64_t height, int64_t width) {
    const int64_t rows = outer_padded(height), columns = outer_padded(width);
    return 16 * (rows > columns ? rows : columns) + (rows + columns) * OUTER_RUN / 2 + rows * columns;
}

// Whether this CPU has a kernel for it.
bool has_outer();
void outer(const OuterProblem& problem, int num_threads);

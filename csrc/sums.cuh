// Sums over rows, from what the blocks of a kernel left of them: always added in the same order.
#pragma once
#include "device.cuh"

// to[i / span * stride + i % span] = sum over n < count of partial[n * columns + i].
static __global__ __launch_bounds__(1024) void add_partial_sums_kernel(const float* partial, int64_t count, int64_t columns, int64_t span,
                                                                       int64_t stride, float* to) {
    __shared__ float room[WARP][WARP + 1];
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP;
    const int64_t i = static_cast<int64_t>(blockIdx.x) * WARP + lane;
    float sum = 0;
    if (i < columns)
#pragma unroll 4
        for (int64_t n = part; n < count; n += WARP) sum += partial[n * columns + i];
    room[lane][part] = sum;
    __syncthreads();
    // Warp w adds the 32 sums of column w.
    sum = warp_sum(room[part][lane]);
    const int64_t column = static_cast<int64_t>(blockIdx.x) * WARP + part;
    if (lane == 0 && column < columns) to[column / span * stride + column % span] = sum;
}
inline void add_partial_sums(const float* partial, int64_t count, int64_t columns, int64_t span, int64_t stride, float* to,
                             cudaStream_t stream, const char* what) {
    launch(add_partial_sums_kernel, dim3(static_cast<unsigned>(ceil_div(columns, WARP))), 1024, 0, stream, what, partial, count, columns,
           span, stride, to);
}

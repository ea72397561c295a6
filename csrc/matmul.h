// out = x w^T + bias with one order of summation: an element has the same bits whatever rows are beside it and whatever the
// number of threads. x, w: fp32 or bf16, sums fp32; bf16 is multiplied as such where the CPU can, else as the floats it stands for.
#pragma once
#include <cstdint>

struct MatmulProblem {
    int64_t rows, columns, depth;  // of out; depth: at least 1
    int dtype, out_dtype;
    const void *x, *weight;  // (rows, depth) and (columns, depth), contiguous
    const float* bias;       // (columns,), or null
    void* out;               // (rows, columns), contiguous
};

// The rows of one side are the lanes of tiles, those of the other their rows: a short x is the lanes, so that no weight is moved.
struct MatmulTask {
    bool x_in_lanes;
    int64_t lane, lane_end, row, row_end;
};

constexpr int64_t MATMUL_RUN = 64;  // rows at a time; the tiles of a task's lanes use them while they are in the cache
// Lanes that a task packs, 32 to 128: few where they are long.
constexpr int64_t matmul_lanes(int64_t depth) { return depth <= 768 ? 128 : depth <= 1536 ? 64 : 32; }
constexpr int64_t matmul_scratch(int64_t depth) {  // floats
    return (matmul_lanes(depth) + MATMUL_RUN + 32) * ((depth + 31) / 32 * 32) + MATMUL_RUN * 32;
}

void matmul(const MatmulProblem& problem, int num_threads);

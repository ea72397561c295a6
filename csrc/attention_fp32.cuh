// Products of fp32 tiles for attention: 256 threads share 64 x 64 scores, thread (y, x) of 16 x 16 has rows y + 16 i and columns
// x + 16 j. The long sides come through shared memory in slices, in the background, the next while one is worked on.
#pragma once
#include "attention_gpu.h"
#include "device.cuh"

namespace {

constexpr int THREADS = 256, TILE = 64, SLICE = 32;
constexpr int SLICE_STEP = SLICE + 4, TILE_STEP = TILE + 4;  // floats from row to row: eight rows' same 16 bytes in different banks
constexpr int STAGE = 2 * TILE * SLICE_STEP;                 // floats; also holds TILE rows of TILE_STEP
constexpr size_t SHARED = (2 * STAGE + TILE * TILE_STEP) * sizeof(float);

struct Source {  // one head's rows of one sequence
    const float* data;
    int64_t stride;
    int count, head_dim;
};

DEVICE Source source_of(const Rows& rows, int first, int head, int count, int64_t head_dim) {
    return {static_cast<const float*>(rows.data) + first * rows.token_stride + head * rows.head_stride, rows.token_stride, count,
            static_cast<int>(head_dim)};
}

// TILE rows from `first` on, COLUMNS columns from `column` on; zeros past the last row and past D.
template <int COLUMNS, bool ALIGNED>
DEVICE void load_slice(float* to, int step, const Source& from, int first, int column) {
#pragma unroll 1
    for (int index = threadIdx.x; index < TILE * COLUMNS / 4; index += THREADS) {
        const int row = index / (COLUMNS / 4), d = column + index % (COLUMNS / 4) * 4;
        const bool valid = first + row < from.count && d < from.head_dim;
        const float* place = from.data + (first + row) * from.stride + d;
        float* target = to + row * step + d - column;
        if (ALIGNED) {
            cp_async_16(target, place, valid);
        } else {
            Pack<float> pack{};
#pragma unroll
            for (int i = 0; i < 4; ++i)
                if (valid && d + i < from.head_dim) pack.v[i] = place[i];
            store_pack(target, pack);
        }
    }
}

// s[i][j] = the dot product of row x_first + y + 16 i of one source with row y_first + x + 16 j of the other.
template <bool ALIGNED>
DEVICE void rows_times_rows(float (&s)[4][4], const Source& a, int a_first, const Source& b, int b_first, float* stages) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    const auto load = [&](int slice) {
        float* to = stages + (slice & 1) * STAGE;
        load_slice<SLICE, ALIGNED>(to, SLICE_STEP, a, a_first, slice * SLICE);
        load_slice<SLICE, ALIGNED>(to + TILE * SLICE_STEP, SLICE_STEP, b, b_first, slice * SLICE);
        cp_async_commit();
    };
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) s[i][j] = 0;
    const int slices = (a.head_dim + SLICE - 1) / SLICE;
    load(0);
    for (int slice = 0; slice < slices; ++slice) {
        cp_async_wait<0>();
        __syncthreads();
        if (slice + 1 < slices) load(slice + 1);
        const float *rows = stages + (slice & 1) * STAGE + y * SLICE_STEP, *columns = stages + (slice & 1) * STAGE + (TILE + x) * SLICE_STEP;
#pragma unroll 4
        for (int k = 0; k < SLICE; k += 4) {
            Pack<float> p[4], q[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                p[i] = load_pack(rows + i * 16 * SLICE_STEP + k);
                q[i] = load_pack(columns + i * 16 * SLICE_STEP + k);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i)
#pragma unroll
                for (int j = 0; j < 4; ++j)
#pragma unroll
                    for (int e = 0; e < 4; ++e) s[i][j] = fmaf(p[i].v[e], q[j].v[e], s[i][j]);
        }
    }
    __syncthreads();  // the stages have been read
}

// sum[c][i][e] += the product of row y + 16 i of `weights` with column 64 c + 4 x + e of the TILE rows of `b` from `first` on.
template <int DP, bool ALIGNED>
DEVICE void weights_times_rows(float (&sum)[DP / TILE][4][4], const float (&weight)[4][4], float* weights, const Source& b, int first,
                               float* stages) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    load_slice<TILE, ALIGNED>(stages, TILE_STEP, b, first, 0);
    cp_async_commit();
#pragma unroll
    for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[(y + 16 * i) * TILE_STEP + x + 16 * j] = weight[i][j];
#pragma unroll
    for (int c = 0; c < DP / TILE; ++c) {
        cp_async_wait<0>();
        __syncthreads();
        if (c + 1 < DP / TILE) load_slice<TILE, ALIGNED>(stages + (c + 1 & 1) * STAGE, TILE_STEP, b, first, (c + 1) * TILE);
        cp_async_commit();
        const float *rows = weights + y * TILE_STEP, *columns = stages + (c & 1) * STAGE + x * 4;
        float part[4][4] = {};  // added up by itself: a chain of additions over all tiles would cost digits
#pragma unroll 2
        for (int k = 0; k < TILE; k += 4) {
            Pack<float> p[4];
#pragma unroll
            for (int i = 0; i < 4; ++i) p[i] = load_pack(rows + i * 16 * TILE_STEP + k);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                const Pack<float> q = load_pack(columns + (k + e) * TILE_STEP);
#pragma unroll
                for (int i = 0; i < 4; ++i)
#pragma unroll
                    for (int d = 0; d < 4; ++d) part[i][d] = fmaf(p[i].v[e], q.v[d], part[i][d]);
            }
        }
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int d = 0; d < 4; ++d) sum[c][i][d] += part[i][d];
    }
    __syncthreads();  // weights and stages have been read
}

template <int C>
DEVICE void clear(float (&sum)[C][4][4]) {
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i)
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[c][i][e] = 0;
}

// factor[i] * sum becomes rows first + y + 16 i.
template <int C>
DEVICE void store_rows(const Source& to, int first, const float (&sum)[C][4][4], const float (&factor)[4]) {
    const int y = threadIdx.x / 16, x = threadIdx.x % 16;
    float* data = const_cast<float*>(to.data);
#pragma unroll
    for (int c = 0; c < C; ++c)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = first + y + 16 * i;
            if (row >= to.count) continue;
            float* place = data + row * to.stride + c * TILE + x * 4;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (c * TILE + x * 4 + e < to.head_dim) place[e] = sum[c][i][e] * factor[i];
        }
}

inline bool by_packs(const AttentionProblem& p, std::initializer_list<const Rows*> all) {
    bool aligned = p.head_dim % 4 == 0;
    for (const Rows* rows : all)
        aligned = aligned && reinterpret_cast<uintptr_t>(rows->data) % 16 == 0 && rows->token_stride % 4 == 0 && rows->head_stride % 4 == 0;
    return aligned;
}

// Calls f(integral_constant of D padded, bool_constant of ALIGNED).
template <class F>
void by_head_dim(int64_t head_dim, bool aligned, F&& f) {
    const auto of = [&](auto packs) {
        if (head_dim <= 64) f(std::integral_constant<int, 64>{}, packs);
        else if (head_dim <= 128) f(std::integral_constant<int, 128>{}, packs);
        else f(std::integral_constant<int, 256>{}, packs);
    };
    if (aligned) of(std::true_type{});
    else of(std::false_type{});
}

}  // namespace

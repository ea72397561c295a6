// What attention's Hopper kernels share: tiles that the copy engine brings, products of a warpgroup's 64 rows, the way out.
// A tile of bf16 rows in shared memory is D / 64 slabs, each of all its rows' 64 columns (128 bytes) in the 128-byte swizzle.
// A block is a producer warpgroup, of which one warp works, and consumer warpgroups of 64 rows each.
#pragma once
#include <cuda.h>

#include "attention_gpu.h"
#include "device.cuh"
#include "ptx_sm90.cuh"

namespace {

constexpr int GROUP = 128, GROUP_ROWS = 64;  // threads of a warpgroup, rows of its products
constexpr int ROW_BYTES = 128, STEP_K = 16;  // of a slab; a product's depth

template <int D, int ROWS>
constexpr int TILE_BYTES = D * ROWS * 2;

// This thread's warpgroup, in a register that the compiler knows to be the same for the whole warp.
DEVICE int own_group() { return __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / GROUP, 0); }

// Stages of a ring of `STAGES`: which place the i-th use has, and the parity of the phase that fills it.
template <int STAGES>
DEVICE int place_of_use(int i) {
    return i % STAGES;
}
template <int STAGES>
DEVICE uint32_t parity_of_use(int i) {
    return i / STAGES & 1;
}

// What a block works on: a head of a tile; row = -1: there is nothing more.
struct alignas(16) Item {
    AttentionTile tile;
    int head;
};

// Items of work that the blocks take one after the other: a tile's heads, then the next one's.
struct Items {
    const AttentionTile* tiles;
    int32_t* taken;
    int count, heads;
};

inline Items items_of(const TileMap& map, int64_t heads) {
    return {map.tiles, map.counters, static_cast<int>(map.capacity * heads), static_cast<int>(heads)};
}
// One thread: the next item.
DEVICE Item take(const Items& from) {
    const int index = atomicAdd(from.taken, 1);
    return {index < from.count ? from.tiles[index / from.heads] : AttentionTile{0, 0, 0, 0, -1, 0, 0, 0}, index % from.heads};
}

// One thread: a head's rows from `token` on, by a map for BOX of them.
template <int D, int ROWS, int BOX = ROWS>
DEVICE void load_tile(unsigned char* tile, const CUtensorMap* map, uint64_t* barrier, int head, int token) {
#pragma unroll
    for (int x = 0; x < D; x += 64)
#pragma unroll
        for (int row = 0; row < ROWS; row += BOX)
            tma_load_3d(tile + (x / 64 * ROWS + row) * ROW_BYTES, map, barrier, x, head, token + row);
}

// One warp: zeros in the rows from `first` on; the products may read them after this thread's next arrival.
template <int D, int ROWS>
DEVICE void zero_rows(unsigned char* tile, int first) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int slab = 0; slab < D / 64; ++slab)
#pragma unroll 1
        for (int at = first * ROW_BYTES + lane * 16; at < ROWS * ROW_BYTES; at += WARP * 16)
            *reinterpret_cast<uint4*>(tile + slab * ROWS * ROW_BYTES + at) = make_uint4(0, 0, 0, 0);
    fence_async();
}

DEVICE void arrive_by_warp(uint64_t* barrier) {  // all lanes are done
    __syncwarp();
    if (threadIdx.x % WARP == 0) mbarrier_arrive(barrier);
}

// d = a b^T over D columns: 64 rows of a tile of A_ROWS, all rows of a tile of B_ROWS.
template <int D, int A_ROWS, int B_ROWS>
DEVICE void rows_times_rows(float (&d)[B_ROWS / 2], const unsigned char* a, const unsigned char* b) {
    const uint64_t from_a = wgmma_descriptor(a), from_b = wgmma_descriptor(b);
    wgmma_shared_first<false, false>(d, from_a, from_b);
#pragma unroll
    for (int k = 1; k < D / STEP_K; ++k)
        wgmma_shared<false, false>(d, from_a + (k / 4 * A_ROWS * ROW_BYTES + k % 4 * 32) / 16,
                                   from_b + (k / 4 * B_ROWS * ROW_BYTES + k % 4 * 32) / 16, true);
}
// d += weights b: weights of 64 rows by the tile's rows, in registers.
template <int D, int ROWS>
DEVICE void weights_times_rows(float (&d)[D / 2], const uint32_t (&weights)[ROWS / STEP_K][4], const unsigned char* b) {
    const uint64_t from = wgmma_descriptor(b, D > 64 ? ROWS * ROW_BYTES : 16);
#pragma unroll
    for (int k = 0; k < ROWS / STEP_K; ++k) wgmma_registers<true>(d, weights[k], from + k * STEP_K * ROW_BYTES / 16, true);
}

template <int R>
DEVICE void clear(float (&x)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) x[i] = 0;
}

// Accumulators of N columns, rounded to bf16, as the left operand of a product of depth N.
template <int N>
DEVICE void to_weights(uint32_t (&weights)[N / STEP_K][4], const float (&x)[N / 2]) {
#pragma unroll
    for (int i = 0; i < N / 4; ++i) weights[i / 4][i % 4] = pack_bf16(x[2 * i], x[2 * i + 1]);
}

// Of accumulator i of a thread: its column, less 2 (lane % 4), and whether it is in the lower of the thread's rows, which are
// thread % GROUP / WARP * 16 + lane / 4 and 8 on.
DEVICE constexpr int column_of(int i) { return i / 4 * 8 + i % 2; }
DEVICE constexpr int half_of(int i) { return i / 2 % 2; }
DEVICE int own_row() { return threadIdx.x % GROUP / WARP * 16 + threadIdx.x % WARP / 4; }

// factor * x becomes the group's first `count` rows at `to`. `room`: its 64 rows of a tile of ROWS, which nobody reads any more.
template <int D, int ROWS>
DEVICE void store_rows(bf16* to, int64_t stride, int count, const float (&x)[D / 2], float factor0, float factor1,
                       unsigned char* room) {
    const int lane = threadIdx.x % WARP, row = own_row(), warp_row = threadIdx.x % GROUP / WARP * 16;
#pragma unroll
    for (int i = 0; i < D / 2; i += 2) {
        const int at = row + 8 * half_of(i), chunk = i / 4;
        const float factor = half_of(i) ? factor1 : factor0;
        unsigned char* place = room + chunk / 8 * ROWS * ROW_BYTES + at * ROW_BYTES + ((chunk ^ at) % 8) * 16 + lane % 4 * 4;
        *reinterpret_cast<uint32_t*>(place) = pack_bf16(x[i] * factor, x[i + 1] * factor);
    }
    __syncwarp();
#pragma unroll
    for (int i = 0; i < D / 16; ++i) {
        const int index = i * WARP + lane, at = warp_row + index / (D / 8), chunk = index % (D / 8);
        if (at >= count) continue;
        const unsigned char* place = room + chunk / 8 * ROWS * ROW_BYTES + at * ROW_BYTES + ((chunk ^ at) % 8) * 16;
        store_pack(to + at * stride + chunk * 8, load_pack(reinterpret_cast<const bf16*>(place)));
    }
    __syncwarp();  // the room may be written again
}

// A warpgroup: NaN where cu_seqlens are wrong.
DEVICE void poison_rows(bf16* to, int64_t stride, int count, int head_dim) {
    for (int i = threadIdx.x % GROUP; i < count * head_dim; i += GROUP) to[i / head_dim * stride + i % head_dim] = {0x7fff};
}

DEVICE bf16* row_at(const Rows& rows, int64_t token, int head) {
    return static_cast<bf16*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

}  // namespace

namespace sm90 {

// Loads of `rows` tokens' 64 columns of one head of (tokens, heads, D).
CUtensorMap tensor_map(const Rows& from, int64_t tokens, int64_t heads, int64_t head_dim, int rows);
int multiprocessors();  // of the current device

}  // namespace sm90

// Decode attention on NVIDIA GPUs, a warp's part: what it does with a tile of keys and values in shared memory. Queries that see
// the same keys (the heads of a group, and of a prefix all sequences that share it) are rows. A row's numbers do not depend on
// the rows beside it, nor on its place among them.
#pragma once
#include "device.cuh"

namespace decode {

// How a block lies: WARPS warps with ROWS rows each. MANY: they have rows of their own and share the keys of a tile; else all have
// the same rows, and of a tile each its own keys, so that none ever waits for another. Rings of STAGES tiles of keys and values
// fit in the 99 KB of the smallest GPUs.
template <class T, int WIDTH, bool MANY>
struct Shape {
    static constexpr bool FP32 = sizeof(T) == 4;
    static constexpr int ROWS = !FP32 ? 16 : WIDTH == 256 ? 4 : 8, TILE = (FP32 ? 32 : 64) / (WIDTH == 256 ? 2 : 1);
    static constexpr int STAGES = WIDTH == 64 ? 4 : WIDTH == 128 && !FP32 ? 3 : 2, WARPS = FP32 ? 4 : TILE / 16;
    static constexpr int TEAMS = MANY ? 1 : WARPS, KEYS = TILE / TEAMS, BLOCK_ROWS = ROWS * WARPS / TEAMS, THREADS = WARPS * WARP;
    static constexpr int SPREAD = FP32 ? WARP / KEYS : 1;  // lanes that share a key's score
    static constexpr bool HOLDS = !FP32 && WIDTH < 256;    // queries in registers
    static constexpr int PACK = 16 / sizeof(T), PACKS = WIDTH / PACK;
    static constexpr int TILE_BYTES = TILE * WIDTH * sizeof(T), RING_BYTES = 2 * STAGES * TILE_BYTES;
    static constexpr int QUERY_BYTES = HOLDS ? 0 : BLOCK_ROWS * WIDTH * sizeof(T);
    static constexpr int WEIGHT_BYTES = FP32 ? WARPS * KEYS * ROWS * 4 : 0, SUM_BYTES = TEAMS * BLOCK_ROWS * 8;
    static constexpr int BYTES = RING_BYTES + QUERY_BYTES + WEIGHT_BYTES + SUM_BYTES + 16;
    static_assert(TEAMS * BLOCK_ROWS * WIDTH * 4 <= RING_BYTES && BYTES <= 99 << 10 && TILE / WARPS <= WARP);

    // Byte of 16 elements' bytes: packs of a row change places so that a column of rows is in different banks.
    DEVICE static int place(int row, int pack) { return (row * PACKS + (pack ^ (row * SPREAD & 7))) * 16; }
    // Float of a warp's result.
    DEVICE static int result(int row, int column) { return row * WIDTH + (column ^ (row & 3) * 8); }
};

// The highest score so far is subtracted before 2^x; with no score yet, anything finite.
DEVICE float base_of(float top) { return top == -INFINITY ? 0.f : top; }

template <class T, int WIDTH, bool MANY>
struct Warp;

// bf16: 16 rows are the rows of an mma. Of lane 4g + t: rows g and g + 8.
template <int WIDTH, bool MANY>
struct Warp<bf16, WIDTH, MANY> {
    using S = Shape<bf16, WIDTH, MANY>;
    uint32_t q[S::HOLDS ? WIDTH / 16 : 1][4];
    const unsigned char* rows;
    float top[2], total[2], out[WIDTH / 8][4];
    int lane;

    // Rows of the block's queries from `first` on. With HOLDS, they may be overwritten when all warps are back.
    DEVICE void take(const unsigned char* queries, int first, float*) {
        lane = threadIdx.x % WARP, rows = queries;
        first_row = first;
        if constexpr (S::HOLDS)
#pragma unroll
            for (int k = 0; k < WIDTH / 16; ++k) load_query(q[k], k);
    }
    DEVICE void start() {
        top[0] = top[1] = -INFINITY, total[0] = total[1] = 0;
#pragma unroll
        for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) out[n][i] = 0;
    }
    // Keys from row `first` of the tile on, of which the first `valid` count.
    DEVICE void tile(const unsigned char* k, const unsigned char* v, int first, int valid, float scale) {
        float s[S::KEYS / 8][4];
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[n][i] = 0;
#pragma unroll
        for (int depth = 0; depth < WIDTH / 16; ++depth) {
            uint32_t local[4];
            if constexpr (!S::HOLDS) load_query(local, depth);
            const uint32_t(&a)[4] = S::HOLDS ? q[S::HOLDS ? depth : 0] : local;
#pragma unroll
            for (int n = 0; n < S::KEYS / 16; ++n) {
                uint32_t b[4];
                ldmatrix_x4(b, k + S::place(first + 16 * n + lane % 8 + lane / 16 * 8, 2 * depth + lane / 8 % 2));
                mma_m16n8k16(s[2 * n], a, b[0], b[1]);
                mma_m16n8k16(s[2 * n + 1], a, b[2], b[3]);
            }
        }
        float high[2] = {top[0], top[1]}, base[2], shrink[2];
#pragma unroll
        for (int n = 0; n < S::KEYS / 8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i)
                high[i / 2] = fmaxf(high[i / 2], 8 * n + lane % 4 * 2 + i % 2 < valid ? s[n][i] * scale : -INFINITY);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 1));
            high[i] = fmaxf(high[i], __shfl_xor_sync(0xffffffffu, high[i], 2));
            base[i] = base_of(high[i]), shrink[i] = ex2(top[i] - base[i]), top[i] = high[i];
        }
        if (__any_sync(0xffffffffu, shrink[0] != 1 || shrink[1] != 1)) {
            total[0] *= shrink[0], total[1] *= shrink[1];
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[n][i] *= shrink[i / 2];
        }
#pragma unroll
        for (int n = 0; n < S::KEYS / 16; ++n) {
            uint32_t a[4];  // the weights, whose sum is that of what the values are multiplied with
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int half = 2 * n + j / 2, r = j % 2, key = 8 * half + lane % 4 * 2;
                a[j] = pack_bf16(key < valid ? ex2(fmaf(s[half][2 * r], scale, -base[r])) : 0.f,
                                 key + 1 < valid ? ex2(fmaf(s[half][2 * r + 1], scale, -base[r])) : 0.f);
                total[r] += low_half(a[j]) + high_half(a[j]);
            }
#pragma unroll
            for (int d = 0; d < WIDTH / 16; ++d) {
                uint32_t b[4];
                ldmatrix_x4_trans(b, v + S::place(first + 16 * n + lane % 16, 2 * d + lane / 16));
                mma_m16n8k16(out[2 * d], a, b[0], b[1]);
                mma_m16n8k16(out[2 * d + 1], a, b[2], b[3]);
            }
        }
    }
    // The rows' sums of weighted values, relative to 2^top, and (top, sum of weights).
    DEVICE void finish(float* results, float2* sums, int first) {
#pragma unroll
        for (int r = 0; r < 2; ++r) {
            const int row = first + lane / 4 + 8 * r;
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 1);
            total[r] += __shfl_xor_sync(0xffffffffu, total[r], 2);
            if (lane % 4 == 0) sums[row] = make_float2(top[r], total[r]);
#pragma unroll
            for (int n = 0; n < WIDTH / 8; ++n)
                *reinterpret_cast<float2*>(results + S::result(row, 8 * n + lane % 4 * 2)) =
                    make_float2(out[n][2 * r], out[n][2 * r + 1]);
        }
    }

private:
    int first_row;
    DEVICE void load_query(uint32_t (&a)[4], int depth) const {
        ldmatrix_x4(a, rows + S::place(first_row + lane % 16, 2 * depth + lane / 16));
    }
};

// fp32: SPREAD lanes share the score of a key; then the lanes are dimensions.
template <int WIDTH, bool MANY>
struct Warp<float, WIDTH, MANY> {
    using S = Shape<float, WIDTH, MANY>;
    static constexpr int R = S::ROWS, AT_ONCE = S::PACKS < WARP ? WARP / S::PACKS : 1, PER_LANE = S::PACKS * AT_ONCE / WARP;
    const unsigned char* rows;
    float *weights, top[R], total[R], out[PER_LANE][R][4];
    int lane, first_row;

    DEVICE void take(const unsigned char* queries, int first, float* room) {
        lane = threadIdx.x % WARP, rows = queries, first_row = first, weights = room + threadIdx.x / WARP * S::KEYS * R;
    }
    DEVICE void start() {
#pragma unroll
        for (int r = 0; r < R; ++r) {
            top[r] = -INFINITY, total[r] = 0;
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[j][r][i] = 0;
        }
    }
    DEVICE void tile(const unsigned char* k, const unsigned char* v, int first, int valid, float scale) {
        const int key = lane / S::SPREAD;
        float s[R];
#pragma unroll
        for (int r = 0; r < R; ++r) s[r] = 0;
#pragma unroll 4
        for (int pack = lane % S::SPREAD; pack < S::PACKS; pack += S::SPREAD) {
            const auto part = load_pack(reinterpret_cast<const float*>(k + S::place(first + key, pack)));
#pragma unroll
            for (int r = 0; r < R; ++r) {
                const auto query = load_pack(reinterpret_cast<const float*>(rows + S::place(first_row + r, pack)));
#pragma unroll
                for (int i = 0; i < 4; ++i) s[r] = fmaf(query.v[i], part.v[i], s[r]);
            }
        }
        __syncwarp();  // the weights of the tile before have been read
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int lanes = S::SPREAD / 2; lanes; lanes /= 2) s[r] += __shfl_xor_sync(0xffffffffu, s[r], lanes);
            const float high = fmaxf(top[r], warp_max(key < valid ? s[r] * scale : -INFINITY)), base = base_of(high);
            const float shrink = ex2(top[r] - base), weight = key < valid ? ex2(fmaf(s[r], scale, -base)) : 0.f;
            top[r] = high, total[r] = fmaf(total[r], shrink, weight);
            if (lane % S::SPREAD == 0) weights[key * R + r] = weight;
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j)
#pragma unroll
                for (int i = 0; i < 4; ++i) out[j][r][i] *= shrink;
        }
        __syncwarp();
#pragma unroll 2
        for (int other = lane * PER_LANE / S::PACKS; other < S::KEYS; other += AT_ONCE) {
            Pack<float> shares[R / 4];
#pragma unroll
            for (int r = 0; r < R / 4; ++r) shares[r] = load_pack(weights + other * R + 4 * r);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                const auto part = load_pack(reinterpret_cast<const float*>(v + S::place(first + other, lane % S::PACKS + j * WARP)));
#pragma unroll
                for (int r = 0; r < R; ++r)
#pragma unroll
                    for (int i = 0; i < 4; ++i) out[j][r][i] = fmaf(shares[r / 4].v[r % 4], part.v[i], out[j][r][i]);
            }
        }
    }
    DEVICE void finish(float* results, float2* sums, int first) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
            for (int lanes = WARP / 2; lanes >= S::SPREAD; lanes /= 2) total[r] += __shfl_xor_sync(0xffffffffu, total[r], lanes);
            if (lane == 0) sums[first + r] = make_float2(top[r], total[r]);
#pragma unroll
            for (int j = 0; j < PER_LANE; ++j) {
                Pack<float> pack;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    pack.v[i] = out[j][r][i];
                    if constexpr (AT_ONCE == 2) pack.v[i] += __shfl_xor_sync(0xffffffffu, pack.v[i], WARP / 2);
                }
                store_pack(results + S::result(first + r, 4 * (lane % S::PACKS + j * WARP)), pack);
            }
        }
    }
};

}  // namespace decode

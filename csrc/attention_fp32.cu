// Attention on fp32, every product by ordinary multiply-adds: see attention_fp32.cuh. Forward, and the two kernels of the backward
// pass, which have the shape of attention_portable_backward.cu's.
#include <initializer_list>
#include <type_traits>

#include "attention_fp32.cuh"

namespace {

// Whether query `query` sees key `key` of the tile's sequence.
DEVICE bool sees(const AttentionTile& tile, bool causal, int query, int key) {
    return key < tile.keys && (!causal || key <= query + tile.keys - tile.queries);
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, DP <= 64 ? 2 : 1)
attention_forward_fp32_kernel(const __grid_constant__ AttentionProblem p, const AttentionTile* tiles, int tile_count, int group) {
    const int head = blockIdx.x / tile_count, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const AttentionTile tile = tiles[blockIdx.x % tile_count];
    if (tile.row < 0) return;
    float* const stages = reinterpret_cast<float*>(shared_memory());
    float* const weights = stages + 2 * STAGE;
    const Source q = source_of(p.q, tile.query, head, tile.queries, p.head_dim);
    const Source k = source_of(p.k, tile.key, head / group, tile.keys, p.head_dim);
    const Source v = source_of(p.v, tile.key, head / group, tile.keys, p.head_dim);
    const float scale = fmaxf(fabsf(p.scale), 1e-30f) * LOG2E, sign = p.scale < 0 ? -1.f : 1.f;  // times 0, minus infinity were NaN
    float o[DP / TILE][4][4], maximum[4], total[4];
    clear(o);
#pragma unroll
    for (int i = 0; i < 4; ++i) maximum[i] = -INFINITY, total[i] = 0;
    for (int key = 0; key < tile.end; key += TILE) {
        float s[4][4];
        rows_times_rows<ALIGNED>(s, q, tile.row, k, key, stages);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            float top = maximum[i];
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                s[i][j] = sees(tile, p.causal, tile.row + y + 16 * i, key + x + 16 * j) ? sign * s[i][j] : -INFINITY;
                top = fmaxf(top, s[i][j]);
            }
            top = warp_max<16>(top);
            const float shift = top == -INFINITY ? 0.f : top * scale;
            const float shrink = exp2f(maximum[i] == -INFINITY ? -INFINITY : maximum[i] * scale - shift);
            maximum[i] = top;
            total[i] *= shrink;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                s[i][j] = exp2f(fmaf(s[i][j], scale, -shift));
                total[i] += s[i][j];
            }
#pragma unroll
            for (int c = 0; c < DP / TILE; ++c)
#pragma unroll
                for (int e = 0; e < 4; ++e) o[c][i][e] *= shrink;
        }
        weights_times_rows<DP, ALIGNED>(o, s, weights, v, key, stages);
    }
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        const float sum = warp_sum<16>(total[i]);
        const int row = tile.row + y + 16 * i;
        factor[i] = tile.poisoned ? NAN : sum == 0 ? 0.f : 1 / sum;
        if (x || row >= tile.queries) continue;
        const double shift = maximum[i] == -INFINITY ? 0. : static_cast<double>(maximum[i] * scale) * 0.69314718055994530942;
        p.lse[(tile.query + row) * p.heads + head] = tile.poisoned ? NAN : shift + log(static_cast<double>(sum));
    }
    store_rows(source_of(p.out, tile.query, head, tile.queries, p.head_dim), tile.row, o, factor);
}

struct Backward {
    AttentionProblem p;
    QueryStats stats;
    const AttentionTile* tiles;
    int tile_count, group;
    float scale;  // for base 2
};

// The weight of a score, and the slope of the loss in it.
DEVICE void weigh(const Backward& b, float& score, float& slope, int64_t place) {
    score = exp2f(fmaf(score, b.scale, -b.stats.lse2[place]) - b.stats.lse2_low[place]);
    slope = score * (slope - b.stats.delta[place]);
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, DP <= 64 ? 2 : 1) gradient_of_keys_fp32(const __grid_constant__ Backward b) {
    const int kv_head = blockIdx.x / b.tile_count, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const AttentionTile tile = b.tiles[blockIdx.x % b.tile_count];
    if (tile.row < 0) return;
    float* const stages = reinterpret_cast<float*>(shared_memory());
    float* const weights = stages + 2 * STAGE;
    const Source k = source_of(b.p.k, tile.key, kv_head, tile.keys, b.p.head_dim);
    const Source v = source_of(b.p.v, tile.key, kv_head, tile.keys, b.p.head_dim);
    float dk[DP / TILE][4][4], dv[DP / TILE][4][4];
    clear(dk);
    clear(dv);
    for (int head = kv_head * b.group; head < (kv_head + 1) * b.group; ++head) {
        const Source q = source_of(b.p.q, tile.query, head, tile.queries, b.p.head_dim);
        const Source dout = source_of(b.p.dout, tile.query, head, tile.queries, b.p.head_dim);
        for (int query = tile.begin / TILE * TILE; query < tile.end; query += TILE) {
            float s[4][4], ds[4][4];
            rows_times_rows<ALIGNED>(s, k, tile.row, q, query, stages);
            rows_times_rows<ALIGNED>(ds, v, tile.row, dout, query, stages);
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const int column = query + x + 16 * j;
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const bool seen = column < tile.queries && sees(tile, b.p.causal, column, tile.row + y + 16 * i);
                    if (seen) weigh(b, s[i][j], ds[i][j], head * b.stats.stride + tile.query + column);
                    else s[i][j] = ds[i][j] = 0;
                }
            }
            weights_times_rows<DP, ALIGNED>(dv, s, weights, dout, query, stages);
            weights_times_rows<DP, ALIGNED>(dk, ds, weights, q, query, stages);
        }
    }
    float of_dk[4], of_dv[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) of_dk[i] = tile.poisoned ? NAN : b.p.scale, of_dv[i] = tile.poisoned ? NAN : 1.f;
    store_rows(source_of(b.p.dk, tile.key, kv_head, tile.keys, b.p.head_dim), tile.row, dk, of_dk);
    store_rows(source_of(b.p.dv, tile.key, kv_head, tile.keys, b.p.head_dim), tile.row, dv, of_dv);
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, DP <= 64 ? 2 : 1) gradient_of_queries_fp32(const __grid_constant__ Backward b) {
    const int head = blockIdx.x / b.tile_count, y = threadIdx.x / 16, x = threadIdx.x % 16;
    const AttentionTile tile = b.tiles[blockIdx.x % b.tile_count];
    if (tile.row < 0) return;
    float* const stages = reinterpret_cast<float*>(shared_memory());
    float* const weights = stages + 2 * STAGE;
    const Source q = source_of(b.p.q, tile.query, head, tile.queries, b.p.head_dim);
    const Source dout = source_of(b.p.dout, tile.query, head, tile.queries, b.p.head_dim);
    const Source k = source_of(b.p.k, tile.key, head / b.group, tile.keys, b.p.head_dim);
    const Source v = source_of(b.p.v, tile.key, head / b.group, tile.keys, b.p.head_dim);
    float dq[DP / TILE][4][4];
    clear(dq);
    for (int key = 0; key < tile.end; key += TILE) {
        float s[4][4], ds[4][4];
        rows_times_rows<ALIGNED>(s, q, tile.row, k, key, stages);
        rows_times_rows<ALIGNED>(ds, dout, tile.row, v, key, stages);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int row = tile.row + y + 16 * i;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                const bool seen = row < tile.queries && sees(tile, b.p.causal, row, key + x + 16 * j);
                if (seen) weigh(b, s[i][j], ds[i][j], head * b.stats.stride + tile.query + row);
                else ds[i][j] = 0;
            }
        }
        weights_times_rows<DP, ALIGNED>(dq, ds, weights, k, key, stages);
    }
    float factor[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) factor[i] = tile.poisoned ? NAN : b.p.scale;
    store_rows(source_of(b.p.dq, tile.query, head, tile.queries, b.p.head_dim), tile.row, dq, factor);
}

}  // namespace

namespace gpu {

TileRows tile_rows_fp32(int64_t) { return {TILE, TILE, TILE}; }

void attention_forward_fp32(const AttentionProblem& p, int64_t, const TileMap& queries, cudaStream_t stream) {
    by_head_dim(p.head_dim, by_packs(p, {&p.q, &p.k, &p.v}), [&](auto size, auto packs) {
        launch(attention_forward_fp32_kernel<decltype(size)::value, decltype(packs)::value>,
               dim3(static_cast<unsigned>(queries.capacity * p.heads)), dim3(THREADS), SHARED, stream, "attention", p, queries.tiles,
               static_cast<int>(queries.capacity), static_cast<int>(p.heads / p.kv_heads));
    });
}

void attention_backward_fp32(const AttentionProblem& p, int64_t, const TileMap& queries, const TileMap& keys,
                             const QueryStats& stats, cudaStream_t stream) {
    Backward b{p, stats, keys.tiles, static_cast<int>(keys.capacity), static_cast<int>(p.heads / p.kv_heads), p.scale * LOG2E};
    by_head_dim(p.head_dim, by_packs(p, {&p.q, &p.k, &p.v, &p.dout}), [&](auto size, auto packs) {
        launch(gradient_of_keys_fp32<decltype(size)::value, decltype(packs)::value>,
               dim3(static_cast<unsigned>(keys.capacity * p.kv_heads)), dim3(THREADS), SHARED, stream, "attention_backward", b);
        b.tiles = queries.tiles, b.tile_count = static_cast<int>(queries.capacity);
        launch(gradient_of_queries_fp32<decltype(size)::value, decltype(packs)::value>,
               dim3(static_cast<unsigned>(queries.capacity * p.heads)), dim3(THREADS), SHARED, stream, "attention_backward", b);
    });
}

}  // namespace gpu

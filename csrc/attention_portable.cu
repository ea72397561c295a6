// Attention on bf16 for every GPU from sm_80 on, forward. A block has one tile of queries of one head, a warp M times 16 of them;
// keys and values come by turns in the background: values while the scores are formed, the next keys while they are weighed.
// Weights are rounded to bf16, and so are those that their sum adds up: it is a product with ones.
// Source: FlashAttention-2, arXiv 2307.08691, algorithm 1; the lazy rescaling is FlashAttention-4's.
#include "attention_tiles.cuh"

namespace {

constexpr int THREADS = 128;
constexpr float HEADROOM = 8;  // a maximum may be this much too low, in base 2, before what has been added up is scaled down
constexpr double LN2_EXACT = 0.69314718055994530942;
constexpr uint32_t ONES = 0x3f803f80u;

template <int DP>
struct Forward {
    static constexpr int M = DP <= 128 ? 2 : 1, QUERIES = 64 * M, KEYS = 64;
    static constexpr size_t SHARED = (QUERIES + 2 * KEYS) * DP * sizeof(bf16);
};

template <int M>
struct Softmax {
    float maximum[M][2], total[M][4];  // of total, entries 0 and 2 are the sums of rows g and g + 8
    float scale;                       // above 0, for base 2
};

// Scores become weights; the maximum of each row rises where it has to, and what has been added up is scaled down with it.
template <int M, int N8, int D8>
DEVICE void weigh(float (&s)[M][N8][4], float (&o)[M][D8][4], Softmax<M>& rows) {
    float shrink[M][2];
    bool any = false;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float top = -INFINITY;
#pragma unroll
            for (int n = 0; n < N8; ++n) top = fmaxf(top, fmaxf(s[m][n][2 * half], s[m][n][2 * half + 1]));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 1));
            top = fmaxf(top, __shfl_xor_sync(0xffffffffu, top, 2));
            float& maximum = rows.maximum[m][half];
            const bool grown = (top - maximum) * rows.scale > HEADROOM;  // not if both are minus infinity
            shrink[m][half] = grown ? ex2((maximum - top) * rows.scale) : 1.f;
            if (grown) maximum = top;
            any |= grown;
        }
    if (__any_sync(0xffffffffu, any)) {
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                rows.total[m][i] *= shrink[m][i / 2];
#pragma unroll
                for (int n = 0; n < D8; ++n) o[m][n][i] *= shrink[m][i / 2];
            }
    }
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float maximum = rows.maximum[m][half];
            const float shift = maximum == -INFINITY ? 0.f : maximum * rows.scale;
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int i = 2 * half; i < 2 * half + 2; ++i) s[m][n][i] = ex2(fmaf(s[m][n][i], rows.scale, -shift));
        }
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(THREADS, DP <= 128 ? 2 : 1)
attention_forward_kernel(const __grid_constant__ AttentionProblem p, const AttentionTile* tiles, int tile_count, int group) {
    using F = Forward<DP>;
    constexpr int M = F::M, KEYS = F::KEYS, N8 = KEYS / 8;
    const int head = blockIdx.x / tile_count;
    const AttentionTile tile = tiles[blockIdx.x % tile_count];
    if (tile.row < 0) return;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared_memory());
    bf16 *const k_tile = q_tile + F::QUERIES * DP, *const v_tile = k_tile + KEYS * DP;
    const int head_dim = static_cast<int>(p.head_dim), lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 * M;
    const Source q = source_of(p.q, tile.query, head, tile.queries, head_dim);
    const Source k = source_of(p.k, tile.key, head / group, tile.keys, head_dim);
    const Source v = source_of(p.v, tile.key, head / group, tile.keys, head_dim);

    // The end of the keys that any of the warp's rows sees; blocks, and those that all of the tile's rows see whole.
    const int offset = tile.keys - tile.queries, end_row = min(tile.queries, tile.row + own + 16 * M);
    const int last = tile.row + own < end_row ? p.causal ? min(tile.end, end_row + offset) : tile.end : 0;
    const int blocks = (tile.end + KEYS - 1) / KEYS;
    const int whole = (p.causal ? max(0, min(tile.keys, tile.row + offset + 1)) : tile.keys) / KEYS;

    Softmax<M> softmax;
    const float size = fabsf(p.scale);  // the sign goes to the queries, so that the largest product is the largest score
    softmax.scale = fmaxf(size, 1e-30f) * LOG2E;  // times 0, minus infinity were NaN
    float o[M][DP / 8][4];
    clear(o);
#pragma unroll
    for (int m = 0; m < M; ++m) {
        softmax.maximum[m][0] = softmax.maximum[m][1] = -INFINITY;
#pragma unroll
        for (int i = 0; i < 4; ++i) softmax.total[m][i] = 0;
    }

    if (blocks) {
        load_rows<DP, F::QUERIES, THREADS, ALIGNED>(q_tile, q, tile.row);
        load_rows<DP, KEYS, THREADS, ALIGNED>(k_tile, k, (blocks - 1) * KEYS);
        cp_async_commit();
        if (p.scale < 0) negate_rows<DP, F::QUERIES, THREADS>(q_tile);
    }
    // Warps may wait for each other at different places, so the barrier has a number.
    const auto load_values = [&](int block) {
        cp_async_wait<0>();
        bar_sync(1, THREADS);  // the keys are here, and the values before these have been read
        load_rows<DP, KEYS, THREADS, ALIGNED>(v_tile, v, block * KEYS);
        cp_async_commit();
    };
    const auto load_keys = [&](int block) {
        cp_async_wait<0>();
        bar_sync(1, THREADS);  // the values are here, and the keys have been read
        if (block >= 0) load_rows<DP, KEYS, THREADS, ALIGNED>(k_tile, k, block * KEYS);
        cp_async_commit();
    };
    int block = blocks - 1;
#pragma unroll 1
    for (; block >= 0 && block * KEYS >= last; --block) {  // the warp sees nothing of it
        load_values(block);
        load_keys(block - 1);
    }
#pragma unroll 1
    for (; block >= 0; --block) {
        float s[M][N8][4];
        load_values(block);
        rows_times_rows<DP>(s, q_tile, own, k_tile);
        if (block >= whole) {
            const AttentionTile whose = tiles[blockIdx.x % tile_count];  // read again: the loop needs the registers
            hide(s, whose, whose.row + own + lane / 4, block * KEYS, p.causal, -INFINITY);
        }
        load_keys(block - 1);
        weigh(s, o, softmax);
        weights_times_rows<DP>(o, s, v_tile, 0, [&](int m, const uint32_t (&weights)[4]) {
            mma_m16n8k16(softmax.total[m], weights, ONES, ONES);
        });
    }

    const AttentionTile whose = tiles[blockIdx.x % tile_count];  // read again: the loops need the registers
    const int first = whose.row + own;
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const float total = softmax.total[m][2 * half], maximum = softmax.maximum[m][half];
            const int at = first + m * 16 + half * 8 + lane / 4;
            factor[m][half] = whose.poisoned ? NAN : total == 0 ? 0.f : __fdividef(1.f, total);
            if (lane % 4 == 0 && at < whose.queries) {
                const double shift = maximum == -INFINITY ? 0. : static_cast<double>(maximum * softmax.scale) * LN2_EXACT;
                p.lse[(whose.query + at) * p.heads + head] = whose.poisoned ? NAN : shift + static_cast<double>(logf(total));
            }
        }
    store_rows<DP, ALIGNED>(source_of(p.out, whose.query, head, whose.queries, head_dim), first, o, factor, q_tile, own);
}

}  // namespace

namespace gpu {

TileRows tile_rows_portable(int64_t head_dim) {
    const int rows = head_dim <= 128 ? 128 : 64;
    return {rows, rows, rows};
}

void attention_forward_portable(const AttentionProblem& p, int64_t, const TileMap& queries, cudaStream_t stream) {
    const bool aligned = p.head_dim % 8 == 0 && by_packs(p.q) && by_packs(p.k) && by_packs(p.v) && by_packs(p.out);
    by_head_dim(p.head_dim, aligned, [&](auto size, auto packs) {
        constexpr int DP = decltype(size)::value;
        launch(attention_forward_kernel<DP, decltype(packs)::value>, dim3(static_cast<unsigned>(queries.capacity * p.heads)),
               dim3(THREADS), Forward<DP>::SHARED, stream, "attention", p, queries.tiles, static_cast<int>(queries.capacity),
               static_cast<int>(p.heads / p.kv_heads));
    });
}

}  // namespace gpu

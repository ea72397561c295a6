// Attention on bf16 for every GPU from sm_80 on, backward. Two kernels recompute the weights from the logarithm of their sum: one
// holds a tile of keys and adds up dK and dV over the queries of all heads that share them, one holds a tile of queries and adds
// up dQ over the keys. Seven products instead of five, but nothing is added to memory by two blocks: the sums have one order.
// P and dS are rounded to bf16 for the products that take them; all sums are fp32.
// Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
#include "attention_tiles.cuh"

namespace {

// S^T = K Q^T and dP^T = V dO^T, so that P^T and dS^T lie in registers as the operands of dV = P^T dO and dK = dS^T Q.
template <int DP>
struct OfKeys {
    static constexpr int M = DP <= 64 ? 2 : 1, WARPS = DP == 96 || DP == 128 ? 8 : 4, THREADS = WARPS * WARP, KEYS = WARPS * 16 * M;
    static constexpr int QUERIES = DP <= 128 ? 32 : 16;        // of a block
    static constexpr int PARTS = DP <= 128 ? 1 : 2, COLUMNS = DP / PARTS;  // of dK and dV: what the registers hold
    static constexpr int STATS = 2 * QUERIES * sizeof(float);  // lse2 and delta
    static constexpr int STAGE = 2 * QUERIES * DP * sizeof(bf16);
    static constexpr size_t SHARED = 2 * KEYS * DP * sizeof(bf16) + 2 * (STAGE + STATS);
};

template <int DP>
struct OfQueries {
    static constexpr int M = DP <= 128 ? 2 : 1, THREADS = 128, QUERIES = 64 * M, KEYS = DP <= 192 ? 32 : 16;
    static constexpr int STAGE = 2 * KEYS * DP * sizeof(bf16);
    static constexpr size_t SHARED = 2 * QUERIES * DP * sizeof(bf16) + 2 * STAGE;
};

struct Backward {
    AttentionProblem p;
    QueryStats stats;
    const AttentionTile* tiles;
    int tile_count, group;
    float scale;  // for base 2
};

constexpr float NEVER = 1e30f;  // a logarithm with which every weight is 0

// The stages of (head of the group, block of queries), in the order in which they are added up.
struct Walk {
    int head, block;
    DEVICE void next(int first, int blocks) {
        if (++block == blocks) block = first, ++head;
    }
};

// Of S^T, whose columns are queries: the weights from the logarithms of their sums, two of which each lane has in every 8 columns.
template <int M, int N8>
DEVICE void weigh_columns(float (&s)[M][N8][4], const float* lse2, float scale) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
        const float2 lse = *reinterpret_cast<const float2*>(lse2 + n * 8);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = ex2(fmaf(s[m][n][i], scale, -(i % 2 ? lse.y : lse.x)));
    }
}

// Queries that do not see a key weigh it 0; the lane's first query sees its first key and `seen` more.
template <int M, int N8>
DEVICE void hide_earlier(float (&s)[M][N8][4], int seen) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] = seen + n * 8 + i % 2 >= m * 16 + i / 2 * 8 ? s[m][n][i] : 0.f;
}

// dS^T = P^T (dP^T - delta), in the place of P^T.
template <int M, int N8>
DEVICE void slopes_of_columns(float (&s)[M][N8][4], const float (&dp)[M][N8][4], const float* delta) {
#pragma unroll
    for (int n = 0; n < N8; ++n) {
        const float2 less = *reinterpret_cast<const float2*>(delta + n * 8);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int i = 0; i < 4; ++i) s[m][n][i] *= dp[m][n][i] - (i % 2 ? less.y : less.x);
    }
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(OfKeys<DP>::THREADS, OfKeys<DP>::THREADS == 128 ? 2 : 1)
gradient_of_keys(const __grid_constant__ Backward b) {
    using F = OfKeys<DP>;
    constexpr int M = F::M, Q8 = F::QUERIES / 8, D8 = F::COLUMNS / 8, THREADS = F::THREADS;
    const int part = blockIdx.x % F::PARTS, kv_head = blockIdx.x / F::PARTS / b.tile_count;
    const AttentionTile tile = b.tiles[blockIdx.x / F::PARTS % b.tile_count];
    if (tile.row < 0) return;
    bf16* const k_tile = reinterpret_cast<bf16*>(shared_memory());
    bf16* const v_tile = k_tile + F::KEYS * DP;
    unsigned char* const stages = shared_memory() + 2 * F::KEYS * DP * sizeof(bf16);
    float* const stats = reinterpret_cast<float*>(stages + 2 * F::STAGE);
    const int head_dim = static_cast<int>(b.p.head_dim), lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 * M;
    const int first = tile.begin / F::QUERIES, blocks = (tile.end + F::QUERIES - 1) / F::QUERIES;
    const int offset = tile.keys - tile.queries;

    float dk[M][D8][4], dv[M][D8][4];
    clear(dk);
    clear(dv);
    const auto load_queries = [&](int stage, const Walk& at) {
        bf16* to = reinterpret_cast<bf16*>(stages + stage * F::STAGE);
        const int head = kv_head * b.group + at.head;
        load_rows<DP, F::QUERIES, THREADS, ALIGNED>(to, source_of(b.p.q, tile.query, head, tile.queries, head_dim), at.block * F::QUERIES);
        load_rows<DP, F::QUERIES, THREADS, ALIGNED>(to + F::QUERIES * DP, source_of(b.p.dout, tile.query, head, tile.queries, head_dim),
                                                    at.block * F::QUERIES);
        cp_async_commit();
    };
    // One of the first threads' each: lse2, then delta, of a block's queries.
    const auto stat = [&](const Walk& at) {
        const int query = at.block * F::QUERIES + static_cast<int>(threadIdx.x) % F::QUERIES;
        const bool is_lse = threadIdx.x < F::QUERIES;
        if (query >= tile.queries) return is_lse ? NEVER : 0.f;
        return (is_lse ? b.stats.lse2 : b.stats.delta)[(kv_head * b.group + at.head) * b.stats.stride + tile.query + query];
    };
    Walk at{0, first}, ahead = at;
    if (first < blocks) {
        load_rows<DP, F::KEYS, THREADS, ALIGNED>(k_tile, source_of(b.p.k, tile.key, kv_head, tile.keys, head_dim), tile.row);
        load_rows<DP, F::KEYS, THREADS, ALIGNED>(v_tile, source_of(b.p.v, tile.key, kv_head, tile.keys, head_dim), tile.row);
        load_queries(0, at);
        if (threadIdx.x < 2 * F::QUERIES) stats[threadIdx.x] = stat(at);
    }
    const int heads = first < blocks ? b.group : 0;
#pragma unroll 1
    for (int stage = 0; at.head < heads; stage ^= 1, at = ahead) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the one before has been read
        ahead.next(first, blocks);
        float coming = 0;
        if (ahead.head < heads) {
            load_queries(stage ^ 1, ahead);
            if (threadIdx.x < 2 * F::QUERIES) coming = stat(ahead);
        }
        const int query = at.block * F::QUERIES, key = tile.row + own;
        const bool causal = b.p.causal;
        if (key < tile.keys && (!causal || key <= query + F::QUERIES - 1 + offset)) {
            const bf16 *q_tile = reinterpret_cast<const bf16*>(stages + stage * F::STAGE), *dout_tile = q_tile + F::QUERIES * DP;
            const float *lse2 = stats + stage * 2 * F::QUERIES + 2 * (lane % 4), *delta = lse2 + F::QUERIES;
            float s[M][Q8][4], dp[M][Q8][4];
            rows_times_rows<DP>(s, k_tile, own, q_tile);
            const bool diagonal = causal && key + 16 * M - 1 > query + offset;
            const int seen = query + offset + 2 * (lane % 4) - key - lane / 4;
            weigh_columns(s, lse2, b.scale);
            if (diagonal) hide_earlier(s, seen);
            weights_times_rows<DP>(dv, s, dout_tile, part * D8);
            rows_times_rows<DP>(dp, v_tile, own, dout_tile);
            slopes_of_columns(s, dp, delta);
            weights_times_rows<DP>(dk, s, q_tile, part * D8);
        }
        if (threadIdx.x < 2 * F::QUERIES) stats[(stage ^ 1) * 2 * F::QUERIES + threadIdx.x] = coming;
    }
    const AttentionTile whose = b.tiles[blockIdx.x / F::PARTS % b.tile_count];  // read again: the loop needs the registers
    float of_dk[M][2], of_dv[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) of_dk[m][half] = whose.poisoned ? NAN : b.p.scale, of_dv[m][half] = whose.poisoned ? NAN : 1.f;
    store_rows<DP, ALIGNED>(source_of(b.p.dk, whose.key, kv_head, whose.keys, head_dim), whose.row + own, dk, of_dk, k_tile, own, part * D8);
    store_rows<DP, ALIGNED>(source_of(b.p.dv, whose.key, kv_head, whose.keys, head_dim), whose.row + own, dv, of_dv, v_tile, own, part * D8);
}

template <int DP, bool ALIGNED>
__global__ void __launch_bounds__(OfQueries<DP>::THREADS, DP <= 128 ? 2 : 1)
gradient_of_queries(const __grid_constant__ Backward b) {
    using F = OfQueries<DP>;
    constexpr int M = F::M, N8 = F::KEYS / 8, THREADS = F::THREADS;
    const int head = blockIdx.x / b.tile_count, kv_head = head / b.group;
    const AttentionTile tile = b.tiles[blockIdx.x % b.tile_count];
    if (tile.row < 0) return;
    bf16* const q_tile = reinterpret_cast<bf16*>(shared_memory());
    bf16* const dout_tile = q_tile + F::QUERIES * DP;
    unsigned char* const stages = shared_memory() + 2 * F::QUERIES * DP * sizeof(bf16);
    const int head_dim = static_cast<int>(b.p.head_dim), lane = threadIdx.x % WARP, own = threadIdx.x / WARP * 16 * M;
    const int offset = tile.keys - tile.queries, end_row = min(tile.queries, tile.row + own + 16 * M);
    const int last = tile.row + own < end_row ? b.p.causal ? min(tile.end, end_row + offset) : tile.end : 0;
    const int blocks = (tile.end + F::KEYS - 1) / F::KEYS;
    const int whole = (b.p.causal ? max(0, min(tile.keys, tile.row + offset + 1)) : tile.keys) / F::KEYS;

    float dq[M][DP / 8][4], lse2[M][2], delta[M][2];
    clear(dq);
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            const int row = tile.row + own + m * 16 + half * 8 + lane / 4;
            const int64_t place = head * b.stats.stride + tile.query + row;
            lse2[m][half] = row < tile.queries ? b.stats.lse2[place] : NEVER;
            delta[m][half] = row < tile.queries ? b.stats.delta[place] : 0.f;
        }
    const auto load_keys = [&](int stage, int block) {
        bf16* to = reinterpret_cast<bf16*>(stages + stage * F::STAGE);
        load_rows<DP, F::KEYS, THREADS, ALIGNED>(to, source_of(b.p.k, tile.key, kv_head, tile.keys, head_dim), block * F::KEYS);
        load_rows<DP, F::KEYS, THREADS, ALIGNED>(to + F::KEYS * DP, source_of(b.p.v, tile.key, kv_head, tile.keys, head_dim), block * F::KEYS);
        cp_async_commit();
    };
    if (blocks) {
        load_rows<DP, F::QUERIES, THREADS, ALIGNED>(q_tile, source_of(b.p.q, tile.query, head, tile.queries, head_dim), tile.row);
        load_rows<DP, F::QUERIES, THREADS, ALIGNED>(dout_tile, source_of(b.p.dout, tile.query, head, tile.queries, head_dim), tile.row);
        load_keys(0, 0);
    }
#pragma unroll 1
    for (int block = 0; block < blocks; ++block) {
        cp_async_wait<0>();
        __syncthreads();  // this stage is here, and the one before has been read
        if (block + 1 < blocks) load_keys(block + 1 & 1, block + 1);
        if (block * F::KEYS >= last) continue;
        const bf16 *k_tile = reinterpret_cast<const bf16*>(stages + (block & 1) * F::STAGE), *v_tile = k_tile + F::KEYS * DP;
        float s[M][N8][4], dp[M][N8][4];
        rows_times_rows<DP>(s, q_tile, own, k_tile);
        rows_times_rows<DP>(dp, dout_tile, own, v_tile);
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] = ex2(fmaf(s[m][n][i], b.scale, -lse2[m][i / 2]));
        if (block >= whole) {  // a key that there is not has a score of 0, of which the weight is anything
            const AttentionTile whose = b.tiles[blockIdx.x % b.tile_count];  // read again: the loop needs the registers
            hide(s, whose, whose.row + own + lane / 4, block * F::KEYS, b.p.causal, 0);
        }
#pragma unroll
        for (int m = 0; m < M; ++m)
#pragma unroll
            for (int n = 0; n < N8; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) s[m][n][i] *= dp[m][n][i] - delta[m][i / 2];
        weights_times_rows<DP>(dq, s, k_tile);
    }
    const AttentionTile whose = b.tiles[blockIdx.x % b.tile_count];
    float factor[M][2];
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int half = 0; half < 2; ++half) factor[m][half] = whose.poisoned ? NAN : b.p.scale;
    store_rows<DP, ALIGNED>(source_of(b.p.dq, whose.query, head, whose.queries, head_dim), whose.row + own, dq, factor, q_tile, own);
}

}  // namespace

namespace gpu {

void attention_backward_portable(const AttentionProblem& p, int64_t, const TileMap& queries, const TileMap& keys,
                                 const QueryStats& stats, cudaStream_t stream) {
    bool aligned = p.head_dim % 8 == 0;
    for (const Rows* rows : {&p.q, &p.k, &p.v, &p.dout, &p.dq, &p.dk, &p.dv}) aligned = aligned && by_packs(*rows);
    Backward b{p, stats, keys.tiles, static_cast<int>(keys.capacity), static_cast<int>(p.heads / p.kv_heads), p.scale * LOG2E};
    by_head_dim(p.head_dim, aligned, [&](auto size, auto packs) {
        constexpr int DP = decltype(size)::value;
        constexpr bool PACKS = decltype(packs)::value;
        launch(gradient_of_keys<DP, PACKS>, dim3(static_cast<unsigned>(keys.capacity * p.kv_heads * OfKeys<DP>::PARTS)),
               dim3(OfKeys<DP>::THREADS), OfKeys<DP>::SHARED, stream, "attention_backward", b);
        b.tiles = queries.tiles, b.tile_count = static_cast<int>(queries.capacity);
        launch(gradient_of_queries<DP, PACKS>, dim3(static_cast<unsigned>(queries.capacity * p.heads)),
               dim3(OfQueries<DP>::THREADS), OfQueries<DP>::SHARED, stream, "attention_backward", b);
    });
}

}  // namespace gpu

// Attention's backward kernels for Hopper, bf16: two, without atomics, so that the gradient is the same on every run. Both compute
// the weights again from the scores and the logarithms of their sums. One keeps keys and values and takes all queries past them, of
// all heads that share the keys: there the scores are computed transposed, so that weights and their gradients are in
// registers where the products for dV and dK want them. The other keeps queries and takes the keys past them, for dQ: seven
// products in all instead of five. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
// A map's tiles have as many keys as queries here.
#include "attention_sm90.cuh"

namespace {

constexpr int CONSUMERS = 2, TILE = CONSUMERS * GROUP_ROWS, THREADS = (CONSUMERS + 1) * GROUP;
constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;

struct BackwardProblem {
    const AttentionTile* tiles;
    Rows dq, dk, dv;
    const float *lse2, *delta;
    int64_t stride;  // of those, from head to head
    int heads, group;
    bool causal;
    float scale, scale2;  // the latter of exponents in base 2
};

// How the kernel for dK and dV lays out its memory: keys and values, and stages of queries and their gradients.
template <int D>
struct OfKeys {
    // Stages: one whose products may be under way, one that a group skips, one that it waits for.
    static constexpr int QUERIES = 64, STAGES = 3, KV_BYTES = TILE_BYTES<D, TILE>, Q_BYTES = TILE_BYTES<D, QUERIES>;
    struct Barriers {
        uint64_t kv, full[STAGES], empty[STAGES], landed;
    };
    struct Stats {
        float lse2[QUERIES], delta[QUERIES];
    };
    static constexpr int SHARED = 2 * KV_BYTES + 2 * STAGES * Q_BYTES + STAGES * sizeof(Stats) + sizeof(Barriers);

    unsigned char *k, *v, *q, *dout;
    Stats* stats;
    Barriers* barriers;

    DEVICE OfKeys() {
        k = shared_memory(), v = k + KV_BYTES, q = v + KV_BYTES, dout = q + STAGES * Q_BYTES;
        stats = reinterpret_cast<Stats*>(dout + STAGES * Q_BYTES);
        barriers = reinterpret_cast<Barriers*>(stats + STAGES);
    }
};

// Blocks of queries in the order in which they pass: of each head that shares the keys, from the first that sees any of them.
struct Passage {
    int first, last, heads, block, head;
    DEVICE Passage(const AttentionTile& tile, int queries, int heads) : heads(heads), head(0) {
        first = block = tile.begin / queries, last = (tile.end + queries - 1) / queries - 1;
    }
    DEVICE bool more() const { return head < heads; }
    DEVICE void next() {
        if (++block > last) block = first, ++head;
    }
};

// Where a sequence ends within a block, rows behind are made zeros and their weights nothing.
template <int D>
DEVICE void produce_queries(const OfKeys<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k, const CUtensorMap* v,
                            const BackwardProblem& p, const AttentionTile& tile, int kv_head) {
    using O = OfKeys<D>;
    auto& barriers = *shared.barriers;
    const int lane = threadIdx.x % WARP;
    if (lane == 0) {
        mbarrier_arrive_expect(&barriers.kv, 2 * O::KV_BYTES);
        load_tile<D, TILE>(shared.k, k, &barriers.kv, kv_head, tile.key + tile.row);
        load_tile<D, TILE>(shared.v, v, &barriers.kv, kv_head, tile.key + tile.row);
    }
    int use = 0, partials = 0;
#pragma unroll 1
    for (Passage at(tile, O::QUERIES, p.group); at.more(); at.next(), ++use) {
        const int place = place_of_use<O::STAGES>(use), head = kv_head * p.group + at.head, first = at.block * O::QUERIES;
        const int there = tile.queries - first;
        float lse2[2], delta[2];
#pragma unroll
        for (int i = 0; i < 2; ++i) {  // before the wait, which they take as long as
            const int row = lane + i * WARP;
            const int64_t from = head * p.stride + tile.query + first + row;
            lse2[i] = row < there ? p.lse2[from] : INFINITY, delta[i] = row < there ? p.delta[from] : 0;
        }
        const bool partial = there < O::QUERIES;
        uint64_t* const barrier = partial ? &barriers.landed : &barriers.full[place];
        unsigned char *const q_tile = shared.q + place * O::Q_BYTES, *const dout_tile = shared.dout + place * O::Q_BYTES;
        mbarrier_wait(&barriers.empty[place], parity_of_use<O::STAGES>(use) ^ 1);
#pragma unroll
        for (int i = 0; i < 2; ++i) shared.stats[place].lse2[lane + i * WARP] = lse2[i], shared.stats[place].delta[lane + i * WARP] = delta[i];
        __syncwarp();
        if (lane == 0) {
            mbarrier_arrive_expect(barrier, 2 * O::Q_BYTES);
            load_tile<D, O::QUERIES>(q_tile, q, barrier, head, tile.query + first);
            load_tile<D, O::QUERIES>(dout_tile, dout, barrier, head, tile.query + first);
        }
        if (partial) {
            mbarrier_wait(barrier, partials++ & 1);
            zero_rows<D, O::QUERIES>(q_tile, there);
            zero_rows<D, O::QUERIES>(dout_tile, there);
            arrive_by_warp(&barriers.full[place]);
        }
    }
}

template <int COLUMNS>
DEVICE void own_columns(float2 (&own)[COLUMNS / 8], const float* all) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; ++i) own[i] = *reinterpret_cast<const float2*>(all + 8 * i + threadIdx.x % 4 * 2);
}

// A consumer warpgroup: the gradients of its 64 keys and values.
template <int D>
DEVICE void consume_queries(const OfKeys<D>& shared, const BackwardProblem& p, const AttentionTile& tile, int kv_head, int group) {
    using O = OfKeys<D>;
    constexpr int Q = O::QUERIES;
    auto& barriers = *shared.barriers;
    unsigned char *const k = shared.k + group * GROUP_ROWS * ROW_BYTES, *const v = shared.v + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS, first = p.causal ? row / Q : 0;  // the first block that sees any of the keys
    float s[Q / 2], dp[Q / 2], dk[D / 2], dv[D / 2];
    uint32_t weights[Q / STEP_K][4], dscores[Q / STEP_K][4];
    

    mbarrier_wait(&barriers.kv, 0);
    int use = 0, before = -1;  // the use whose products for dV and dK may be under way
#pragma unroll 1
    for (Passage at(tile, Q, p.group); at.more(); at.next(), ++use) {
        const int place = place_of_use<O::STAGES>(use);
        mbarrier_wait(&barriers.full[place], parity_of_use<O::STAGES>(use));
        if (at.block < first) {
            arrive_by_warp(&barriers.empty[place]);
            continue;
        }
        wgmma_fence();
        rows_times_rows<D, TILE, Q>(s, k, shared.q + place * O::Q_BYTES);
        wgmma_commit();
        wgmma_wait<1>();  // the products before: their operands' registers are free
        if (before >= 0) arrive_by_warp(&barriers.empty[place_of_use<O::STAGES>(before)]);
        wgmma_fence();
        rows_times_rows<D, TILE, Q>(dp, v, shared.dout + place * O::Q_BYTES);
        wgmma_commit();
        float2 stats[Q / 8];  // of the thread's columns
        own_columns<Q>(stats, shared.stats[place].lse2);
        wgmma_wait<1>();
        wgmma_hold(s);
#pragma unroll
        for (int i = 0; i < Q / 2; ++i) s[i] = ex2(fmaf(s[i], p.scale2, i % 2 ? -stats[i / 4].y : -stats[i / 4].x));
        if (p.causal && at.block == first) {
            const int unseen = own_row() - 2 * static_cast<int>(threadIdx.x % 4);  // of the block's queries, by the upper row
#pragma unroll
            for (int i = 0; i < Q / 2; ++i) s[i] = column_of(i) < unseen + 8 * half_of(i) ? 0 : s[i];
        }
        to_weights<Q>(weights, s);
        wgmma_fence();
        weights_times_rows<D, Q>(dv, weights, shared.dout + place * O::Q_BYTES, before >= 0);
        wgmma_commit();
        own_columns<Q>(stats, shared.stats[place].delta);
        wgmma_wait<1>();
        wgmma_hold(dp);
#pragma unroll
        for (int i = 0; i < Q / 2; ++i) s[i] *= dp[i] - (i % 2 ? stats[i / 4].y : stats[i / 4].x);
        to_weights<Q>(dscores, s);
        wgmma_fence();
        weights_times_rows<D, Q>(dk, dscores, shared.q + place * O::Q_BYTES, before >= 0);
        wgmma_commit();
        before = use;
    }
    wgmma_wait<0>();
    wgmma_hold(dk), wgmma_hold(dv);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read keys and values
    const int left = tile.keys - row;
    store_rows<D, TILE>(row_at(p.dv, tile.key + row, kv_head), p.dv.token_stride, left, dv, 1, 1, v);
    store_rows<D, TILE>(row_at(p.dk, tile.key + row, kv_head), p.dk.token_stride, left, dk, p.scale, p.scale, k);
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_backward_keys_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                                    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                                    const __grid_constant__ BackwardProblem p) {
    using O = OfKeys<D>;
    const int kv_heads = p.heads / p.group, kv_head = blockIdx.x % kv_heads;
    const AttentionTile tile = p.tiles[blockIdx.x / kv_heads];
    if (tile.row < 0) return;
    if (tile.poisoned) {
        for (const Rows* to : {&p.dk, &p.dv})
            poison_rows(row_at(*to, tile.key + tile.row, kv_head), to->token_stride, min(TILE, tile.keys - tile.row), D);
        return;
    }
    const O shared;
    auto& barriers = *shared.barriers;
    const int groups = tile.keys - tile.row > GROUP_ROWS ? CONSUMERS : 1, group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&barriers.kv, 1), mbarrier_init(&barriers.landed, 1);
        for (int i = 0; i < O::STAGES; ++i) mbarrier_init(&barriers.full[i], 1), mbarrier_init(&barriers.empty[i], 4 * groups);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 0) {
        registers_down<PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce_queries<D>(shared, &q, &dout, &k, &v, p, tile, kv_head);
    } else {
        registers_up<CONSUMER_REGISTERS>();
        if (group <= groups) consume_queries<D>(shared, p, tile, kv_head, group - 1);
    }
}

// The same of the kernel for dQ: queries and their gradients, and stages of keys and values.
template <int D>
struct OfQueries {
    static constexpr int KEYS = 128, STAGES = 2, KV_BYTES = TILE_BYTES<D, KEYS>, Q_BYTES = TILE_BYTES<D, TILE>;
    struct Barriers {
        uint64_t q, full[STAGES], empty[STAGES], landed;
    };
    static constexpr int SHARED = 2 * Q_BYTES + 2 * STAGES * KV_BYTES + sizeof(Barriers);

    unsigned char *q, *dout, *k, *v;
    Barriers* barriers;

    DEVICE OfQueries() {
        q = shared_memory(), dout = q + Q_BYTES, k = dout + Q_BYTES, v = k + STAGES * KV_BYTES;
        barriers = reinterpret_cast<Barriers*>(v + STAGES * KV_BYTES);
    }
};

// The last block first. Where it has less keys than rows, the rows behind are made zeros.
template <int D>
DEVICE void produce_keys(const OfQueries<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k, const CUtensorMap* v,
                         const AttentionTile& tile, int head, int kv_head) {
    using O = OfQueries<D>;
    auto& barriers = *shared.barriers;
    const bool leader = threadIdx.x % WARP == 0;
    const int last = (tile.end + O::KEYS - 1) / O::KEYS - 1, beyond = tile.keys - last * O::KEYS;
    if (leader) {
        mbarrier_arrive_expect(&barriers.q, 2 * O::Q_BYTES);
        load_tile<D, TILE>(shared.q, q, &barriers.q, head, tile.query + tile.row);
        load_tile<D, TILE>(shared.dout, dout, &barriers.q, head, tile.query + tile.row);
    }
#pragma unroll 1
    for (int use = 0; use <= last; ++use) {
        const int place = place_of_use<O::STAGES>(use), first = tile.key + (last - use) * O::KEYS;
        const bool partial = use == 0 && beyond < O::KEYS;
        uint64_t* const barrier = partial ? &barriers.landed : &barriers.full[place];
        unsigned char *const k_tile = shared.k + place * O::KV_BYTES, *const v_tile = shared.v + place * O::KV_BYTES;
        mbarrier_wait(&barriers.empty[place], parity_of_use<O::STAGES>(use) ^ 1);
        if (leader) {
            mbarrier_arrive_expect(barrier, 2 * O::KV_BYTES);
            load_tile<D, O::KEYS>(k_tile, k, barrier, kv_head, first);
            load_tile<D, O::KEYS>(v_tile, v, barrier, kv_head, first);
        }
        if (partial) {
            mbarrier_wait(barrier, 0);
            zero_rows<D, O::KEYS>(k_tile, beyond);
            zero_rows<D, O::KEYS>(v_tile, beyond);
            arrive_by_warp(&barriers.full[place]);
        }
    }
}

// A consumer warpgroup: the gradients of its 64 queries.
template <int D>
DEVICE void consume_keys(const OfQueries<D>& shared, const BackwardProblem& p, const AttentionTile& tile, int head, int group) {
    using O = OfQueries<D>;
    constexpr int K = O::KEYS, S = O::STAGES;
    auto& barriers = *shared.barriers;
    unsigned char *const q = shared.q + group * GROUP_ROWS * ROW_BYTES, *const dout = shared.dout + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS, last = (tile.end + K - 1) / K - 1;
    const int first = p.causal ? row / K : last;  // the only block with keys that some rows do not see
    float s[K / 2], dp[K / 2], dq[D / 2], lse2[2], delta[2];
    uint32_t dscores[K / STEP_K][4];
    
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t from = head * p.stride + tile.query + row + own_row() + 8 * half;  // behind the sequence's end: anything
        lse2[half] = p.lse2[from], delta[half] = p.delta[from];
    }
    int use = 0;
#pragma unroll 1
    for (; use < last - first; ++use) {
        mbarrier_wait(&barriers.full[place_of_use<S>(use)], parity_of_use<S>(use));
        arrive_by_warp(&barriers.empty[place_of_use<S>(use)]);
    }
    mbarrier_wait(&barriers.q, 0);
    const int begun = use;
#pragma unroll 1
    for (; use <= last; ++use) {
        const int place = place_of_use<S>(use);
        const unsigned char *const k = shared.k + place * O::KV_BYTES, *const v = shared.v + place * O::KV_BYTES;
        mbarrier_wait(&barriers.full[place], parity_of_use<S>(use));
        wgmma_fence();
        rows_times_rows<D, TILE, K>(s, q, k);
        wgmma_commit();
        wgmma_wait<1>();  // the product before: its operand's registers are free
        if (use > begun) arrive_by_warp(&barriers.empty[place_of_use<S>(use - 1)]);
        wgmma_fence();
        rows_times_rows<D, TILE, K>(dp, dout, v);
        wgmma_commit();
        wgmma_wait<1>();
        wgmma_hold(s);
#pragma unroll
        for (int i = 0; i < K / 2; ++i) s[i] = ex2(fmaf(s[i], p.scale2, -lse2[half_of(i)]));
        if (use == begun) {
            const int before = first * K + 2 * static_cast<int>(threadIdx.x % 4), there = tile.keys - before;
            const int seen = p.causal ? min(there, row + own_row() + 1 - before) : there;
            const int seen_below = p.causal ? min(there, row + own_row() + 9 - before) : there;
#pragma unroll
            for (int i = 0; i < K / 2; ++i) s[i] = column_of(i) < (half_of(i) ? seen_below : seen) ? s[i] : 0;
        }
        wgmma_wait<0>();
        wgmma_hold(dp);
#pragma unroll
        for (int i = 0; i < K / 2; ++i) s[i] *= dp[i] - delta[half_of(i)];
        to_weights<K>(dscores, s);
        wgmma_fence();
        weights_times_rows<D, K>(dq, dscores, k, use > begun);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_hold(dq);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read the queries
    store_rows<D, TILE>(row_at(p.dq, tile.query + row, head), p.dq.token_stride, tile.queries - row, dq, p.scale, p.scale, q);
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_backward_queries_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                                       const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                                       const __grid_constant__ BackwardProblem p) {
    using O = OfQueries<D>;
    const int head = blockIdx.x % p.heads;
    const AttentionTile tile = p.tiles[blockIdx.x / p.heads];
    if (tile.row < 0) return;
    if (tile.poisoned)
        return poison_rows(row_at(p.dq, tile.query + tile.row, head), p.dq.token_stride, min(TILE, tile.queries - tile.row), D);
    const O shared;
    auto& barriers = *shared.barriers;
    const int groups = tile.queries - tile.row > GROUP_ROWS ? CONSUMERS : 1, group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&barriers.q, 1), mbarrier_init(&barriers.landed, 1);
        for (int i = 0; i < O::STAGES; ++i) mbarrier_init(&barriers.full[i], 1), mbarrier_init(&barriers.empty[i], 4 * groups);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 0) {
        registers_down<PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce_keys<D>(shared, &q, &dout, &k, &v, tile, head, head / p.group);
    } else {
        registers_up<CONSUMER_REGISTERS>();
        if (group <= groups) consume_keys<D>(shared, p, tile, head, group - 1);
    }
}

template <int D>
void backward(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys, const QueryStats& stats,
              cudaStream_t stream) {
    BackwardProblem problem{keys.tiles, p.dq, p.dk, p.dv, stats.lse2, stats.delta, stats.stride, static_cast<int>(p.heads),
                            static_cast<int>(p.heads / p.kv_heads), p.causal, p.scale, p.scale * LOG2E};
    const auto of_queries = [&](const Rows& rows, int box) { return sm90::tensor_map(rows, tokens, p.heads, D, box); };
    const auto of_keys = [&](const Rows& rows, int box) { return sm90::tensor_map(rows, tokens, p.kv_heads, D, box); };
    launch(attention_backward_keys_sm90_kernel<D>, dim3(static_cast<unsigned>(keys.capacity * p.kv_heads)), dim3(THREADS), OfKeys<D>::SHARED,
           stream, "attention_backward", of_queries(p.q, OfKeys<D>::QUERIES), of_queries(p.dout, OfKeys<D>::QUERIES), of_keys(p.k, TILE),
           of_keys(p.v, TILE), problem);
    problem.tiles = queries.tiles;
    launch(attention_backward_queries_sm90_kernel<D>, dim3(static_cast<unsigned>(queries.capacity * p.heads)), dim3(THREADS),
           OfQueries<D>::SHARED, stream, "attention_backward", of_queries(p.q, TILE), of_queries(p.dout, TILE),
           of_keys(p.k, OfQueries<D>::KEYS), of_keys(p.v, OfQueries<D>::KEYS), problem);
}

}  // namespace

namespace gpu {

int64_t attention_backward_workspace_sm90(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }

void attention_backward_sm90(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys, const QueryStats& stats,
                             void*, cudaStream_t stream) {
    (p.head_dim == 64 ? backward<64> : backward<128>)(p, tokens, queries, keys, stats, stream);
}

}  // namespace gpu

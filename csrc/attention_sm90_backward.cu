// Attention's backward kernels for Hopper, bf16: two, without atomics, so that the gradient is the same on every run. Both compute
// the weights again from the scores and the logarithms of their sums. One keeps keys and values and takes all queries past them, of
// all heads that share the keys: there the scores are computed transposed, so that weights and their gradients are in
// registers where the products for dV and dK want them. The other keeps queries and takes the keys past them, for dQ: seven
// products in all instead of five. Source: FlashAttention-2, arXiv 2307.08691, algorithm 2.
// A map's tiles have as many keys as queries here.
#include <algorithm>

#include "attention_sm90.cuh"

namespace {

constexpr int CONSUMERS = 2, TILE = CONSUMERS * GROUP_ROWS, THREADS = (CONSUMERS + 1) * GROUP;

struct BackwardProblem {
    const AttentionTile* tiles;
    int32_t* taken;     // items of work beside each block's first one
    int items, blocks;  // items: a tile's heads, then the next one's
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
    static constexpr int PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    struct Barriers {
        uint64_t kv_full, kv_empty, full[STAGES], empty[STAGES], landed;
    };
    struct Stats {
        float lse2[QUERIES], delta[QUERIES];
    };
    static constexpr int SHARED = 2 * KV_BYTES + 2 * STAGES * Q_BYTES + STAGES * sizeof(Stats) + 2 * sizeof(Item) + sizeof(Barriers);

    unsigned char *k, *v, *q, *dout;
    Stats* stats;
    Item *item, *coming;  // whose keys and values they are, and what the producer is at
    Barriers* barriers;

    DEVICE OfKeys() {
        k = shared_memory(), v = k + KV_BYTES, q = v + KV_BYTES, dout = q + STAGES * Q_BYTES;
        stats = reinterpret_cast<Stats*>(dout + STAGES * Q_BYTES);
        item = reinterpret_cast<Item*>(stats + STAGES), coming = item + 1;
        barriers = reinterpret_cast<Barriers*>(coming + 1);
    }
};

// Blocks of queries in the order in which they pass: of each head that shares the keys, from the first that sees any of them.
// `tile` is in shared memory, where it takes no registers.
struct Passage {
    const AttentionTile& tile;
    int queries, heads, block, head;
    DEVICE Passage(const AttentionTile& tile, int queries, int heads)
        : tile(tile), queries(queries), heads(heads), block(tile.begin / queries), head(tile.begin < tile.end ? 0 : heads) {}
    DEVICE bool more() const { return head < heads; }
    DEVICE void next() {
        if (++block * queries >= tile.end) block = tile.begin / queries, ++head;
    }
};

DEVICE AttentionTile tile_of(const BackwardProblem& p, int index, int heads) {
    return index < p.items ? p.tiles[index / heads] : AttentionTile{0, 0, 0, 0, -1, 0, 0, 0};
}

// Where a sequence ends within a block, rows behind are made zeros and their weights nothing.
template <int D>
DEVICE void produce_queries(const OfKeys<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k, const CUtensorMap* v,
                            const BackwardProblem& p) {
    using O = OfKeys<D>;
    auto& barriers = *shared.barriers;
    const int lane = threadIdx.x % WARP;
    int use = 0, partials = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        const AttentionTile& tile = shared.coming->tile;
        __syncwarp();
        if (lane == 0) {
            const int index = round ? shared.coming->next : blockIdx.x, kv_heads = p.heads / p.group;
            *shared.coming = {tile_of(p, index, kv_heads), index % kv_heads, p.blocks + atomicAdd(p.taken, 1)};
        }
        __syncwarp();
        Passage at(tile, O::QUERIES, p.group);
        const auto load_block = [&] {
            const int place = place_of_use<O::STAGES>(use), head = shared.coming->head * p.group + at.head, first = tile.query + at.block * O::QUERIES;
            const int there = tile.queries - at.block * O::QUERIES;
            uint64_t* const barrier = there < O::QUERIES ? &barriers.landed : &barriers.full[place];
            mbarrier_wait(&barriers.empty[place], parity_of_use<O::STAGES>(use) ^ 1);
            if (lane == 0) {
                mbarrier_arrive_expect(barrier, 2 * O::Q_BYTES);
                load_tile<D, O::QUERIES>(shared.q + place * O::Q_BYTES, q, barrier, head, first);
                load_tile<D, O::QUERIES>(shared.dout + place * O::Q_BYTES, dout, barrier, head, first);
            }
            const int64_t from = head * p.stride + first;
            for (int i = lane; i < O::QUERIES; i += WARP) {
                shared.stats[place].lse2[i] = i < there ? p.lse2[from + i] : INFINITY;
                shared.stats[place].delta[i] = i < there ? p.delta[from + i] : 0;
            }
            arrive_by_warp(&barriers.full[place]);
            if (there < O::QUERIES) {
                mbarrier_wait(barrier, partials++ & 1);
                zero_rows<D, O::QUERIES>(shared.q + place * O::Q_BYTES, there);
                zero_rows<D, O::QUERIES>(shared.dout + place * O::Q_BYTES, there);
                arrive_by_warp(&barriers.full[place]);
            }
            at.next(), ++use;
        };
        const bool empty = !at.more();
        if (!empty) load_block();
        mbarrier_wait(&barriers.kv_empty, (round & 1) ^ 1);
        if (lane == 0) {
            const int kv_head = shared.coming->head;
            *shared.item = *shared.coming;
            if (empty) {
                mbarrier_arrive(&barriers.kv_full);
            } else {
                mbarrier_arrive_expect(&barriers.kv_full, 2 * O::KV_BYTES);
                load_tile<D, TILE>(shared.k, k, &barriers.kv_full, kv_head, tile.key + tile.row);
                load_tile<D, TILE>(shared.v, v, &barriers.kv_full, kv_head, tile.key + tile.row);
            }
        }
        if (tile.row < 0) return;
#pragma unroll 1
        while (at.more()) load_block();
    }
}

template <int COLUMNS>
DEVICE void own_columns(float2 (&own)[COLUMNS / 8], const float* all) {
#pragma unroll
    for (int i = 0; i < COLUMNS / 8; ++i) own[i] = *reinterpret_cast<const float2*>(all + 8 * i + threadIdx.x % 4 * 2);
}

// A consumer warpgroup: the gradients of its 64 keys and values. Returns the uses of the stages so far, of which there were `use`.
template <int D>
DEVICE int consume_queries(const OfKeys<D>& shared, const BackwardProblem& p, int group, int use) {
    using O = OfKeys<D>;
    constexpr int Q = O::QUERIES, S = O::STAGES;
    auto& barriers = *shared.barriers;
    const AttentionTile& tile = shared.item->tile;
    unsigned char *const k = shared.k + group * GROUP_ROWS * ROW_BYTES, *const v = shared.v + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS;
    if (row >= tile.keys) {
#pragma unroll 1
        for (Passage at(tile, Q, p.group); at.more(); at.next(), ++use) {
            mbarrier_wait(&barriers.full[place_of_use<S>(use)], parity_of_use<S>(use));
            arrive_by_warp(&barriers.empty[place_of_use<S>(use)]);
        }
        return use;
    }
    const int first = p.causal ? row / Q : 0;  // the first block that sees any of the keys
    float s[Q / 2], dp[Q / 2], dk[D / 2], dv[D / 2];
    uint32_t weights[Q / STEP_K][4], dscores[Q / STEP_K][4];

    int before = -1;  // the use whose products for dV and dK may be under way
#pragma unroll 1
    for (Passage at(tile, Q, p.group); at.more(); at.next(), ++use) {
        const int place = place_of_use<S>(use);
        mbarrier_wait(&barriers.full[place], parity_of_use<S>(use));
        if (at.block < first) {
            arrive_by_warp(&barriers.empty[place]);
            continue;
        }
        wgmma_fence();
        rows_times_rows<D, TILE, Q>(s, k, shared.q + place * O::Q_BYTES);
        wgmma_commit();
        wgmma_wait<1>();  // the products before: their operands' registers are free
        if (before >= 0) arrive_by_warp(&barriers.empty[place_of_use<S>(before)]);
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
    arrive_by_warp(&barriers.empty[place_of_use<S>(before)]);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read keys and values
    const int left = tile.keys - row, kv_head = shared.item->head;
    store_rows<D, TILE>(row_at(p.dv, tile.key + row, kv_head), p.dv.token_stride, left, dv, 1, 1, v);
    store_rows<D, TILE>(row_at(p.dk, tile.key + row, kv_head), p.dk.token_stride, left, dk, p.scale, p.scale, k);
    return use;
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all_queries(const OfKeys<D>& shared, const BackwardProblem& p, int group) {
    const AttentionTile& tile = shared.item->tile;
    int use = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.barriers->kv_full, round & 1);
        if (tile.row < 0) return;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS, count = min(GROUP_ROWS, tile.keys - first), kv_head = shared.item->head;
            poison_rows(row_at(p.dk, tile.key + first, kv_head), p.dk.token_stride, count, D);
            poison_rows(row_at(p.dv, tile.key + first, kv_head), p.dv.token_stride, count, D);
        } else {
            use = consume_queries<D>(shared, p, group, use);
        }
        fence_async();  // the next keys and values come where the result went through
        arrive_by_warp(&shared.barriers->kv_empty);
    }
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_backward_keys_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                                    const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                                    const __grid_constant__ BackwardProblem p) {
    using O = OfKeys<D>;
    const O shared;
    auto& barriers = *shared.barriers;
    const int group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&barriers.kv_full, 1), mbarrier_init(&barriers.kv_empty, 4 * CONSUMERS), mbarrier_init(&barriers.landed, 1);
        for (int i = 0; i < O::STAGES; ++i) mbarrier_init(&barriers.full[i], 2), mbarrier_init(&barriers.empty[i], 4 * CONSUMERS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 0) {
        registers_down<O::PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce_queries<D>(shared, &q, &dout, &k, &v, p);
    } else {
        registers_up<O::CONSUMER_REGISTERS>();
        consume_all_queries<D>(shared, p, group - 1);
    }
}

// The same of the kernel for dQ: queries and their gradients, and stages of keys and values.
template <int D>
struct OfQueries {
    static constexpr int KEYS = 128, STAGES = 2, KV_BYTES = TILE_BYTES<D, KEYS>, Q_BYTES = TILE_BYTES<D, TILE>;
    static constexpr int PRODUCER_REGISTERS = 40, CONSUMER_REGISTERS = 232;
    struct Barriers {
        uint64_t q_full, q_empty, full[STAGES], empty[STAGES], landed;
    };
    static constexpr int SHARED = 2 * Q_BYTES + 2 * STAGES * KV_BYTES + sizeof(Item) + sizeof(Barriers);

    unsigned char *q, *dout, *k, *v;
    Item* item;  // whose queries they are
    Barriers* barriers;

    DEVICE OfQueries() {
        q = shared_memory(), dout = q + Q_BYTES, k = dout + Q_BYTES, v = k + STAGES * KV_BYTES;
        item = reinterpret_cast<Item*>(v + STAGES * KV_BYTES);
        barriers = reinterpret_cast<Barriers*>(item + 1);
    }
};

// The last block first. Where it has less keys than rows, the rows behind are made zeros.
template <int D>
DEVICE void produce_keys(const OfQueries<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k, const CUtensorMap* v,
                         const BackwardProblem& p) {
    using O = OfQueries<D>;
    constexpr int S = O::STAGES;
    auto& barriers = *shared.barriers;
    const bool leader = threadIdx.x % WARP == 0;
    int use = 0, partials = 0, index = blockIdx.x;
#pragma unroll 1
    for (int round = 0;; ++round) {
        const AttentionTile tile = tile_of(p, index, p.heads);
        const int head = index % p.heads, blocks = (tile.end + O::KEYS - 1) / O::KEYS, end = use + blocks;
        const int left = blocks ? tile.keys - (blocks - 1) * O::KEYS : O::KEYS;  // of the keys from the last block's first on
        int token = tile.key + (blocks - 1) * O::KEYS;
        const auto load_block = [&](uint64_t* barrier) {
            const int place = place_of_use<S>(use);
            mbarrier_wait(&barriers.empty[place], parity_of_use<S>(use) ^ 1);
            if (!leader) return;
            mbarrier_arrive_expect(barrier, 2 * O::KV_BYTES);
            load_tile<D, O::KEYS>(shared.k + place * O::KV_BYTES, k, barrier, head / p.group, token);
            load_tile<D, O::KEYS>(shared.v + place * O::KV_BYTES, v, barrier, head / p.group, token);
        };
        const bool partial = left < O::KEYS;
        if (blocks) load_block(partial ? &barriers.landed : &barriers.full[place_of_use<S>(use)]);
        mbarrier_wait(&barriers.q_empty, (round & 1) ^ 1);
        if (leader) {
            *shared.item = {tile, head};
            if (blocks) {
                mbarrier_arrive_expect(&barriers.q_full, 2 * O::Q_BYTES);
                load_tile<D, TILE>(shared.q, q, &barriers.q_full, head, tile.query + tile.row);
                load_tile<D, TILE>(shared.dout, dout, &barriers.q_full, head, tile.query + tile.row);
            } else {
                mbarrier_arrive(&barriers.q_full);
            }
            index = p.blocks + atomicAdd(p.taken, 1);
        }
        if (tile.row < 0) return;
        if (partial) {
            const int place = place_of_use<S>(use);
            mbarrier_wait(&barriers.landed, partials++ & 1);
            zero_rows<D, O::KEYS>(shared.k + place * O::KV_BYTES, left);
            zero_rows<D, O::KEYS>(shared.v + place * O::KV_BYTES, left);
            arrive_by_warp(&barriers.full[place]);
        }
#pragma unroll 1
        for (++use, token -= O::KEYS; use < end; ++use, token -= O::KEYS) load_block(&barriers.full[place_of_use<S>(use)]);
        use = end;
        index = __shfl_sync(0xffffffffu, index, 0);
    }
}

// A consumer warpgroup: the gradients of its 64 queries. Uses of keys and values are counted from `before`.
template <int D>
DEVICE void consume_keys(const OfQueries<D>& shared, const BackwardProblem& p, int group, int before, int blocks) {
    using O = OfQueries<D>;
    constexpr int K = O::KEYS, S = O::STAGES;
    auto& barriers = *shared.barriers;
    const AttentionTile& tile = shared.item->tile;
    unsigned char *const q = shared.q + group * GROUP_ROWS * ROW_BYTES, *const dout = shared.dout + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS, end = before + blocks;
    // The only block with keys that some rows do not see; those behind it none of the rows sees.
    const int first = row >= tile.queries ? -1 : p.causal ? row / K : blocks - 1;
    int use = before;
#pragma unroll 1
    for (; use < end - 1 - first; ++use) {
        mbarrier_wait(&barriers.full[place_of_use<S>(use)], parity_of_use<S>(use));
        arrive_by_warp(&barriers.empty[place_of_use<S>(use)]);
    }
    if (first < 0) return;

    float s[K / 2], dp[K / 2], dq[D / 2], lse2[2], delta[2];
    uint32_t dscores[K / STEP_K][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t from = shared.item->head * p.stride + tile.query + row + own_row() + 8 * half;  // behind the sequence: anything
        lse2[half] = p.lse2[from], delta[half] = p.delta[from];
    }
    const int begun = use;
#pragma unroll 1
    for (; use < end; ++use) {
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
            const int lane_first = first * K + 2 * static_cast<int>(threadIdx.x % 4), there = tile.keys - lane_first;
            const int seen = p.causal ? min(there, row + own_row() + 1 - lane_first) : there;
            const int seen_below = p.causal ? min(there, row + own_row() + 9 - lane_first) : there;
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
    arrive_by_warp(&barriers.empty[place_of_use<S>(end - 1)]);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read the queries
    store_rows<D, TILE>(row_at(p.dq, tile.query + row, shared.item->head), p.dq.token_stride, tile.queries - row, dq, p.scale, p.scale, q);
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all_keys(const OfQueries<D>& shared, const BackwardProblem& p, int group) {
    const AttentionTile& tile = shared.item->tile;
    int before = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.barriers->q_full, round & 1);
        if (tile.row < 0) return;
        const int blocks = (tile.end + OfQueries<D>::KEYS - 1) / OfQueries<D>::KEYS;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS;
            poison_rows(row_at(p.dq, tile.query + first, shared.item->head), p.dq.token_stride, min(GROUP_ROWS, tile.queries - first), D);
        } else {
            consume_keys<D>(shared, p, group, before, blocks);
        }
        before += blocks;
        fence_async();  // the next queries come where the result went through
        arrive_by_warp(&shared.barriers->q_empty);
    }
}

template <int D>
__global__ void __launch_bounds__(THREADS, 1)
attention_backward_queries_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                                       const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                                       const __grid_constant__ BackwardProblem p) {
    using O = OfQueries<D>;
    const O shared;
    auto& barriers = *shared.barriers;
    const int group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&barriers.q_full, 1), mbarrier_init(&barriers.q_empty, 4 * CONSUMERS), mbarrier_init(&barriers.landed, 1);
        for (int i = 0; i < O::STAGES; ++i) mbarrier_init(&barriers.full[i], 1), mbarrier_init(&barriers.empty[i], 4 * CONSUMERS);
        mbarrier_init_fence();
    }
    __syncthreads();
    if (group == 0) {
        registers_down<O::PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce_keys<D>(shared, &q, &dout, &k, &v, p);
    } else {
        registers_up<O::CONSUMER_REGISTERS>();
        consume_all_keys<D>(shared, p, group - 1);
    }
}

template <int D>
void backward(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys, const QueryStats& stats,
              cudaStream_t stream) {
    const auto run = [&](auto kernel, const TileMap& map, int64_t heads, int shared, int query_rows, int key_rows) {
        const int64_t items = map.capacity * heads, blocks = std::min<int64_t>(items, sm90::multiprocessors());
        const BackwardProblem problem{map.tiles, map.counters, static_cast<int>(items), static_cast<int>(blocks), p.dq, p.dk, p.dv, stats.lse2, stats.delta,
                                      stats.stride, static_cast<int>(p.heads), static_cast<int>(p.heads / p.kv_heads), p.causal,
                                      p.scale, p.scale * LOG2E};
        const auto of_queries = [&](const Rows& rows) { return sm90::tensor_map(rows, tokens, p.heads, D, query_rows); };
        const auto of_keys = [&](const Rows& rows) { return sm90::tensor_map(rows, tokens, p.kv_heads, D, key_rows); };
        launch(kernel, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), shared, stream,
               "attention_backward", of_queries(p.q), of_queries(p.dout), of_keys(p.k), of_keys(p.v), problem);
    };
    run(attention_backward_keys_sm90_kernel<D>, keys, p.kv_heads, OfKeys<D>::SHARED, OfKeys<D>::QUERIES, TILE);
    run(attention_backward_queries_sm90_kernel<D>, queries, p.heads, OfQueries<D>::SHARED, TILE, OfQueries<D>::KEYS);
}

}  // namespace

namespace gpu {

int64_t attention_backward_workspace_sm90(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }

void attention_backward_sm90(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys, const QueryStats& stats,
                             void*, cudaStream_t stream) {
    (p.head_dim == 64 ? backward<64> : backward<128>)(p, tokens, queries, keys, stats, stream);
}

}  // namespace gpu

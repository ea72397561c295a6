// The half of attention's backward for Hopper that gives dQ: a block keeps a tile of queries, and the keys that they see pass.
// See attention_sm90_backward.cu.
#pragma once
#include "attention_sm90_backward.cuh"

namespace {

// Queries and their gradients, and stages of keys and values.
template <int D>
struct OfQueries {
    static constexpr int KEYS = BACKWARD_TILE, STAGES = 2;
    static constexpr int KV_BYTES = TILE_BYTES<D, KEYS>, Q_BYTES = TILE_BYTES<D, BACKWARD_TILE>;
    static constexpr int BYTES = 2 * Q_BYTES + 2 * STAGES * KV_BYTES, ARRIVALS = 4 * BACKWARD_CONSUMERS;
    struct Control {
        Item item, coming;  // whose queries they are, and what the producer is at
        uint64_t q_full, q_empty, full[STAGES], empty[STAGES], landed;
    };

    unsigned char *q, *dout, *k, *v;
    Control& control;

    DEVICE OfQueries(unsigned char* tiles, Control& control)
        : q(tiles), dout(q + Q_BYTES), k(dout + Q_BYTES), v(k + STAGES * KV_BYTES), control(control) {}
    DEVICE void init() const {
        mbarrier_init(&control.q_full, 1), mbarrier_init(&control.q_empty, ARRIVALS), mbarrier_init(&control.landed, 1);
        for (int i = 0; i < STAGES; ++i) mbarrier_init(&control.full[i], 1), mbarrier_init(&control.empty[i], ARRIVALS);
    }
};

// The last block first. Where it has less keys than rows, the rows behind are made zeros.
template <int D>
DEVICE void produce_keys(const OfQueries<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k,
                         const CUtensorMap* v, const BackwardProblem& p) {
    using O = OfQueries<D>;
    constexpr int S = O::STAGES;
    auto& control = shared.control;
    const bool leader = threadIdx.x % WARP == 0;
    const AttentionTile& tile = control.coming.tile;
    int use = 0, partials = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        __syncwarp();
        if (leader) control.coming = take(p.of_queries);
        __syncwarp();
        int block = (tile.end + O::KEYS - 1) / O::KEYS - 1;
        const bool empty = block < 0, partial = !empty && tile.keys < (block + 1) * O::KEYS;
        const auto load_block = [&](uint64_t* barrier) {
            const int place = place_of_use<S>(use), kv_head = control.coming.head / p.group, token = tile.key + block * O::KEYS;
            mbarrier_wait(&control.empty[place], parity_of_use<S>(use) ^ 1);
            if (!leader) return;
            mbarrier_arrive_expect(barrier, 2 * O::KV_BYTES);
            load_tile<D, O::KEYS>(shared.k + place * O::KV_BYTES, k, barrier, kv_head, token);
            load_tile<D, O::KEYS>(shared.v + place * O::KV_BYTES, v, barrier, kv_head, token);
        };
        if (!empty) load_block(partial ? &control.landed : &control.full[place_of_use<S>(use)]);
        mbarrier_wait(&control.q_empty, (round & 1) ^ 1);
        if (leader) {
            control.item = control.coming;
            if (empty) {
                mbarrier_arrive(&control.q_full);
            } else {
                mbarrier_arrive_expect(&control.q_full, 2 * O::Q_BYTES);
                const int head = control.coming.head, token = tile.query + tile.row;
                load_tile<D, BACKWARD_TILE, BACKWARD_QUERIES>(shared.q, q, &control.q_full, head, token);
                load_tile<D, BACKWARD_TILE, BACKWARD_QUERIES>(shared.dout, dout, &control.q_full, head, token);
            }
        }
        if (tile.row < 0) return;
        if (partial) {
            const int place = place_of_use<S>(use), left = tile.keys - block * O::KEYS;
            mbarrier_wait(&control.landed, partials++ & 1);
            zero_rows<D, O::KEYS>(shared.k + place * O::KV_BYTES, left);
            zero_rows<D, O::KEYS>(shared.v + place * O::KV_BYTES, left);
            arrive_by_warp(&control.full[place]);
        }
        if (!empty) ++use;
#pragma unroll 1
        while (--block >= 0) load_block(&control.full[place_of_use<S>(use)]), ++use;
    }
}

// A consumer warpgroup: the gradients of its 64 queries. Uses of keys and values are counted from `before`.
template <int D>
DEVICE void consume_keys(const OfQueries<D>& shared, const BackwardProblem& p, int group, int before, int blocks) {
    using O = OfQueries<D>;
    constexpr int K = O::KEYS, S = O::STAGES;
    auto& control = shared.control;
    const AttentionTile& tile = control.item.tile;
    unsigned char *const q = shared.q + group * GROUP_ROWS * ROW_BYTES, *const dout = shared.dout + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS, end = before + blocks;
    // The only block with keys that some rows do not see; those behind it none of the rows sees.
    const int first = row >= tile.queries ? -1 : p.causal ? row / K : blocks - 1;
    int use = before;
#pragma unroll 1
    for (; use < end - 1 - first; ++use) {
        mbarrier_wait(&control.full[place_of_use<S>(use)], parity_of_use<S>(use));
        arrive_by_warp(&control.empty[place_of_use<S>(use)]);
    }
    if (first < 0) return;

    float s[K / 2], dp[K / 2], dq[D / 2], lse2[2], delta[2];
    uint32_t dscores[K / STEP_K][4];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int64_t from = control.item.head * p.stride + tile.query + row + own_row() + 8 * half;
        lse2[half] = p.lse2[from], delta[half] = p.delta[from];  // behind the sequence: anything
    }
    clear(dq);
    const int begun = use;
#pragma unroll 1
    for (; use < end; ++use) {
        const int place = place_of_use<S>(use);
        const unsigned char *const k = shared.k + place * O::KV_BYTES, *const v = shared.v + place * O::KV_BYTES;
        mbarrier_wait(&control.full[place], parity_of_use<S>(use));
        wgmma_fence();
        rows_times_rows<D, BACKWARD_TILE, K>(s, q, k);
        wgmma_commit();
        wgmma_wait<1>();  // the product before: its operand's registers are free
        if (use > begun) arrive_by_warp(&control.empty[place_of_use<S>(use - 1)]);
        wgmma_fence();
        rows_times_rows<D, BACKWARD_TILE, K>(dp, dout, v);
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
        weights_times_rows<D, K>(dq, dscores, k);
        wgmma_commit();
    }
    wgmma_wait<0>();
    wgmma_hold(dq);
    arrive_by_warp(&control.empty[place_of_use<S>(end - 1)]);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read the queries
    store_rows<D, BACKWARD_TILE>(row_at(p.dq, tile.query + row, control.item.head), p.dq.token_stride, tile.queries - row, dq,
                                 p.scale, p.scale, q);
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all_keys(const OfQueries<D>& shared, const BackwardProblem& p, int group) {
    const AttentionTile& tile = shared.control.item.tile;
    int before = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.control.q_full, round & 1);
        if (tile.row < 0) return;
        const int blocks = (tile.end + OfQueries<D>::KEYS - 1) / OfQueries<D>::KEYS;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS, count = min(GROUP_ROWS, tile.queries - first);
            poison_rows(row_at(p.dq, tile.query + first, shared.control.item.head), p.dq.token_stride, count, D);
        } else {
            consume_keys<D>(shared, p, group, before, blocks);
        }
        before += blocks;
        fence_async();  // the next queries come where the result went through
        arrive_by_warp(&shared.control.q_empty);
    }
}

}  // namespace

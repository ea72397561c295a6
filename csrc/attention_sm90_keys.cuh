// The half of attention's backward for Hopper that gives dK and dV: a block keeps a tile of keys and values, and all queries that
// see them pass. See attention_sm90_backward.cu.
#pragma once
#include "attention_sm90_backward.cuh"

namespace {

// Keys and values, and stages of queries and their gradients. Stages: one whose products may be under way, one that a group
// skips, one that it waits for.
template <int D>
struct OfKeys {
    static constexpr int QUERIES = BACKWARD_QUERIES, STAGES = 3;
    static constexpr int KV_BYTES = TILE_BYTES<D, BACKWARD_TILE>, Q_BYTES = TILE_BYTES<D, QUERIES>;
    static constexpr int BYTES = 2 * KV_BYTES + 2 * STAGES * Q_BYTES, ARRIVALS = 4 * BACKWARD_CONSUMERS;
    struct Control {
        Item item, coming;  // whose keys and values they are, and what the producer is at
        float lse2[STAGES][QUERIES], delta[STAGES][QUERIES];
        uint64_t kv_full, kv_empty, full[STAGES], empty[STAGES], landed;
    };

    unsigned char *k, *v, *q, *dout;
    Control& control;

    DEVICE OfKeys(unsigned char* tiles, Control& control)
        : k(tiles), v(k + KV_BYTES), q(v + KV_BYTES), dout(q + STAGES * Q_BYTES), control(control) {}
    DEVICE void init() const {
        mbarrier_init(&control.kv_full, 1), mbarrier_init(&control.kv_empty, ARRIVALS), mbarrier_init(&control.landed, 1);
        for (int i = 0; i < STAGES; ++i) mbarrier_init(&control.full[i], 2), mbarrier_init(&control.empty[i], ARRIVALS);
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

// Where a sequence ends within a block, rows behind are made zeros and their weights nothing.
template <int D>
DEVICE void produce_queries(const OfKeys<D>& shared, const CUtensorMap* q, const CUtensorMap* dout, const CUtensorMap* k,
                            const CUtensorMap* v, const BackwardProblem& p) {
    using O = OfKeys<D>;
    auto& control = shared.control;
    const int lane = threadIdx.x % WARP;
    int use = 0, partials = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        const AttentionTile& tile = control.coming.tile;
        __syncwarp();
        if (lane == 0) control.coming = take(p.of_keys);
        __syncwarp();
        Passage at(tile, O::QUERIES, p.group);
        const auto load_block = [&] {
            const int place = place_of_use<O::STAGES>(use), head = control.coming.head * p.group + at.head;
            const int first = tile.query + at.block * O::QUERIES, there = tile.queries - at.block * O::QUERIES;
            uint64_t* const barrier = there < O::QUERIES ? &control.landed : &control.full[place];
            mbarrier_wait(&control.empty[place], parity_of_use<O::STAGES>(use) ^ 1);
            if (lane == 0) {
                mbarrier_arrive_expect(barrier, 2 * O::Q_BYTES);
                load_tile<D, O::QUERIES>(shared.q + place * O::Q_BYTES, q, barrier, head, first);
                load_tile<D, O::QUERIES>(shared.dout + place * O::Q_BYTES, dout, barrier, head, first);
            }
            const int64_t from = head * p.stride + first;
            for (int i = lane; i < O::QUERIES; i += WARP) {
                control.lse2[place][i] = i < there ? p.lse2[from + i] : INFINITY;
                control.delta[place][i] = i < there ? p.delta[from + i] : 0;
            }
            arrive_by_warp(&control.full[place]);
            if (there < O::QUERIES) {
                mbarrier_wait(barrier, partials++ & 1);
                zero_rows<D, O::QUERIES>(shared.q + place * O::Q_BYTES, there);
                zero_rows<D, O::QUERIES>(shared.dout + place * O::Q_BYTES, there);
                arrive_by_warp(&control.full[place]);
            }
            at.next(), ++use;
        };
        const bool empty = !at.more();
        if (!empty) load_block();
        mbarrier_wait(&control.kv_empty, (round & 1) ^ 1);
        if (lane == 0) {
            const int kv_head = control.coming.head;
            control.item = control.coming;
            if (empty) {
                mbarrier_arrive(&control.kv_full);
            } else {
                mbarrier_arrive_expect(&control.kv_full, 2 * O::KV_BYTES);
                load_tile<D, BACKWARD_TILE>(shared.k, k, &control.kv_full, kv_head, tile.key + tile.row);
                load_tile<D, BACKWARD_TILE>(shared.v, v, &control.kv_full, kv_head, tile.key + tile.row);
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
    auto& control = shared.control;
    const AttentionTile& tile = shared.control.item.tile;
    unsigned char *const k = shared.k + group * GROUP_ROWS * ROW_BYTES, *const v = shared.v + group * GROUP_ROWS * ROW_BYTES;
    const int row = tile.row + group * GROUP_ROWS;
    if (row >= tile.keys) {
#pragma unroll 1
        for (Passage at(tile, Q, p.group); at.more(); at.next(), ++use) {
            mbarrier_wait(&control.full[place_of_use<S>(use)], parity_of_use<S>(use));
            arrive_by_warp(&control.empty[place_of_use<S>(use)]);
        }
        return use;
    }
    const int first = p.causal ? row / Q : 0;  // the first block that sees any of the keys
    float s[Q / 2], dp[Q / 2], dk[D / 2], dv[D / 2];
    uint32_t weights[Q / STEP_K][4], dscores[Q / STEP_K][4];

    clear(dk), clear(dv);
    int before = -1;  // the use whose products for dV and dK may be under way
#pragma unroll 1
    for (Passage at(tile, Q, p.group); at.more(); at.next(), ++use) {
        const int place = place_of_use<S>(use);
        mbarrier_wait(&control.full[place], parity_of_use<S>(use));
        if (at.block < first) {
            arrive_by_warp(&control.empty[place]);
            continue;
        }
        wgmma_fence();
        rows_times_rows<D, BACKWARD_TILE, Q>(s, k, shared.q + place * O::Q_BYTES);
        wgmma_commit();
        wgmma_wait<1>();  // the products before: their operands' registers are free
        if (before >= 0) arrive_by_warp(&control.empty[place_of_use<S>(before)]);
        wgmma_fence();
        rows_times_rows<D, BACKWARD_TILE, Q>(dp, v, shared.dout + place * O::Q_BYTES);
        wgmma_commit();
        float2 stats[Q / 8];  // of the thread's columns
        own_columns<Q>(stats, control.lse2[place]);
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
        weights_times_rows<D, Q>(dv, weights, shared.dout + place * O::Q_BYTES);
        wgmma_commit();
        own_columns<Q>(stats, control.delta[place]);
        wgmma_wait<1>();
        wgmma_hold(dp);
#pragma unroll
        for (int i = 0; i < Q / 2; ++i) s[i] *= dp[i] - (i % 2 ? stats[i / 4].y : stats[i / 4].x);
        to_weights<Q>(dscores, s);
        wgmma_fence();
        weights_times_rows<D, Q>(dk, dscores, shared.q + place * O::Q_BYTES);
        wgmma_commit();
        before = use;
    }
    wgmma_wait<0>();
    wgmma_hold(dk), wgmma_hold(dv);
    arrive_by_warp(&control.empty[place_of_use<S>(before)]);
    bar_sync(1 + group, GROUP);  // the products of all four warps have read keys and values
    const int left = tile.keys - row, kv_head = shared.control.item.head;
    store_rows<D, BACKWARD_TILE>(row_at(p.dv, tile.key + row, kv_head), p.dv.token_stride, left, dv, 1, 1, v);
    store_rows<D, BACKWARD_TILE>(row_at(p.dk, tile.key + row, kv_head), p.dk.token_stride, left, dk, p.scale, p.scale, k);
    return use;
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all_queries(const OfKeys<D>& shared, const BackwardProblem& p, int group) {
    const AttentionTile& tile = shared.control.item.tile;
    int use = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.control.kv_full, round & 1);
        if (tile.row < 0) return;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS, count = min(GROUP_ROWS, tile.keys - first);
            const int kv_head = shared.control.item.head;
            poison_rows(row_at(p.dk, tile.key + first, kv_head), p.dk.token_stride, count, D);
            poison_rows(row_at(p.dv, tile.key + first, kv_head), p.dv.token_stride, count, D);
        } else {
            use = consume_queries<D>(shared, p, group, use);
        }
        fence_async();  // the next keys and values come where the result went through
        arrive_by_warp(&shared.control.kv_empty);
    }
}

}  // namespace

// Attention's forward kernel for Hopper, bf16. A tile of queries stays in shared memory; keys and values come by the copy engine,
// the last block of the sequence first, so that only a warpgroup's first block needs a mask. Scores of one block are computed
// while the values of the block before are added, and warpgroups take turns to issue products, so that one's exponentials
// run under another's products. A block takes one item of work after the other, and loads the next while it computes.
// Source: FlashAttention-3, arXiv 2407.08608, algorithm 2; rescaling only when the largest score has grown by a lot, and some
// exponentials by polynomials: FlashAttention-4. A map's tiles have as many keys as queries here.
#include "attention_sm90.cuh"

#include <algorithm>

namespace {

template <int D>
struct Forward {
    static constexpr int CONSUMERS = D == 64 ? 3 : 2, QUERIES = CONSUMERS * GROUP_ROWS, KEYS = 128, STAGES = D == 64 ? 4 : 3;
    static constexpr int THREADS = (CONSUMERS + 1) * GROUP;
    static constexpr int PRODUCER_REGISTERS = D == 64 ? 32 : 40, CONSUMER_REGISTERS = D == 64 ? 160 : 232;
    // Which of 16 exponentials are polynomials: with D = 64 the unit for them is as busy as the one for products, but so is
    // soon the one that issues instructions.
    static constexpr unsigned POLYNOMIALS = D == 64 ? 0x8020 : 0;
    static constexpr float GROWTH = 8;  // of the largest score, in base 2, that weights and sums take without rescaling
    static constexpr int Q_BYTES = TILE_BYTES<D, QUERIES>, KV_BYTES = TILE_BYTES<D, KEYS>;
    struct Control {
        Item item, coming;  // whose queries are in shared memory, and what the producer is at
        uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], landed;
    };
    static constexpr int SHARED = Q_BYTES + 2 * STAGES * KV_BYTES + sizeof(Control);
};

struct ForwardProblem {
    Items items;
    Rows out;
    double* lse;
    int heads, group;
    bool causal;
    float scale2;  // of exponents in base 2
};

template <int D>
struct ForwardShared {
    using F = Forward<D>;
    unsigned char *q, *k, *v;
    typename F::Control& control;

    DEVICE explicit ForwardShared(unsigned char* memory)
        : q(memory), k(q + F::Q_BYTES), v(k + F::STAGES * F::KV_BYTES),
          control(*reinterpret_cast<typename F::Control*>(v + F::STAGES * F::KV_BYTES)) {}
};

// 2^x for x <= about 0, on the units for sums and products, to 3e-6: the whole part goes into the exponent.
DEVICE float exp2_by_polynomial(float x) {
    x = fmaxf(x, -125.f);
    const float whole = x + 12582912.f;  // 1.5 * 2^23: the whole part is in the lowest bits
    const float f = x - (whole - 12582912.f);
    float y = fmaf(9.57053114e-3f, f, 5.59186622e-2f);
    y = fmaf(y, f, 2.40247356e-1f);
    y = fmaf(y, f, 6.93121646e-1f);
    y = fmaf(y, f, 9.99999263e-1f);
    return __uint_as_float(__float_as_uint(y) + (__float_as_uint(whole) << 23));
}

// The running softmax of this thread's two rows.
template <int D>
struct Softmax {
    using F = Forward<D>;
    float scale2, maximum[2], shift[2], total[2];  // shift: the maximum, or one not much smaller, times scale2

    DEVICE explicit Softmax(float scale) : scale2(scale) {
        maximum[0] = maximum[1] = -INFINITY;
        shift[0] = shift[1] = total[0] = total[1] = 0;
    }

    // Scores become weights; rescale: by what earlier sums must be multiplied. FIRST: there are none, and scores may be hidden.
    template <bool FIRST>
    DEVICE void weigh(float (&s)[F::KEYS / 2], float (&rescale)[2]) {
        float largest[4] = {s[0], s[2], s[1], s[3]};  // two of each row: one after the other they would take longer
#pragma unroll
        for (int i = 4; i < F::KEYS / 2; ++i) largest[half_of(i) + i % 2 * 2] = max_nan(largest[half_of(i) + i % 2 * 2], s[i]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            float x = max_nan(largest[half], largest[half + 2]);
            x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 1));
            x = max_nan(x, __shfl_xor_sync(0xffffffffu, x, 2));
            const bool keep = !FIRST && (x - maximum[half]) * scale2 <= F::GROWTH;  // a NaN goes on
            rescale[half] = FIRST ? 0 : keep ? 1 : ex2((maximum[half] - x) * scale2);
            maximum[half] = keep ? maximum[half] : x;
            shift[half] = FIRST && maximum[half] == -INFINITY ? 0 : maximum[half] * scale2;
            total[half] *= rescale[half];
        }
        float sum[2] = {0, 0};
#pragma unroll
        for (int i = 0; i < F::KEYS / 2; ++i) {
            const float x = fmaf(s[i], scale2, -shift[half_of(i)]);
            s[i] = !FIRST && (F::POLYNOMIALS >> i % 16 & 1) ? exp2_by_polynomial(x) : ex2(x);
            sum[half_of(i)] += s[i];
        }
        total[0] += sum[0], total[1] += sum[1];
    }
    DEVICE double log_of_sum(int half) const {
        return (static_cast<double>(shift[half]) + static_cast<double>(lg2(total[half]))) * 0.69314718055994530942;
    }
    DEVICE void finish() {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 1);
            total[half] += __shfl_xor_sync(0xffffffffu, total[half], 2);
        }
    }
};

// The producer's warp: for each item keys and values of its blocks in the order in which they are used and, when the consumers
// are done with those before, its queries. Where the last block has less keys than rows, the rows behind, which are another
// sequence's, are made zeros in the values; in the keys their scores are hidden.
template <int D>
DEVICE void produce(const ForwardShared<D>& shared, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v,
                    const ForwardProblem& p) {
    using F = Forward<D>;
    constexpr int S = F::STAGES;
    auto& control = shared.control;
    const bool leader = threadIdx.x % WARP == 0;
    const AttentionTile& tile = control.coming.tile;
    int use = 0, partials = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        __syncwarp();
        if (leader) control.coming = take(p.items);
        __syncwarp();
        int block = (tile.end + F::KEYS - 1) / F::KEYS - 1;
        const bool empty = block < 0, partial = !empty && tile.keys < (block + 1) * F::KEYS;
        const auto load_block = [&](uint64_t* v_full) {
            const int place = place_of_use<S>(use), kv_head = control.coming.head / p.group, token = tile.key + block * F::KEYS;
            mbarrier_wait(&control.k_empty[place], parity_of_use<S>(use) ^ 1);
            if (leader) {
                mbarrier_arrive_expect(&control.k_full[place], F::KV_BYTES);
                load_tile<D, F::KEYS>(shared.k + place * F::KV_BYTES, k, &control.k_full[place], kv_head, token);
            }
            mbarrier_wait(&control.v_empty[place], parity_of_use<S>(use) ^ 1);
            if (leader) {
                mbarrier_arrive_expect(v_full, F::KV_BYTES);
                load_tile<D, F::KEYS>(shared.v + place * F::KV_BYTES, v, v_full, kv_head, token);
            }
        };
        if (!empty) load_block(partial ? &control.landed : &control.v_full[place_of_use<S>(use)]);
        mbarrier_wait(&control.q_empty, (round & 1) ^ 1);
        if (leader) {
            control.item = control.coming;
            if (empty) {
                mbarrier_arrive(&control.q_full);
            } else {
                mbarrier_arrive_expect(&control.q_full, F::Q_BYTES);
                load_tile<D, F::QUERIES>(shared.q, q, &control.q_full, control.coming.head, tile.query + tile.row);
            }
        }
        if (tile.row < 0) return;
        if (partial) {
            const int place = place_of_use<S>(use);
            mbarrier_wait(&control.landed, partials++ & 1);
            zero_rows<D, F::KEYS>(shared.v + place * F::KV_BYTES, tile.keys - block * F::KEYS);
            arrive_by_warp(&control.v_full[place]);
        }
        if (!empty) ++use;
#pragma unroll 1
        while (--block >= 0) load_block(&control.v_full[place_of_use<S>(use)]), ++use;
    }
}

// Turns of the consumer groups at issuing products: one for each block of an item but the first.
DEVICE void await_turn(int group) { bar_sync(1 + group, 2 * GROUP); }
DEVICE void pass_turn(int group, int groups) { bar_arrive(1 + (group + 1 < groups ? group + 1 : 0), 2 * GROUP); }

// The group's rows of the result, from what the blocks gave.
template <int D>
DEVICE void finish(const ForwardShared<D>& shared, const ForwardProblem& p, const Softmax<D>& softmax, const float (&o)[D / 2],
                   int group) {
    using F = Forward<D>;
    const AttentionTile& tile = shared.control.item.tile;
    const int row = tile.row + group * GROUP_ROWS, left = tile.queries - row, head = shared.control.item.head;
    if (threadIdx.x % 4 == 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (own_row() + 8 * half < left)
                p.lse[static_cast<int64_t>(tile.query + row + own_row() + 8 * half) * p.heads + head] = softmax.log_of_sum(half);
    bar_sync(4 + group, GROUP);  // the products of all four warps have read the queries
    store_rows<D, F::QUERIES>(row_at(p.out, tile.query + row, head), p.out.token_stride, left, o, __fdividef(1.f, softmax.total[0]),
                              __fdividef(1.f, softmax.total[1]), shared.q + group * GROUP_ROWS * ROW_BYTES);
}

// A consumer warpgroup: its 64 rows of an item. Uses of keys and values are counted from `before`.
template <int D>
DEVICE void consume(const ForwardShared<D>& shared, const ForwardProblem& p, int group, int before, int blocks) {
    using F = Forward<D>;
    constexpr int S = F::STAGES;
    auto& control = shared.control;
    unsigned char* const q = shared.q + group * GROUP_ROWS * ROW_BYTES;
    const AttentionTile& tile = shared.control.item.tile;
    const int row = tile.row + group * GROUP_ROWS, end = before + blocks;
    // The only block with keys that some rows do not see; those behind it none of the rows sees.
    const int first = row >= tile.queries ? -1 : p.causal ? row / F::KEYS : blocks - 1;

    int use = before;
#pragma unroll 1
    for (; use < end - 1 - first; ++use) {
        const int place = place_of_use<S>(use);
        mbarrier_wait(&control.k_full[place], parity_of_use<S>(use));
        arrive_by_warp(&control.k_empty[place]);
        mbarrier_wait(&control.v_full[place], parity_of_use<S>(use));
        arrive_by_warp(&control.v_empty[place]);
        if (use < end - 1) await_turn(group), pass_turn(group, F::CONSUMERS);
    }
    if (first < 0) return;

    float s[F::KEYS / 2], o[D / 2], rescale[2];
    uint32_t weights[F::KEYS / STEP_K][4];
    Softmax<D> softmax(p.scale2);
    clear(o);
    mbarrier_wait(&control.k_full[place_of_use<S>(use)], parity_of_use<S>(use));
    wgmma_fence();
    rows_times_rows<D, F::QUERIES, F::KEYS>(s, q, shared.k + place_of_use<S>(use) * F::KV_BYTES);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(s);
    arrive_by_warp(&control.k_empty[place_of_use<S>(use)]);
    {
        const int lane_first = first * F::KEYS + 2 * static_cast<int>(threadIdx.x % 4), there = tile.keys - lane_first;
        const int seen = p.causal ? min(there, row + own_row() + 1 - lane_first) : there;
        const int seen_below = p.causal ? min(there, row + own_row() + 9 - lane_first) : there;
#pragma unroll
        for (int i = 0; i < F::KEYS / 2; ++i)
            s[i] = column_of(i) < (half_of(i) ? seen_below : seen) ? s[i] : -INFINITY;
    }
    softmax.template weigh<true>(s, rescale);
    to_weights<F::KEYS>(weights, s);

#pragma unroll 1
    for (; use < end - 1; ++use) {
        const int k_place = place_of_use<S>(use + 1), v_place = place_of_use<S>(use);
        mbarrier_wait(&control.k_full[k_place], parity_of_use<S>(use + 1));
        await_turn(group);
        wgmma_hold(o), wgmma_fence();
        rows_times_rows<D, F::QUERIES, F::KEYS>(s, q, shared.k + k_place * F::KV_BYTES);
        wgmma_commit();
        mbarrier_wait(&control.v_full[v_place], parity_of_use<S>(use));
        wgmma_fence();
        weights_times_rows<D, F::KEYS>(o, weights, shared.v + v_place * F::KV_BYTES);
        wgmma_commit();
        pass_turn(group, F::CONSUMERS);
        wgmma_wait<1>();
        wgmma_hold(s);
        arrive_by_warp(&control.k_empty[k_place]);
        softmax.template weigh<false>(s, rescale);
        wgmma_wait<0>();
        wgmma_hold(o);
        arrive_by_warp(&control.v_empty[v_place]);
        to_weights<F::KEYS>(weights, s);
        if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1))
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= rescale[half_of(i)];
    }
    mbarrier_wait(&control.v_full[place_of_use<S>(use)], parity_of_use<S>(use));
    wgmma_hold(o), wgmma_fence();
    weights_times_rows<D, F::KEYS>(o, weights, shared.v + place_of_use<S>(use) * F::KV_BYTES);
    wgmma_commit();
    softmax.finish();
    wgmma_wait<0>();
    wgmma_hold(o);
    arrive_by_warp(&control.v_empty[place_of_use<S>(use)]);
    finish<D>(shared, p, softmax, o, group);
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all(const ForwardShared<D>& shared, const ForwardProblem& p, int group) {
    using F = Forward<D>;
    const AttentionTile& tile = shared.control.item.tile;
    if (group == F::CONSUMERS - 1) pass_turn(group, F::CONSUMERS);
    int before = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.control.q_full, round & 1);
        if (tile.row < 0) break;
        const int blocks = (tile.end + F::KEYS - 1) / F::KEYS;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS, count = min(GROUP_ROWS, tile.queries - first);
            const int head = shared.control.item.head;
            poison_rows(row_at(p.out, tile.query + first, head), p.out.token_stride, count, D);
            for (int i = threadIdx.x % GROUP; i < count; i += GROUP)
                p.lse[static_cast<int64_t>(tile.query + first + i) * p.heads + head] = NAN;
        } else {
            consume<D>(shared, p, group, before, blocks);
        }
        before += blocks;
        fence_async();  // the next queries come where the result went through
        arrive_by_warp(&shared.control.q_empty);
    }
    if (group == 0) await_turn(group);  // what the last group has passed
}

template <int D>
__global__ void __launch_bounds__(Forward<D>::THREADS, 1)
attention_forward_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                              const __grid_constant__ CUtensorMap v, const __grid_constant__ ForwardProblem p) {
    using F = Forward<D>;
    const ForwardShared<D> shared(shared_memory());
    auto& control = shared.control;
    const int group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&control.q_full, 1), mbarrier_init(&control.landed, 1), mbarrier_init(&control.q_empty, 4 * F::CONSUMERS);
        for (int i = 0; i < F::STAGES; ++i) {
            mbarrier_init(&control.k_full[i], 1), mbarrier_init(&control.v_full[i], 1);
            mbarrier_init(&control.k_empty[i], 4 * F::CONSUMERS), mbarrier_init(&control.v_empty[i], 4 * F::CONSUMERS);
        }
        mbarrier_init_fence();
        tma_prefetch(&q), tma_prefetch(&k), tma_prefetch(&v);
    }
    __syncthreads();
    if (group == 0) {
        registers_down<F::PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce<D>(shared, &q, &k, &v, p);
    } else {
        registers_up<F::CONSUMER_REGISTERS>();
        consume_all<D>(shared, p, group - 1);
    }
}

template <int D>
void forward(const AttentionProblem& p, int64_t tokens, const TileMap& queries, cudaStream_t stream) {
    using F = Forward<D>;
    const ForwardProblem problem{items_of(queries, p.heads), p.out, p.lse, static_cast<int>(p.heads),
                                 static_cast<int>(p.heads / p.kv_heads), p.causal, p.scale * LOG2E};
    launch(attention_forward_sm90_kernel<D>, dim3(std::min(problem.items.count, sm90::multiprocessors())), dim3(F::THREADS),
           F::SHARED, stream, "attention", sm90::tensor_map(p.q, tokens, p.heads, D, F::QUERIES),
           sm90::tensor_map(p.k, tokens, p.kv_heads, D, F::KEYS), sm90::tensor_map(p.v, tokens, p.kv_heads, D, F::KEYS), problem);
}

}  // namespace

namespace gpu {

TileRows tile_rows_sm90(const AttentionProblem& p) {
    return {p.head_dim == 64 ? Forward<64>::QUERIES : Forward<128>::QUERIES, 128, 128};
}

void attention_forward_sm90(const AttentionProblem& p, int64_t tokens, const TileMap& queries, cudaStream_t stream) {
    (p.head_dim == 64 ? forward<64> : forward<128>)(p, tokens, queries, stream);
}

}  // namespace gpu

// Attention's forward kernel for Hopper, bf16. A tile of queries stays in shared memory; keys and values come by the copy engine,
// the last block of the sequence first, so that only a warpgroup's first block needs a mask. Scores of one block are computed
// while the values of the block before are added, and warpgroups take turns to issue products, so that one's exponentials
// run under another's products. A block takes one item of work after the other, and loads the next while it computes. Source: FlashAttention-3, arXiv 2407.08608, algorithm 2; rescaling only when the largest score
// has grown by a lot, and some exponentials by polynomials: FlashAttention-4.
// A map's tiles have as many keys as queries here.
#include "attention_sm90.cuh"

#include <cudaTypedefs.h>

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
    struct Barriers {
        uint64_t q_full, q_empty, k_full[STAGES], k_empty[STAGES], v_full[STAGES], v_empty[STAGES], landed;
    };
    static constexpr int SHARED = Q_BYTES + 2 * STAGES * KV_BYTES + sizeof(Item) + sizeof(Barriers);
};

struct ForwardProblem {
    const AttentionTile* tiles;
    int32_t* taken;  // items of work beside each block's first one
    Rows out;
    double* lse;
    int items, heads, group;  // items: a tile's heads, then the next one's; all heads of a tile read the same memory at about one time
    bool causal;
    float scale2;  // of exponents in base 2
};

template <int D>
struct ForwardShared {
    using F = Forward<D>;
    unsigned char *q, *k, *v;
    Item* item;  // whose queries they are
    typename F::Barriers* barriers;

    DEVICE ForwardShared() {
        q = shared_memory(), k = q + F::Q_BYTES, v = k + F::STAGES * F::KV_BYTES;
        item = reinterpret_cast<Item*>(v + F::STAGES * F::KV_BYTES);
        barriers = reinterpret_cast<typename F::Barriers*>(item + 1);
    }
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

    // Scores become weights; rescale: by what earlier sums must be multiplied. FIRST: there are none, and scores may be -infinity.
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
DEVICE void produce(const ForwardShared<D>& shared, const CUtensorMap* q, const CUtensorMap* k, const CUtensorMap* v, const ForwardProblem& p) {
    using F = Forward<D>;
    constexpr int S = F::STAGES;
    auto& barriers = *shared.barriers;
    const bool leader = threadIdx.x % WARP == 0;
    int use = 0, partials = 0, index = blockIdx.x;
#pragma unroll 1
    for (int round = 0;; ++round) {
        const AttentionTile* const tile = p.tiles + index / p.heads;
        const int row = index < p.items ? tile->row : -1, blocks = row < 0 ? 0 : (tile->end + F::KEYS - 1) / F::KEYS;
        const int head = index % p.heads, end = use + blocks;
        const int left = blocks ? tile->keys - (blocks - 1) * F::KEYS : F::KEYS;  // of the keys from the last block's first on
        int token = blocks ? tile->key + (blocks - 1) * F::KEYS : 0;
        const auto load_block = [&](uint64_t* v_full) {
            const int place = place_of_use<S>(use);
            mbarrier_wait(&barriers.k_empty[place], parity_of_use<S>(use) ^ 1);
            if (leader) {
                mbarrier_arrive_expect(&barriers.k_full[place], F::KV_BYTES);
                load_tile<D, F::KEYS>(shared.k + place * F::KV_BYTES, k, &barriers.k_full[place], head / p.group, token);
            }
            mbarrier_wait(&barriers.v_empty[place], parity_of_use<S>(use) ^ 1);
            if (leader) {
                mbarrier_arrive_expect(v_full, F::KV_BYTES);
                load_tile<D, F::KEYS>(shared.v + place * F::KV_BYTES, v, v_full, head / p.group, token);
            }
        };
        const bool partial = left < F::KEYS;
        if (blocks) load_block(partial ? &barriers.landed : &barriers.v_full[place_of_use<S>(use)]);
        mbarrier_wait(&barriers.q_empty, (round & 1) ^ 1);
        if (leader) {
            if (row < 0) shared.item->tile.row = -1;
            else *shared.item = {*tile, head};
            if (blocks) {
                mbarrier_arrive_expect(&barriers.q_full, F::Q_BYTES);
                load_tile<D, F::QUERIES>(shared.q, q, &barriers.q_full, head, tile->query + row);
            } else {
                mbarrier_arrive(&barriers.q_full);
            }
            index = gridDim.x + atomicAdd(p.taken, 1);
        }
        if (row < 0) return;
        if (partial) {
            mbarrier_wait(&barriers.landed, partials++ & 1);
            zero_rows<D, F::KEYS>(shared.v + place_of_use<S>(use) * F::KV_BYTES, left);
            arrive_by_warp(&barriers.v_full[place_of_use<S>(use)]);
        }
#pragma unroll 1
        for (++use, token -= F::KEYS; use < end; ++use, token -= F::KEYS) load_block(&barriers.v_full[place_of_use<S>(use)]);
        use = end;
        index = __shfl_sync(0xffffffffu, index, 0);
    }
}

// Turns of the consumer groups at issuing products: one for each block of an item but the first.
template <int CONSUMERS>
DEVICE void await_turn(int group) {
    bar_sync(1 + group, 2 * GROUP);
}
template <int CONSUMERS>
DEVICE void pass_turn(int group) {
    bar_arrive(1 + (group + 1 < CONSUMERS ? group + 1 : 0), 2 * GROUP);
}

// The group's rows of the result, from what the blocks gave.
template <int D>
DEVICE void finish(const ForwardShared<D>& shared, const ForwardProblem& p, const Softmax<D>& softmax, const float (&o)[D / 2], int group) {
    using F = Forward<D>;
    const AttentionTile& tile = shared.item->tile;
    const int row = tile.row + group * GROUP_ROWS, left = tile.queries - row, head = shared.item->head;
    if (threadIdx.x % 4 == 0)
#pragma unroll
        for (int half = 0; half < 2; ++half)
            if (own_row() + 8 * half < left)
                p.lse[static_cast<int64_t>(tile.query + row + own_row() + 8 * half) * p.heads + head] =
                    (static_cast<double>(softmax.shift[half]) + static_cast<double>(lg2(softmax.total[half]))) * 0.69314718055994530942;
    bar_sync(4 + group, GROUP);  // the products of all four warps have read the queries
    store_rows<D, F::QUERIES>(row_at(p.out, tile.query + row, head), p.out.token_stride, left, o, __fdividef(1.f, softmax.total[0]),
                              __fdividef(1.f, softmax.total[1]), shared.q + group * GROUP_ROWS * ROW_BYTES);
}

// A consumer warpgroup: its 64 rows of an item. Uses of keys and values are counted from `before`.
template <int D>
DEVICE void consume(const ForwardShared<D>& shared, const ForwardProblem& p, int group, int before, int blocks) {
    using F = Forward<D>;
    constexpr int S = F::STAGES;
    auto& barriers = *shared.barriers;
    unsigned char* const q = shared.q + group * GROUP_ROWS * ROW_BYTES;
    const AttentionTile& tile = shared.item->tile;
    const int row = tile.row + group * GROUP_ROWS, end = before + blocks;
    // The only block with keys that some rows do not see; those behind it none of the rows sees.
    const int first = row >= tile.queries ? -1 : p.causal ? row / F::KEYS : blocks - 1;

    int use = before;
#pragma unroll 1
    for (; use < end - 1 - first; ++use) {
        const int place = place_of_use<S>(use);
        mbarrier_wait(&barriers.k_full[place], parity_of_use<S>(use));
        arrive_by_warp(&barriers.k_empty[place]);
        mbarrier_wait(&barriers.v_full[place], parity_of_use<S>(use));
        arrive_by_warp(&barriers.v_empty[place]);
        if (use < end - 1) await_turn<F::CONSUMERS>(group), pass_turn<F::CONSUMERS>(group);
    }
    if (first < 0) return;

    float s[F::KEYS / 2], o[D / 2], rescale[2];
    uint32_t weights[F::KEYS / STEP_K][4];
    Softmax<D> softmax(p.scale2);
    clear(o);
    mbarrier_wait(&barriers.k_full[place_of_use<S>(use)], parity_of_use<S>(use));
    wgmma_fence();
    rows_times_rows<D, F::QUERIES, F::KEYS>(s, q, shared.k + place_of_use<S>(use) * F::KV_BYTES);
    wgmma_commit();
    wgmma_wait<0>();
    wgmma_hold(s);
    arrive_by_warp(&barriers.k_empty[place_of_use<S>(use)]);
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
        mbarrier_wait(&barriers.k_full[k_place], parity_of_use<S>(use + 1));
        await_turn<F::CONSUMERS>(group);
        wgmma_hold(o), wgmma_fence();
        rows_times_rows<D, F::QUERIES, F::KEYS>(s, q, shared.k + k_place * F::KV_BYTES);
        wgmma_commit();
        mbarrier_wait(&barriers.v_full[v_place], parity_of_use<S>(use));
        wgmma_fence();
        weights_times_rows<D, F::KEYS>(o, weights, shared.v + v_place * F::KV_BYTES);
        wgmma_commit();
        pass_turn<F::CONSUMERS>(group);
        wgmma_wait<1>();
        wgmma_hold(s);
        arrive_by_warp(&barriers.k_empty[k_place]);
        softmax.template weigh<false>(s, rescale);
        wgmma_wait<0>();
        wgmma_hold(o);
        arrive_by_warp(&barriers.v_empty[v_place]);
        to_weights<F::KEYS>(weights, s);
        if (__any_sync(0xffffffffu, rescale[0] != 1 || rescale[1] != 1))
#pragma unroll
            for (int i = 0; i < D / 2; ++i) o[i] *= rescale[half_of(i)];
    }
    mbarrier_wait(&barriers.v_full[place_of_use<S>(use)], parity_of_use<S>(use));
    wgmma_hold(o), wgmma_fence();
    weights_times_rows<D, F::KEYS>(o, weights, shared.v + place_of_use<S>(use) * F::KV_BYTES);
    wgmma_commit();
    softmax.finish();
    wgmma_wait<0>();
    wgmma_hold(o);
    arrive_by_warp(&barriers.v_empty[place_of_use<S>(use)]);
    finish<D>(shared, p, softmax, o, group);
}

// Items one after the other, until there are no more.
template <int D>
DEVICE void consume_all(const ForwardShared<D>& shared, const ForwardProblem& p, int group) {
    using F = Forward<D>;
    const AttentionTile& tile = shared.item->tile;
    if (group == F::CONSUMERS - 1) pass_turn<F::CONSUMERS>(group);
    int before = 0;
#pragma unroll 1
    for (int round = 0;; ++round) {
        mbarrier_wait(&shared.barriers->q_full, round & 1);
        if (tile.row < 0) break;
        const int blocks = (tile.end + F::KEYS - 1) / F::KEYS;
        if (tile.poisoned) {
            const int first = tile.row + group * GROUP_ROWS, count = min(GROUP_ROWS, tile.queries - first), head = shared.item->head;
            poison_rows(row_at(p.out, tile.query + first, head), p.out.token_stride, count, D);
            for (int i = threadIdx.x % GROUP; i < count; i += GROUP)
                p.lse[static_cast<int64_t>(tile.query + first + i) * p.heads + head] = NAN;
        } else {
            consume<D>(shared, p, group, before, blocks);
        }
        before += blocks;
        fence_async();  // the next queries come where the result went through
        arrive_by_warp(&shared.barriers->q_empty);
    }
    if (group == 0) await_turn<F::CONSUMERS>(group);  // what the last group has passed
}

template <int D>
__global__ void __launch_bounds__(Forward<D>::THREADS, 1)
attention_forward_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                              const __grid_constant__ CUtensorMap v, const __grid_constant__ ForwardProblem p) {
    using F = Forward<D>;
    const ForwardShared<D> shared;
    auto& barriers = *shared.barriers;
    const int group = own_group();
    if (threadIdx.x == 0) {
        mbarrier_init(&barriers.q_full, 1), mbarrier_init(&barriers.landed, 1), mbarrier_init(&barriers.q_empty, 4 * F::CONSUMERS);
        for (int i = 0; i < F::STAGES; ++i) {
            mbarrier_init(&barriers.k_full[i], 1), mbarrier_init(&barriers.v_full[i], 1);
            mbarrier_init(&barriers.k_empty[i], 4 * F::CONSUMERS), mbarrier_init(&barriers.v_empty[i], 4 * F::CONSUMERS);
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

bool suits(const Rows& rows, int64_t heads) {
    constexpr int64_t LIMIT = int64_t{1} << 39;  // the copy engine's, in bytes 2^40
    const auto stride = [&](int64_t elements) { return elements > 0 && elements % 8 == 0 && elements < LIMIT; };
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride(rows.token_stride) && (heads == 1 || stride(rows.head_stride));
}

PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "attention");
    if (result != cudaDriverEntryPointSuccess || !function) throw std::runtime_error("attention: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap sm90::tensor_map(const Rows& from, int64_t tokens, int64_t heads, int64_t head_dim, int rows) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
    CUtensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(heads == 1 ? head_dim : from.head_stride) * 2,
                                  static_cast<cuuint64_t>(from.token_stride) * 2};
    const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, from.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        throw std::runtime_error("attention: no tensor map for these strides");
    return map;
}

int sm90::multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "attention");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "attention");
    return count;
}

namespace gpu {

bool attention_sm90_takes(const AttentionProblem& p) {
    bool takes = p.dtype && !p.wide && (p.head_dim == 64 || p.head_dim == 128) && p.scale > 0 && p.scale < INFINITY;
    takes = takes && suits(p.q, p.heads) && suits(p.k, p.kv_heads) && suits(p.v, p.kv_heads) && suits(p.out, p.heads);
    if (p.dout.data)
        takes = takes && suits(p.dout, p.heads) && suits(p.dq, p.heads) && suits(p.dk, p.kv_heads) && suits(p.dv, p.kv_heads);
    return takes;
}

void attention_forward_sm90(const AttentionProblem& p, int64_t tokens, const TileMap& queries, cudaStream_t stream) {
    const auto run = [&](auto kernel, int rows, int keys, int threads, int shared) {
        const CUtensorMap q = sm90::tensor_map(p.q, tokens, p.heads, p.head_dim, rows);
        const CUtensorMap k = sm90::tensor_map(p.k, tokens, p.kv_heads, p.head_dim, keys);
        const CUtensorMap v = sm90::tensor_map(p.v, tokens, p.kv_heads, p.head_dim, keys);
        const int64_t items = queries.capacity * p.heads;
        const ForwardProblem problem{queries.tiles, queries.counters, p.out, p.lse, static_cast<int>(items), static_cast<int>(p.heads),
                                     static_cast<int>(p.heads / p.kv_heads), p.causal, p.scale * LOG2E};
        launch(kernel, dim3(static_cast<unsigned>(std::min<int64_t>(items, sm90::multiprocessors()))), dim3(threads), shared, stream,
               "attention", q, k, v, problem);
    };
    const auto of = [&](auto shape, auto kernel) { run(kernel, shape.QUERIES, shape.KEYS, shape.THREADS, shape.SHARED); };
    p.head_dim == 64 ? of(Forward<64>(), attention_forward_sm90_kernel<64>) : of(Forward<128>(), attention_forward_sm90_kernel<128>);
}

TileRows tile_rows_sm90(const AttentionProblem& p) {
    return {p.head_dim == 64 ? Forward<64>::QUERIES : Forward<128>::QUERIES, 128, 128};
}

}  // namespace gpu

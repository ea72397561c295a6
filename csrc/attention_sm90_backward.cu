// Attention's backward for Hopper, bf16, without atomics on what is added, so that the gradient is the same on every run. Weights
// are computed again from the scores and the logarithms of their sums, twice: for dK and dV a block keeps keys and values and
// takes all queries past them, of all heads that share the keys (attention_sm90_keys.cuh); for dQ it keeps queries and takes the
// keys past them (attention_sm90_queries.cuh): seven products in all instead of five. Blocks take items of work of the first kind
// until there are none, then of the second, so that none waits for the last of a kind.
// Source: FlashAttention-2, arXiv 2307.08691, algorithm 2. A map's tiles have as many keys as queries here.
#include <algorithm>

#include "attention_sm90_keys.cuh"
#include "attention_sm90_queries.cuh"

namespace {

template <int D>
struct Backward {
    static constexpr int THREADS = (BACKWARD_CONSUMERS + 1) * GROUP, PRODUCER_REGISTERS = 24, CONSUMER_REGISTERS = 240;
    static constexpr int TILES = OfKeys<D>::BYTES > OfQueries<D>::BYTES ? OfKeys<D>::BYTES : OfQueries<D>::BYTES;
    struct Controls {
        typename OfKeys<D>::Control of_keys;
        typename OfQueries<D>::Control of_queries;
    };
    static constexpr int SHARED = TILES + sizeof(Controls);
};

template <int D>
__global__ void __launch_bounds__(Backward<D>::THREADS, 1)
attention_backward_sm90_kernel(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap dout,
                               const __grid_constant__ CUtensorMap k, const __grid_constant__ CUtensorMap v,
                               const __grid_constant__ BackwardProblem p) {
    using B = Backward<D>;
    auto& controls = *reinterpret_cast<typename B::Controls*>(shared_memory() + B::TILES);
    const OfKeys<D> of_keys(shared_memory(), controls.of_keys);
    const OfQueries<D> of_queries(shared_memory(), controls.of_queries);
    const int group = own_group();
    if (threadIdx.x == 0) {
        of_keys.init(), of_queries.init(), mbarrier_init_fence();
        tma_prefetch(&q), tma_prefetch(&dout), tma_prefetch(&k), tma_prefetch(&v);
    }
    __syncthreads();
    const auto change = [] {  // the same memory becomes other tiles
        fence_async();
        bar_sync(1 + BACKWARD_CONSUMERS, B::THREADS);
    };
    if (group == 0) {
        registers_down<B::PRODUCER_REGISTERS>();
        if (threadIdx.x < WARP) produce_queries<D>(of_keys, &q, &dout, &k, &v, p);
        change();
        if (threadIdx.x < WARP) produce_keys<D>(of_queries, &q, &dout, &k, &v, p);
    } else {
        registers_up<B::CONSUMER_REGISTERS>();
        consume_all_queries<D>(of_keys, p, group - 1);
        change();
        consume_all_keys<D>(of_queries, p, group - 1);
    }
}

template <int D>
void backward(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys, const QueryStats& stats,
              cudaStream_t stream) {
    const BackwardProblem problem{items_of(keys, p.kv_heads), items_of(queries, p.heads), p.dq, p.dk, p.dv, stats.lse2,
                                  stats.delta, stats.stride, static_cast<int>(p.heads), static_cast<int>(p.heads / p.kv_heads),
                                  p.causal, p.scale, p.scale * LOG2E};
    const auto of_queries = [&](const Rows& rows) { return sm90::tensor_map(rows, tokens, p.heads, D, BACKWARD_QUERIES); };
    const auto of_keys = [&](const Rows& rows) { return sm90::tensor_map(rows, tokens, p.kv_heads, D, BACKWARD_TILE); };
    launch(attention_backward_sm90_kernel<D>, dim3(std::min(problem.of_queries.count, sm90::multiprocessors())),
           dim3(Backward<D>::THREADS), Backward<D>::SHARED, stream, "attention_backward", of_queries(p.q), of_queries(p.dout),
           of_keys(p.k), of_keys(p.v), problem);
}

}  // namespace

namespace gpu {

int64_t attention_backward_workspace_sm90(int64_t, int64_t, int64_t, int64_t, int64_t) { return 0; }

void attention_backward_sm90(const AttentionProblem& p, int64_t tokens, const TileMap& queries, const TileMap& keys,
                             const QueryStats& stats, void*, cudaStream_t stream) {
    (p.head_dim == 64 ? backward<64> : backward<128>)(p, tokens, queries, keys, stats, stream);
}

}  // namespace gpu

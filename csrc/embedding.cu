// Forward copies rows. Backward sorts the tokens by id, keeping their order (8 bits of the id at a time: how often every digit
// comes in each tile of tokens, where it therefore goes, then the tokens there); a thread then adds a chunk of columns of one row
// over its tokens, in their order. Rows of many tokens, of which any text has some, would keep few threads waiting for memory
// long: a block brings their gradients ahead of the additions.
#include "embedding.h"

#include <algorithm>

#include "gpu.h"
#include "rows.cuh"

namespace {

constexpr int BLOCK = 256, WARPS = BLOCK / WARP, DIGITS = 256, TILE = 2048, ROUNDS = TILE / BLOCK;
constexpr int AHEAD = 8;  // tokens whose gradients are under way in a thread
// Tokens that make a row heavy. Its blocks have WIDE_CHUNKS chunks of its columns, and STAGES times TOKENS tokens under way.
constexpr int HEAVY = 128, WIDE_CHUNKS = 16, TOKENS = BLOCK / WIDE_CHUNKS, STAGES = 8;

template <class From, class To, int W, class I>
__global__ __launch_bounds__(BLOCK) void embedding_forward_kernel(EmbeddingProblem p, I chunks, I total) {
    const I i = static_cast<I>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= total) return;
    const I token = i / chunks, j = (i - token * chunks) * W;
    const int64_t id = p.ids[token];
    const bool known = id >= 0 && id < p.vocabulary;
    const From* from = static_cast<const From*>(p.from) + id * p.columns + j;
    To* to = static_cast<To*>(p.to) + static_cast<int64_t>(i) * W;
    float v[W];
    if constexpr (std::is_same_v<From, To>) {  // bit by bit, whatever they mean
        store_chunk(to, known ? load_chunk<W>(from) : filled<To, W>(NAN));
    } else if constexpr (std::is_same_v<From, float>) {
        if (known) load_floats(from, v);
#pragma unroll
        for (int w = 0; w < W; ++w) v[w] = known ? v[w] : NAN;
        store_values<W>(to, v);
    } else {
        unpack(known ? load_chunk<W>(from) : filled<From, W>(NAN), v);
        store_floats(to, v);
    }
}

// The sorted-by of a token: its id, or the vocabulary's size for an id out of range, which comes last and is left out.
DEVICE uint32_t key_of(const EmbeddingProblem& p, const uint32_t* keys, int64_t n) {
    if (keys) return keys[n];
    const int64_t id = p.ids[n];
    return static_cast<uint32_t>(id >= 0 && id < p.vocabulary ? id : p.vocabulary);
}

// counts[digit][tile]
__global__ __launch_bounds__(BLOCK) void count_digits_kernel(EmbeddingProblem p, const uint32_t* keys, int shift, uint32_t* counts) {
    __shared__ uint32_t count[DIGITS];
    count[threadIdx.x] = 0;
    __syncthreads();
    const int64_t end = min(p.tokens, (static_cast<int64_t>(blockIdx.x) + 1) * TILE);
    for (int64_t n = static_cast<int64_t>(blockIdx.x) * TILE + threadIdx.x; n < end; n += BLOCK)
        atomicAdd(&count[key_of(p, keys, n) >> shift & (DIGITS - 1)], 1u);
    __syncthreads();
    counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x] = count[threadIdx.x];
}

// Every count becomes the sum of those before it. One block.
__global__ __launch_bounds__(1024) void sum_counts_kernel(uint32_t* counts, int64_t size) {
    constexpr int EACH = 4;
    __shared__ uint32_t of_warp[WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    uint32_t before = 0;  // the sum of all earlier rounds
    for (int64_t base = 0; base < size; base += 1024 * EACH) {
        const int64_t first = base + threadIdx.x * EACH;
        uint32_t count[EACH], mine = 0;
#pragma unroll
        for (int i = 0; i < EACH; ++i) count[i] = first + i < size ? counts[first + i] : 0, mine += count[i];
        uint32_t through = mine;  // the warp's lanes up to this one
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, through, lanes);
            if (lane >= lanes) through += other;
        }
        __syncthreads();  // the warps' sums may still be read
        if (lane == WARP - 1) of_warp[warp] = through;
        __syncthreads();
        uint32_t warps = of_warp[lane];
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const uint32_t other = __shfl_up_sync(0xffffffffu, warps, lanes);
            if (lane >= lanes) warps += other;
        }
        const uint32_t earlier = __shfl_sync(0xffffffffu, warps, max(warp - 1, 0));
        uint32_t sum = before + (warp ? earlier : 0) + through - mine;
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            if (first + i < size) counts[first + i] = sum;
            sum += count[i];
        }
        before += __shfl_sync(0xffffffffu, warps, WARP - 1);
    }
}

// Tokens to where their digit belongs, those of one digit in the order they come: by tile, warp, round and lane.
__global__ __launch_bounds__(BLOCK) void scatter_tokens_kernel(EmbeddingProblem p, const uint32_t* keys, const uint32_t* tokens, int shift,
                                                               const uint32_t* counts, uint32_t* keys_out, uint32_t* tokens_out) {
    __shared__ uint32_t seen[WARPS][DIGITS];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    for (int i = lane; i < DIGITS; i += WARP) seen[warp][i] = 0;
    __syncwarp();
    const int64_t first = static_cast<int64_t>(blockIdx.x) * TILE + warp * (TILE / WARPS) + lane;
    uint32_t key[ROUNDS], rank[ROUNDS];
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int64_t n = first + r * WARP;
        const bool inside = n < p.tokens;
        key[r] = inside ? key_of(p, keys, n) : 0;
        const uint32_t digit = key[r] >> shift & (DIGITS - 1);
        uint32_t peers = __ballot_sync(0xffffffffu, inside);  // the lanes with this digit
#pragma unroll
        for (int bit = 0; bit < 8; ++bit) {
            const uint32_t set = __ballot_sync(0xffffffffu, digit >> bit & 1);
            peers &= digit >> bit & 1 ? set : ~set;
        }
        const uint32_t before = seen[warp][digit];
        const int below = __popc(peers & ((1u << lane) - 1));
        rank[r] = before + below;
        __syncwarp();
        if (inside && below == 0) seen[warp][digit] = before + __popc(peers);
        __syncwarp();
    }
    __syncthreads();
    uint32_t sum = counts[static_cast<int64_t>(threadIdx.x) * gridDim.x + blockIdx.x];
#pragma unroll
    for (int w = 0; w < WARPS; ++w) {
        const uint32_t count = seen[w][threadIdx.x];
        seen[w][threadIdx.x] = sum;
        sum += count;
    }
    __syncthreads();
#pragma unroll
    for (int r = 0; r < ROUNDS; ++r) {
        const int64_t n = first + r * WARP;
        if (n >= p.tokens) continue;
        const uint32_t to = seen[warp][key[r] >> shift & (DIGITS - 1)] + rank[r];
        keys_out[to] = key[r];
        tokens_out[to] = tokens ? tokens[n] : static_cast<uint32_t>(n);
    }
}

// starts[row] is the first sorted token whose id is not below the row.
__global__ __launch_bounds__(BLOCK) void find_starts_kernel(EmbeddingProblem p, const uint32_t* keys, uint32_t* starts) {
    const int64_t row = static_cast<int64_t>(blockIdx.x) * BLOCK + threadIdx.x;
    if (row > p.vocabulary) return;
    int64_t low = 0, high = p.tokens;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (keys[middle] < row) low = middle + 1;
        else high = middle;
    }
    starts[row] = static_cast<uint32_t>(low);
}

template <class T, int W, class I>
__global__ __launch_bounds__(BLOCK, 3) void embedding_backward_kernel(EmbeddingProblem p, I chunks, I total, const uint32_t* order,
                                                                   const uint32_t* starts) {
    const I i = static_cast<I>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= total) return;
    const I row = i / chunks, j = (i - row * chunks) * W;
    const T* from = static_cast<const T*>(p.from) + j;
    float sum[W], v[W];
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] = 0;
    const auto add = [&](const Chunk<T, W>& chunk) {
        unpack(chunk, v);
#pragma unroll
        for (int w = 0; w < W; ++w) sum[w] += v[w];
    };
    uint32_t n = starts[row];
    const uint32_t last = starts[row + 1];
    if (W > 1 && last - n >= HEAVY) return;
    uint32_t token[AHEAD];
    if (n + AHEAD <= last)
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) token[a] = order[n + a];
    for (; n + AHEAD <= last; n += AHEAD) {
        Chunk<T, W> ahead[AHEAD];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) ahead[a] = load_chunk<W>(from + token[a] * p.columns);
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) token[a] = order[min(n + AHEAD + a, last - 1)];  // in time for the next round
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) add(ahead[a]);
    }
    for (; n < last; n += 2) {
        const Chunk<T, W> one = load_chunk<W>(from + order[n] * p.columns);
        const Chunk<T, W> two = n + 1 < last ? load_chunk<W>(from + order[n + 1] * p.columns) : filled<T, W>(0);
        add(one);
        if (n + 1 < last) add(two);
    }
    store_floats(static_cast<float*>(p.to) + static_cast<int64_t>(i) * W, sum);
}

// In every HEAVY-th place of the sorted tokens some blocks look whether it is the first such place of a heavy row, which is theirs.
template <class T>
__global__ __launch_bounds__(BLOCK) void embedding_heavy_kernel(EmbeddingProblem p, int parts, const uint32_t* keys, const uint32_t* order,
                                                                const uint32_t* starts) {
    constexpr int W = 16 / sizeof(T), COLUMNS = WIDE_CHUNKS * W;
    const uint32_t place = blockIdx.x / parts * HEAVY, row = keys[place];
    if (row >= p.vocabulary) return;
    const uint32_t first = starts[row], last = starts[row + 1];
    if (place - first >= HEAVY || last - first < HEAVY) return;
    auto* stages = reinterpret_cast<T*>(shared_memory());  // [STAGES][TOKENS][COLUMNS]
    const int part = blockIdx.x % parts, token = threadIdx.x / WIDE_CHUNKS, chunk = threadIdx.x % WIDE_CHUNKS;
    const int64_t column = static_cast<int64_t>(part) * COLUMNS + chunk * W;
    const T* from = static_cast<const T*>(p.from) + column;
    const uint32_t rounds = (last - first + TOKENS - 1) / TOKENS;
    uint32_t next = first + token, next_token = order[min(next, last - 1)];
    const auto bring = [&](uint32_t round) {  // zeros where there is nothing
        const bool valid = next < last && column < p.columns;
        cp_async_16(stages + (round % STAGES * TOKENS + token) * COLUMNS + chunk * W, valid ? from + next_token * p.columns : p.from, valid);
        cp_async_commit();
        next += TOKENS;
        next_token = order[min(next, last - 1)];
    };
    for (int round = 0; round < STAGES - 1; ++round) bring(round);
    float sum = 0;
    for (uint32_t round = 0; round < rounds; ++round) {
        cp_async_wait<STAGES - 2>();
        __syncthreads();  // and the stage before has been read
        bring(round + STAGES - 1);
        const T* stage = stages + round % STAGES * TOKENS * COLUMNS + threadIdx.x;
        if (threadIdx.x < COLUMNS)
#pragma unroll
            for (int t = 0; t < TOKENS; ++t) sum += to_float(stage[t * COLUMNS]);
    }
    cp_async_wait<0>();
    const int64_t mine = static_cast<int64_t>(part) * COLUMNS + threadIdx.x;
    if (threadIdx.x < COLUMNS && mine < p.columns) static_cast<float*>(p.to)[row * p.columns + mine] = sum;
}

int64_t tiles_of(int64_t tokens) { return ceil_div(tokens, TILE); }

// Calls f(T{}, ...) with an unsigned type that counts so many.
template <class F>
void by_index(int64_t total, F&& f) {
    total < INT32_MAX ? f(uint32_t{}) : f(uint64_t{});
}

template <class From, class To>
void forward(const EmbeddingProblem& p, cudaStream_t stream) {
    constexpr int WIDE = 16 / std::min(sizeof(From), sizeof(To));
    const bool fits = aligned({p.from, p.to}, {p.columns * int64_t{sizeof(From)}, p.columns * int64_t{sizeof(To)}});
    const auto start = [&](auto width) {
        constexpr int W = decltype(width)::value;
        const int64_t chunks = p.columns / W, total = p.tokens * chunks;
        by_index(total, [&](auto index) {
            launch(embedding_forward_kernel<From, To, W, decltype(index)>, blocks(ceil_div(total, BLOCK)), BLOCK, 0, stream, "embedding", p,
                   chunks, total);
        });
    };
    fits ? start(std::integral_constant<int, WIDE>{}) : start(std::integral_constant<int, 1>{});
}

}  // namespace

namespace gpu {

int64_t embedding_workspace(int64_t tokens, int64_t vocabulary) {
    return static_cast<int64_t>(sizeof(uint32_t)) * (4 * tokens + DIGITS * tiles_of(tokens) + vocabulary + 1);
}

void embedding_forward(const EmbeddingProblem& p, cudaStream_t stream) {
    if (!p.tokens || !p.columns) return;
    by_dtype(p.from_dtype, [&](auto from) {
        by_dtype(p.to_dtype, [&](auto to) { forward<decltype(from), decltype(to)>(p, stream); });
    });
}

void embedding_backward(const EmbeddingProblem& p, void* workspace, cudaStream_t stream) {
    if (!p.vocabulary || !p.columns) return;
    if (p.tokens > INT32_MAX || p.vocabulary >= UINT32_MAX)
        throw std::invalid_argument("embedding: expected fewer than 2^31 tokens and 2^32 - 1 rows");
    const int64_t tiles = tiles_of(p.tokens);
    auto* keys = static_cast<uint32_t*>(workspace);
    uint32_t *order = keys + p.tokens, *other_keys = order + p.tokens, *other_order = other_keys + p.tokens;
    uint32_t *counts = other_order + p.tokens, *starts = counts + DIGITS * tiles;
    const uint32_t *from_keys = nullptr, *from_order = nullptr;  // at first the ids themselves
    for (int shift = 0; shift < 32 && p.vocabulary >> shift; shift += 8) {
        launch(count_digits_kernel, blocks(tiles), BLOCK, 0, stream, "embedding", p, from_keys, shift, counts);
        launch(sum_counts_kernel, 1, 1024, 0, stream, "embedding", counts, DIGITS * tiles);
        launch(scatter_tokens_kernel, blocks(tiles), BLOCK, 0, stream, "embedding", p, from_keys, from_order, shift, counts, keys, order);
        from_keys = keys, from_order = order;
        std::swap(keys, other_keys), std::swap(order, other_order);
    }
    launch(find_starts_kernel, blocks(ceil_div(p.vocabulary + 1, BLOCK)), BLOCK, 0, stream, "embedding", p, from_keys, starts);
    const auto fits = [&](int64_t size) { return aligned({p.from, p.to}, {p.columns * size, p.columns * 4}); };
    by_type(p.from_dtype, fits, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const int64_t chunks = p.columns / W, total = p.vocabulary * chunks;
        by_index(total, [&](auto index) {
            launch(embedding_backward_kernel<T, W, decltype(index)>, blocks(ceil_div(total, BLOCK)), BLOCK, 0, stream, "embedding", p,
                   chunks, total, from_order, starts);
        });
        if constexpr (W > 1) {
            const int64_t parts = ceil_div(chunks, WIDE_CHUNKS);
            launch(embedding_heavy_kernel<T>, blocks(p.tokens / HEAVY * parts), BLOCK, STAGES * BLOCK * 16, stream, "embedding", p, parts,
                   from_keys, from_order, starts);
        }
    });
}

}  // namespace gpu

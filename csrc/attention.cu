#include "attention_gpu.h"

#include <atomic>
#include <cstring>

#include "device.cuh"

namespace {

constexpr int MAP_THREADS = 1024, MAP_WARPS = MAP_THREADS / WARP;
constexpr int BUCKETS = MAP_THREADS;  // of a counting sort by work
constexpr int64_t ALIGNMENT = 256;    // of the parts of a workspace

struct MapSide {
    AttentionTile* tiles;
    int32_t *used, *counters;
    int32_t capacity, rows;
    bool of_keys;
};

struct MapRequest {
    const int32_t* cu_seqlens;
    int32_t batch, tokens, unit;  // work is told apart in these units
    bool causal;
    MapSide sides[2];
};

DEVICE AttentionTile tile_of(const MapRequest& request, const MapSide& side, int start, int length, int row, bool poisoned) {
    const int end = row + side.rows < length ? row + side.rows : length;
    AttentionTile tile{start, length, start, length, row, 0, length, poisoned};
    if (poisoned) tile.end = 0;
    else if (request.causal) (side.of_keys ? tile.begin : tile.end) = side.of_keys ? row : end;
    return tile;
}

// Where the longest work comes first.
DEVICE int bucket_of(const MapRequest& request, const AttentionTile& tile) {
    const int units = (tile.end - tile.begin) / request.unit;
    return BUCKETS - 1 - (units < BUCKETS ? units : BUCKETS - 1);
}

// Calls place(tile, count) with a bucket's counter for each tile, or once for all tiles of a sequence where all have the same
// work; a warp takes a sequence's tiles together.
template <bool WRITE>
DEVICE void visit_tiles(const MapRequest& request, const MapSide& side, int32_t* counters, bool poisoned) {
    const int lane = threadIdx.x % WARP, batch = poisoned ? 1 : request.batch;
    for (int first = threadIdx.x - lane; first < batch; first += MAP_THREADS) {
        const bool mine = first + lane < batch && !poisoned;
        const int starts = mine ? request.cu_seqlens[first + lane] : 0;
        const int ends = mine ? request.cu_seqlens[first + lane + 1] : request.tokens;
        const int sequences = batch - first < WARP ? batch - first : WARP;
        for (int i = 0; i < sequences; ++i) {
            const int start = __shfl_sync(0xffffffffu, starts, i), length = __shfl_sync(0xffffffffu, ends, i) - start;
            const int count = (length + side.rows - 1) / side.rows;
            int place = 0;
            if (!request.causal && count) {
                const AttentionTile tile = tile_of(request, side, start, length, 0, poisoned);
                if (!lane) place = atomicAdd(&counters[bucket_of(request, tile)], count);
                place = __shfl_sync(0xffffffffu, place, 0);
                if (!WRITE) continue;
            }
            for (int t = lane; t < count; t += WARP) {
                const AttentionTile tile = tile_of(request, side, start, length, t * side.rows, poisoned);
                const int slot = request.causal ? atomicAdd(&counters[bucket_of(request, tile)], 1) : place + t;
                if (WRITE) side.tiles[slot] = tile;
            }
        }
    }
}

// counters become the sums of those before; returns the sum of all.
DEVICE int sums_before(int32_t* counters, int32_t* room) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, own = counters[threadIdx.x];
    int sum = own;
    for (int step = 1; step < WARP; step *= 2) {
        const int before = __shfl_up_sync(0xffffffffu, sum, step);
        if (lane >= step) sum += before;
    }
    if (lane == WARP - 1) room[warp] = sum;
    __syncthreads();
    int before_warp = 0, all = 0;
    for (int w = 0; w < MAP_WARPS; ++w) {
        if (w < warp) before_warp += room[w];
        all += room[w];
    }
    counters[threadIdx.x] = before_warp + sum - own;
    return all;
}

// A block a map. cu_seqlens that do not rise from 0 to the number of tokens give tiles that poison every token.
__global__ void __launch_bounds__(MAP_THREADS) make_tile_maps(const __grid_constant__ MapRequest request) {
    __shared__ int32_t counters[BUCKETS];
    __shared__ int32_t room[MAP_WARPS];
    __shared__ int32_t wrong;
    const MapSide& side = request.sides[blockIdx.x];
    counters[threadIdx.x] = 0;
    if (!threadIdx.x) wrong = request.cu_seqlens[0] != 0 || request.cu_seqlens[request.batch] != request.tokens;
    __syncthreads();
    for (int b = threadIdx.x; b < request.batch; b += MAP_THREADS)
        if (request.cu_seqlens[b] > request.cu_seqlens[b + 1]) wrong = 1;
    __syncthreads();
    const bool poisoned = wrong;
    visit_tiles<false>(request, side, counters, poisoned);
    __syncthreads();
    const int used = sums_before(counters, room);
    __syncthreads();
    visit_tiles<true>(request, side, counters, poisoned);
    const AttentionTile none{0, 0, 0, 0, -1, 0, 0, 0};
    for (int t = used + static_cast<int>(threadIdx.x); t < side.capacity; t += MAP_THREADS) side.tiles[t] = none;
    if (!threadIdx.x) *side.used = used;
    if (threadIdx.x < 3) side.counters[threadIdx.x] = 0;
}

struct StatsProblem {
    Rows out, dout;
    const double* lse;
    float *lse2, *lse2_low, *delta;
    int64_t rows, stride;
    int heads, head_dim;
    bool aligned;  // packs of 16 bytes can be read
};

// LANES threads a row (token, head).
template <class T, int LANES>
__global__ void __launch_bounds__(256) query_stats(const __grid_constant__ StatsProblem p) {
    const int64_t row = (static_cast<int64_t>(blockIdx.x) * 256 + threadIdx.x) / LANES;
    const int lane = threadIdx.x % LANES;
    const int64_t token = row / p.heads, head = row % p.heads;
    float sum = 0;
    if (row < p.rows) {
        const T* out = static_cast<const T*>(p.out.data) + token * p.out.token_stride + head * p.out.head_stride;
        const T* dout = static_cast<const T*>(p.dout.data) + token * p.dout.token_stride + head * p.dout.head_stride;
        if (p.aligned) {
            for (int d = lane * Pack<T>::SIZE; d < p.head_dim; d += LANES * Pack<T>::SIZE) {
                const Pack<T> a = load_pack(out + d), b = load_pack(dout + d);
#pragma unroll
                for (int i = 0; i < Pack<T>::SIZE; ++i) sum = fmaf(to_float(a.v[i]), to_float(b.v[i]), sum);
            }
        } else {
            for (int d = lane; d < p.head_dim; d += LANES) sum = fmaf(to_float(out[d]), to_float(dout[d]), sum);
        }
    }
    sum = warp_sum<LANES>(sum);
    if (row >= p.rows || lane) return;
    const double lse2 = p.lse[row] * 1.4426950408889634074;
    const float high = static_cast<float>(lse2);
    p.lse2[head * p.stride + token] = high;
    if (p.lse2_low) p.lse2_low[head * p.stride + token] = static_cast<float>(lse2 - high);
    p.delta[head * p.stride + token] = sum;
}

template <class T>
void launch_query_stats(const StatsProblem& p, cudaStream_t stream) {
    const int packs = static_cast<int>(ceil_div(p.head_dim, Pack<T>::SIZE));
    const int lanes = packs <= 8 ? 8 : packs <= 16 ? 16 : 32;
    const auto kernel = lanes == 8 ? query_stats<T, 8> : lanes == 16 ? query_stats<T, 16> : query_stats<T, 32>;
    launch(kernel, dim3(static_cast<unsigned>(ceil_div(p.rows * lanes, 256))), dim3(256), 0, stream, "attention_backward", p);
}

// Parts of a workspace, one after the other.
class Parts {
public:
    explicit Parts(void* memory) : place_(static_cast<char*>(memory)) {}
    template <class T>
    T* take(int64_t count) {
        T* part = reinterpret_cast<T*>(place_);
        place_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), ALIGNMENT) * ALIGNMENT;
        return part;
    }
    TileMap take_map(int64_t batch, int64_t tokens, int rows) {
        TileMap map{};
        map.rows = rows, map.capacity = tokens / rows + (batch > 1 ? batch : 1);
        map.used = take<int32_t>(4), map.counters = map.used + 1;
        map.tiles = take<AttentionTile>(map.capacity);
        return map;
    }
    QueryStats take_stats(int64_t heads, int64_t tokens, int dtype) {
        QueryStats stats{};
        stats.stride = ceil_div(tokens, 64) * 64 + 128;
        stats.lse2 = take<float>(heads * stats.stride), stats.delta = take<float>(heads * stats.stride);
        if (!dtype) stats.lse2_low = take<float>(heads * stats.stride);
        return stats;
    }
    char* place() const { return place_; }

private:
    char* place_;
};

void make_maps(const AttentionProblem& p, int64_t tokens, const TileMap* queries, const TileMap* keys, cudaStream_t stream) {
    MapRequest request{p.cu_seqlens, static_cast<int32_t>(p.batch), static_cast<int32_t>(tokens),
                       static_cast<int32_t>(tokens / BUCKETS > 64 ? tokens / BUCKETS : 64), p.causal, {}};
    unsigned sides = 0;
    for (const TileMap* map : {queries, keys})
        if (map && map->rows)
            request.sides[sides++] = {map->tiles, map->used, map->counters, static_cast<int32_t>(map->capacity), map->rows, map == keys};
    launch(make_tile_maps, dim3(sides), dim3(MAP_THREADS), 0, stream, "attention", request);
}

bool multiple_of_16(const Rows& rows, int64_t size) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.token_stride * size % 16 == 0 && rows.head_stride * size % 16 == 0;
}

const char* const VARIANTS[] = {"auto", "portable", "sm90"};
std::atomic<int> variant{0};

#ifdef NANORLHF_SM90
bool is_hopper() {
#ifdef NANORLHF_EMULATED
    return false;
#else
    static std::atomic<int> of_device[64];  // 0: not asked yet; else 1 + whether it is
    int device = 0;
    check(cudaGetDevice(&device), "attention");
    int known = device < 64 ? of_device[device].load() : 0;
    if (!known) {
        int major = 0, minor = 0;
        check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), "attention");
        check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), "attention");
        known = 1 + (major == 9 && minor == 0);
        if (device < 64) of_device[device] = known;
    }
    return known == 2;
#endif
}
#endif

bool takes_sm90(const AttentionProblem& p) {
#ifdef NANORLHF_SM90
    const int forced = variant;
    if (!p.dtype || forced == 1) return false;
    const bool takes = gpu::attention_sm90_takes(p);
    return takes && (forced == 2 || is_hopper());
#else
    (void)p;
    return false;
#endif
}

TileRows tile_rows(const AttentionProblem& p, bool sm90) {
#ifdef NANORLHF_SM90
    if (sm90) return gpu::tile_rows_sm90(p);
#endif
    (void)sm90;
    return p.dtype ? gpu::tile_rows_portable(p.head_dim) : gpu::tile_rows_fp32(p.head_dim);
}

}  // namespace

namespace gpu {

const char* attention_variant(const char* name) {
    const char* before = VARIANTS[variant];
    if (!name) return before;
    for (int i = 0; i < 3; ++i)
        if (!std::strcmp(name, VARIANTS[i])) {
#ifndef NANORLHF_SM90
            if (i == 2) break;
#endif
            variant = i;
            return before;
        }
    throw std::invalid_argument(std::string("attention_variant: expected auto, portable or, where it is compiled in, sm90, got ") + name);
}

int64_t attention_workspace(int64_t batch, int64_t tokens, int64_t, int64_t, int64_t, int) {
    Parts parts(nullptr);
    parts.take_map(batch, tokens, MIN_TILE_ROWS);
    return reinterpret_cast<intptr_t>(parts.place());
}

int64_t attention_backward_workspace(int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int dtype) {
    Parts parts(nullptr);
    parts.take_map(batch, tokens, MIN_TILE_ROWS);
    parts.take_map(batch, tokens, MIN_TILE_ROWS);
    parts.take_stats(heads, tokens, dtype);
    int64_t bytes = reinterpret_cast<intptr_t>(parts.place());
#ifdef NANORLHF_SM90
    if (dtype) bytes += attention_backward_workspace_sm90(batch, tokens, heads, kv_heads, head_dim);
#endif
    (void)kv_heads, (void)head_dim;
    return bytes;
}

void attention_forward(const AttentionProblem& p, int64_t tokens, void* workspace, cudaStream_t stream) {
    if (!tokens) return;
    const bool sm90 = takes_sm90(p);
    const TileMap queries = Parts(workspace).take_map(p.batch, tokens, tile_rows(p, sm90).forward);
    make_maps(p, tokens, &queries, nullptr, stream);
#ifdef NANORLHF_SM90
    if (sm90) return attention_forward_sm90(p, tokens, queries, stream);
#endif
    (p.dtype ? attention_forward_portable : attention_forward_fp32)(p, tokens, queries, stream);
}

void attention_backward(const AttentionProblem& p, int64_t tokens, void* workspace, cudaStream_t stream) {
    if (!tokens) return;
    const bool sm90 = takes_sm90(p);
    const TileRows rows = tile_rows(p, sm90);
    Parts parts(workspace);
    TileMap queries{}, keys{};
    if (rows.backward_queries) queries = parts.take_map(p.batch, tokens, rows.backward_queries);
    if (rows.backward_keys) keys = parts.take_map(p.batch, tokens, rows.backward_keys);
    const QueryStats stats = parts.take_stats(p.heads, tokens, p.dtype);
    make_maps(p, tokens, &queries, &keys, stream);
    const int64_t size = p.dtype ? 2 : 4;
    const StatsProblem problem{p.out, p.dout, p.lse, const_cast<float*>(stats.lse2), const_cast<float*>(stats.lse2_low),
                               const_cast<float*>(stats.delta), tokens * p.heads, stats.stride, static_cast<int>(p.heads),
                               static_cast<int>(p.head_dim),
                               p.head_dim * size % 16 == 0 && multiple_of_16(p.out, size) && multiple_of_16(p.dout, size)};
    by_dtype(p.dtype, [&](auto type) { launch_query_stats<decltype(type)>(problem, stream); });
#ifdef NANORLHF_SM90
    if (sm90) return attention_backward_sm90(p, tokens, queries, keys, stats, parts.place(), stream);
#endif
    (p.dtype ? attention_backward_portable : attention_backward_fp32)(p, tokens, queries, keys, stats, stream);
}

}  // namespace gpu

// Decode attention on NVIDIA GPUs: one query per sequence. Bounded by memory: what matters is to read every key and value once,
// with enough of them on their way. The keys of a sequence or prefix are cut into parts, by its own length alone, so that the
// bits of a sequence do not depend on the batch; the parts' sums meet in a last kernel. Nothing waits for the host: it
// knows no length, only the room for keys, and starts blocks enough to fill the GPU, which find their parts by themselves.
// What Python cannot see without waiting (a length, page or owner out of range) makes the sequences concerned NaN.
// Source: FlashDecoding, https://crfm.stanford.edu/2023/10/12/flashdecoding.html; a prefix apart from what follows: Hydragen,
// arXiv 2402.05099.
#include <algorithm>
#include <initializer_list>
#include <type_traits>

#include "attention_decode.cuh"
#include "gpu.h"

namespace {

using decode::Shape;
using decode::Warp;

constexpr int PART_KEYS = 512, OWN_PARTS = 128, PREFIX_PARTS = 16;  // at least so many keys a part, at most so many parts
constexpr int ENOUGH_BLOCKS = 1056;                                // four for each place on an H100
constexpr int PLAN_THREADS = 256, COMBINE_THREADS = 128;
constexpr int64_t MOST = 1 << 30;  // where int is enough, with room for a tile
constexpr char WHAT[] = "attention_decode";

__host__ DEVICE int keys_per_part(int length, int most) {
    const int even = (length + most - 1) / most;
    return even <= PART_KEYS ? PART_KEYS : (even + 63) / 64 * 64;
}

// Where keys and values lie: in pages of a pool, or, without a table of pages, one after the other.
struct Source {
    const void *k, *v;
    int64_t k_page, k_token, k_head, v_page, v_token, v_head;
    const int32_t* pages;  // (sequences or prefixes, width)
    int64_t width;
    int page_size, pool;
    bool packs;  // 16 bytes at a time
};

struct Decode {
    int batch, heads, kv_heads, group, dim, pitch;  // pitch: floats from partial row to partial row
    float scale;                                    // of exponents of 2
    Rows q, out;
    bool q_packs, optional;  // optional: an owner of -1 is none
    const int32_t *lengths, *bounds, *prefix_lengths, *owner;
    int64_t capacity, prefix_capacity;
    int prefixes, own_parts, prefix_parts, chunk_count;
    unsigned prefix_blocks;
    Source own, prefix;
    // Workspace. Of part p of sequence b and head h, row (b * parts + p) * heads + h: (top, sum of weights), and the sums.
    float2 *own_sums, *prefix_sums;
    float *own_rows, *prefix_rows;
    int4* chunks;        // of the rows that share a prefix: prefix (-1: none), first row, number of rows, first in order
    int *order, *cursor;  // the sequences by prefix; where a prefix's begin
};

struct Span {  // the keys of a sequence or prefix
    int first, length;
    bool good;
};
DEVICE Span own_span(const Decode& p, int sequence) {
    const int length = p.lengths[sequence];
    const bool alone = !p.owner || p.prefixes || (p.optional && p.owner[sequence] == -1);
    const bool good = length >= 0 && length <= p.capacity && alone;
    return {0, good ? length : 0, good};
}
DEVICE Span prefix_span(const Decode& p, int prefix) {
    const int first = p.bounds ? p.bounds[prefix] : 0;
    const int64_t length = p.bounds ? static_cast<int64_t>(p.bounds[prefix + 1]) - first : p.prefix_lengths[prefix];
    const bool good = first >= 0 && length >= 0 && first + length <= p.prefix_capacity;
    return {good ? first : 0, good ? static_cast<int>(length) : 0, good};
}
DEVICE int parts_of(int length, int most) {
    const int keys = keys_per_part(length, most);
    return (length + keys - 1) / keys;
}

// The sequences sorted by prefix, and chunks of at most `rows` rows that share one. One block.
__global__ void __launch_bounds__(PLAN_THREADS) decode_plan(const Decode p, int rows) {
    __shared__ int room[2][PLAN_THREADS];
    const int me = threadIdx.x;
    const auto owns = [&](int b) { return p.owner[b] >= 0 && p.owner[b] < p.prefixes; };
    for (int i = me; i < p.prefixes; i += PLAN_THREADS) p.cursor[i] = 0;
    __syncthreads();
    for (int b = me; b < p.batch; b += PLAN_THREADS)
        if (owns(b)) atomicAdd(p.cursor + p.owner[b], 1);
    __syncthreads();
    int first = 0, chunk = 0;  // of all prefixes so far
    for (int begin = 0; begin < p.prefixes; begin += PLAN_THREADS) {
        const int prefix = begin + me, members = prefix < p.prefixes ? p.cursor[prefix] : 0;
        const int wanted = members && prefix_span(p, prefix).length ? (members * p.group + rows - 1) / rows : 0;
        room[0][me] = members, room[1][me] = wanted;
        __syncthreads();
        for (int step = 1; step < PLAN_THREADS; step *= 2) {  // sums of all up to here
            const int more = me >= step ? room[0][me - step] : 0, more_chunks = me >= step ? room[1][me - step] : 0;
            __syncthreads();
            room[0][me] += more, room[1][me] += more_chunks;
            __syncthreads();
        }
        const int mine = first + room[0][me] - members, my_chunk = chunk + room[1][me] - wanted;
        for (int i = 0; i < wanted; ++i) {
            const int left = members * p.group - i * rows;
            p.chunks[my_chunk + i] = make_int4(prefix, i * rows, left < rows ? left : rows, mine);
        }
        if (prefix < p.prefixes) p.cursor[prefix] = mine;
        first += room[0][PLAN_THREADS - 1], chunk += room[1][PLAN_THREADS - 1];
        __syncthreads();
    }
    for (int i = chunk + me; i < p.chunk_count; i += PLAN_THREADS) p.chunks[i] = make_int4(-1, 0, 0, 0);
    for (int b = me; b < p.batch; b += PLAN_THREADS)
        if (owns(b)) p.order[atomicAdd(p.cursor + p.owner[b], 1)] = b;
}

// What a block works on: some rows, and the keys that they all see.
struct Work {
    int kv_head, first_row, rows, first_part, parts_at_once;
    int page, sequence;  // of the sequence, or of the prefix and its first sequence in order
    Span span;
    bool direct;  // nothing else has a share in the rows
};
DEVICE bool find_work(const Decode& p, bool shared, int block_rows, Work& w) {
    unsigned i = shared ? blockIdx.x : blockIdx.x - p.prefix_blocks;
    if (shared) {
        const int4 chunk = p.chunks[i % p.chunk_count];
        if (chunk.x < 0) return false;
        i /= p.chunk_count;
        w.kv_head = i % p.kv_heads, w.first_part = i / p.kv_heads;
        w.parts_at_once = p.prefix_blocks / (p.chunk_count * p.kv_heads);
        w.page = chunk.x, w.first_row = chunk.y, w.rows = chunk.z, w.sequence = chunk.w;
        w.span = prefix_span(p, w.page), w.direct = false;
    } else {
        const int chunks = (p.group + block_rows - 1) / block_rows;
        w.first_row = i % chunks * block_rows, i /= chunks;
        w.kv_head = i % p.kv_heads, i /= p.kv_heads;
        w.sequence = w.page = i % p.batch, w.first_part = i / p.batch;
        w.parts_at_once = (gridDim.x - p.prefix_blocks) / (chunks * p.kv_heads * p.batch);
        w.rows = p.group - w.first_row < block_rows ? p.group - w.first_row : block_rows;
        w.span = own_span(p, w.sequence);
        w.direct = !p.prefixes && w.span.length <= keys_per_part(w.span.length, OWN_PARTS);
    }
    return true;
}
struct Query {
    int sequence, head;
};
DEVICE Query query_of(const Decode& p, const Work& w, bool shared, int row) {
    row += w.first_row;
    if (!shared) return {w.sequence, w.kv_head * p.group + row};
    return {p.order[w.sequence + row / p.group], w.kv_head * p.group + row % p.group};
}

// Where a token lies: elements from the head's first; -1: nowhere.
struct Place {
    int64_t k, v;
};
DEVICE Place place_of(const Source& source, const Work& w, int token, int end, int* bad) {
    if (token >= end) return {-1, -1};
    int64_t page = w.page;
    int slot = w.span.first + token;
    if (source.pages) {
        page = __ldg(source.pages + w.page * source.width + token / source.page_size), slot = token % source.page_size;
        if (page < 0 || page >= source.pool) {
            *bad = 1;
            return {-1, -1};
        }
    }
    return {page * source.k_page + slot * source.k_token, page * source.v_page + slot * source.v_token};
}

// This warp's share of a tile: lane i knows where row i of it lies.
template <class T, class S>
DEVICE void load_tile(const Decode& p, const Source& source, int kv_head, Place mine, unsigned char* keys) {
    const T* k = static_cast<const T*>(source.k) + kv_head * source.k_head;
    const T* v = static_cast<const T*>(source.v) + kv_head * source.v_head;
    constexpr int LOADS = S::TILE / S::WARPS * S::PACKS / WARP;
    const int lane = threadIdx.x % WARP, first = threadIdx.x / WARP * (S::TILE / S::WARPS);
    const auto each = [&](int i, auto&& load) {
        const int row = (i * WARP + lane) / S::PACKS, pack = (i * WARP + lane) % S::PACKS, element = pack * S::PACK;
        const int64_t at_k = __shfl_sync(0xffffffffu, mine.k, row), at_v = __shfl_sync(0xffffffffu, mine.v, row);
        const int count = at_k < 0 ? 0 : p.dim - element, to = S::place(first + row, pack);
        load(keys + to, count > 0 ? k + at_k + element : k, count);
        load(keys + S::TILE_BYTES + to, count > 0 ? v + at_v + element : v, count);
    };
    if (source.packs) {
#pragma unroll
        for (int i = 0; i < LOADS; ++i) each(i, [](void* to, const T* from, int count) { cp_async_16(to, from, count > 0); });
    } else {
#pragma unroll 1
        for (int i = 0; i < LOADS; ++i)
            each(i, [](void* to, const T* from, int count) {
                Pack<T> pack;
#pragma unroll
                for (int e = 0; e < S::PACK; ++e) pack.v[e] = e < count ? from[e] : T{};
                store_pack(static_cast<T*>(to), pack);
            });
    }
}

template <class T, class S>
DEVICE void load_queries(const Decode& p, const Work& w, bool shared, unsigned char* to) {
    for (int i = threadIdx.x; i < S::BLOCK_ROWS * S::PACKS; i += S::THREADS) {
        const int row = i / S::PACKS, pack = i % S::PACKS, count = p.dim - pack * S::PACK;
        Pack<T> elements{};
        if (row < w.rows && count > 0) {
            const Query query = query_of(p, w, shared, row);
            const int64_t start = query.sequence * p.q.token_stride + query.head * p.q.head_stride + pack * S::PACK;
            const T* from = static_cast<const T*>(p.q.data) + start;
            if (p.q_packs)
                elements = load_pack(from);
            else
#pragma unroll
                for (int e = 0; e < S::PACK; ++e)
                    if (e < count) elements.v[e] = from[e];
        }
        store_pack(reinterpret_cast<T*>(to + S::place(row, pack)), elements);
    }
}

// The warps' sums become the rows' of this part, or, if there is no other, what the rows see.
template <class T, class S>
DEVICE void deliver(const Decode& p, const Work& w, bool shared, int part, bool bad, const float* results, const float2* sums) {
    constexpr int QUADS = S::PACKS * S::PACK / 4;
    for (int i = threadIdx.x; i < w.rows * QUADS; i += S::THREADS) {
        const int row = i / QUADS, column = i % QUADS * 4;
        if (column >= p.dim) continue;
        float top = -INFINITY, total = 0, sum[4] = {};
#pragma unroll
        for (int team = 0; team < S::TEAMS; ++team) top = fmaxf(top, sums[team * S::BLOCK_ROWS + row].x);
#pragma unroll
        for (int team = 0; team < S::TEAMS; ++team) {
            const float2 of = sums[team * S::BLOCK_ROWS + row];
            const auto values = load_pack(results + S::result(team * S::BLOCK_ROWS + row, column));
            const float share = ex2(of.x - decode::base_of(top));
            total = fmaf(share, of.y, total);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[e] = fmaf(share, values.v[e], sum[e]);
        }
        if (bad) total = NAN;
        const Query query = query_of(p, w, shared, row);
        if (w.direct) {
            T* to = static_cast<T*>(p.out.data) + query.sequence * p.out.token_stride + query.head * p.out.head_stride + column;
            const float inverse = total == 0 ? 0.f : 1 / total;
#pragma unroll
            for (int e = 0; e < 4; ++e)
                if (column + e < p.dim) to[e] = from_float<T>(sum[e] * inverse);
        } else {
            const int64_t first = static_cast<int64_t>(query.sequence) * (shared ? p.prefix_parts : p.own_parts);
            const int64_t at = (first + part) * p.heads + query.head;
            if (column == 0) (shared ? p.prefix_sums : p.own_sums)[at] = make_float2(top, total);
            float* to = (shared ? p.prefix_rows : p.own_rows) + at * p.pitch + column;
            store_pack(to, Pack<float>{{sum[0], sum[1], sum[2], sum[3]}});
        }
    }
}

template <class T, int WIDTH, bool MANY>
DEVICE void work(const Decode& p, bool shared) {
    using S = Shape<T, WIDTH, MANY>;
    unsigned char* ring = shared_memory();
    unsigned char* queries = ring + (S::HOLDS ? (S::STAGES - 1) * 2 * S::TILE_BYTES : S::RING_BYTES);
    float* weights = reinterpret_cast<float*>(ring + S::RING_BYTES + S::QUERY_BYTES);
    float2* sums = reinterpret_cast<float2*>(ring + S::RING_BYTES + S::QUERY_BYTES + S::WEIGHT_BYTES);
    int* bad = reinterpret_cast<int*>(sums + S::TEAMS * S::BLOCK_ROWS);
    Work w;
    if (!find_work(p, shared, S::BLOCK_ROWS, w)) return;
    const int most = shared ? PREFIX_PARTS : OWN_PARTS;
    const int keys = keys_per_part(w.span.length, most), parts = parts_of(w.span.length, most);
    if (w.first_part >= parts && !(w.direct && w.first_part == 0)) return;
    const Source& source = shared ? p.prefix : p.own;
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP, my_row = warp * (S::TILE / S::WARPS) + lane;
    const int first_key = MANY ? 0 : warp * S::KEYS, first_query = MANY ? warp * S::ROWS : 0;
    if (threadIdx.x == 0) *bad = !w.span.good;
    __syncthreads();
    Warp<T, WIDTH, MANY> rows;
    int part = w.first_part;
    do {
        const int begin = part * keys, end = w.span.length - begin < keys ? w.span.length : begin + keys;
        const int tiles = (end - begin + S::TILE - 1) / S::TILE;
        int next = 0;  // tile to be loaded
        const auto find = [&] {
            return place_of(source, w, lane < S::TILE / S::WARPS ? begin + next * S::TILE + my_row : end, end, bad);
        };
        Place mine = find();
        const auto load = [&] {
            if (next < tiles) load_tile<T, S>(p, source, w.kv_head, mine, ring + next % S::STAGES * 2 * S::TILE_BYTES);
            cp_async_commit();
            ++next;
            mine = find();  // not needed for a while
        };
        for (int i = 0; i < S::STAGES - 1; ++i) load();
        if (part == w.first_part) {
            load_queries<T, S>(p, w, shared, queries);
            __syncthreads();
            rows.take(queries, first_query, weights);
            if constexpr (S::HOLDS) __syncthreads();
        }
        rows.start();
        for (int i = 0; i < tiles; ++i) {
            cp_async_wait<S::STAGES - 2>();
            if constexpr (MANY) __syncthreads();
            else __syncwarp();
            load();
            const unsigned char* tile = ring + i % S::STAGES * 2 * S::TILE_BYTES;
            const int valid = end - begin - i * S::TILE - first_key;
            if (valid > 0 && first_query < w.rows) rows.tile(tile, tile + S::TILE_BYTES, first_key, valid, p.scale);
        }
        cp_async_wait<0>();
        __syncthreads();
        float* results = reinterpret_cast<float*>(ring);
        rows.finish(results, sums, MANY ? first_query : warp * S::BLOCK_ROWS);
        __syncthreads();
        deliver<T, S>(p, w, shared, part, *bad, results, sums);
        __syncthreads();
        part += w.parts_at_once;
    } while (part < parts);
}

// The first blocks are the prefixes'. MANY: the others' rows are more than one warp takes.
template <class T, int WIDTH, bool MANY>
__global__ void __launch_bounds__((Shape<T, WIDTH, MANY>::THREADS), 2) decode_parts(const Decode p) {
    static_assert(Shape<T, WIDTH, false>::THREADS == Shape<T, WIDTH, true>::THREADS);
    const bool shared = blockIdx.x < p.prefix_blocks;
    if constexpr (MANY) work<T, WIDTH, true>(p, shared);
    else if (shared) work<T, WIDTH, true>(p, true);
    else work<T, WIDTH, false>(p, false);
}

// The parts of a row, its own and its prefix's, together; each warp takes every fourth.
template <class T>
__global__ void __launch_bounds__(COMBINE_THREADS) decode_combine(const Decode p) {
    constexpr int WARPS = COMBINE_THREADS / WARP, WIDEST = 256;
    __shared__ __align__(16) float room[WARPS][WIDEST];
    __shared__ float totals[WARPS];
    const int sequence = blockIdx.x / p.heads, head = blockIdx.x % p.heads, warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const Span own = own_span(p, sequence);
    const int owner = p.prefixes ? p.owner[sequence] : -1;
    bool good = own.good;
    int prefix_count = 0;
    if (owner >= 0 && owner < p.prefixes) {
        const Span prefix = prefix_span(p, owner);
        good = good && prefix.good, prefix_count = parts_of(prefix.length, PREFIX_PARTS);
    } else {
        good = good && (!p.prefixes || (p.optional && owner == -1));
    }
    const int own_count = parts_of(own.length, OWN_PARTS), count = prefix_count + own_count;
    if (!p.prefixes && own_count < 2) return;  // already there
    const auto at = [&](int i) {
        return i < prefix_count ? (static_cast<int64_t>(sequence) * p.prefix_parts + i) * p.heads + head
                                : (static_cast<int64_t>(sequence) * p.own_parts + i - prefix_count) * p.heads + head;
    };
    const auto sums = [&](int i) { return i < prefix_count ? p.prefix_sums : p.own_sums; };
    float top = -INFINITY, total = 0, sum[WIDEST / WARP] = {};
    for (int i = lane; i < count; i += WARP) top = fmaxf(top, sums(i)[at(i)].x);
    top = decode::base_of(warp_max(top));
#pragma unroll 4
    for (int i = warp; i < count; i += WARPS) {
        const float2 of = sums(i)[at(i)];
        const float* row = (i < prefix_count ? p.prefix_rows : p.own_rows) + at(i) * p.pitch;
        const float share = ex2(of.x - top);
        total = fmaf(share, of.y, total);
#pragma unroll
        for (int j = 0; j < WIDEST / (4 * WARP); ++j) {
            const int column = 4 * (lane + j * WARP);
            if (column >= p.pitch) break;
            const auto values = load_pack(row + column);
#pragma unroll
            for (int e = 0; e < 4; ++e) sum[4 * j + e] = fmaf(share, values.v[e], sum[4 * j + e]);
        }
    }
    if (lane == 0) totals[warp] = total;
#pragma unroll
    for (int j = 0; j < WIDEST / (4 * WARP); ++j)
        store_pack(room[warp] + 4 * (lane + j * WARP), Pack<float>{{sum[4 * j], sum[4 * j + 1], sum[4 * j + 2], sum[4 * j + 3]}});
    __syncthreads();
    total = totals[0] + totals[1] + totals[2] + totals[3];
    const float inverse = !good ? NAN : total == 0 ? 0.f : 1 / total;
    T* to = static_cast<T*>(p.out.data) + sequence * p.out.token_stride + head * p.out.head_stride;
    for (int d = threadIdx.x; d < p.dim; d += COMBINE_THREADS)
        to[d] = from_float<T>((room[0][d] + room[1][d] + room[2][d] + room[3][d]) * inverse);
}

int64_t most_parts(int64_t capacity, int most) { return std::min<int64_t>(ceil_div(capacity, PART_KEYS), most); }
int64_t padded(int64_t bytes) { return ceil_div(bytes, 256) * 256; }

int rows_of_block(bool fp32, int width) {  // that share a prefix
    if (width == 256) return fp32 ? Shape<float, 256, true>::BLOCK_ROWS : Shape<bf16, 256, true>::BLOCK_ROWS;
    return fp32 ? Shape<float, 64, true>::BLOCK_ROWS : Shape<bf16, 64, true>::BLOCK_ROWS;
}
int64_t most_chunks(int64_t batch, int64_t group, int64_t prefixes, int rows) {
    return ceil_div(batch * group, rows) + std::min(prefixes, batch);
}

// Cuts the workspace at `memory` up; returns its bytes.
int64_t divide(Decode& p, unsigned char* memory) {
    int64_t used = 0;
    const auto take = [&](auto*& pointer, int64_t count) {
        pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(memory + used);
        used += padded(count * sizeof(*pointer));
    };
    const int64_t rows = static_cast<int64_t>(p.batch) * p.heads, own = rows * p.own_parts, prefix = rows * p.prefix_parts;
    const bool alone = p.own_parts < 2 && !p.prefixes;
    take(p.own_sums, alone ? 0 : own), take(p.own_rows, alone ? 0 : own * p.pitch);
    take(p.prefix_sums, prefix), take(p.prefix_rows, prefix * p.pitch);
    take(p.chunks, p.chunk_count), take(p.order, p.prefixes ? p.batch : 0), take(p.cursor, p.prefixes);
    return used;
}

// Blocks for this many groups of rows, as many times as it takes to fill a GPU, if there may be so many parts.
int64_t blocks_for(int64_t groups, int64_t most) {
    return groups * std::max<int64_t>(std::min(ceil_div(ENOUGH_BLOCKS, std::max<int64_t>(groups, 1)), most), 1);
}

template <class T, int WIDTH, bool MANY>
void launch_parts(const Decode& p, cudaStream_t stream) {
    using S = Shape<T, WIDTH, MANY>;
    const int bytes = p.prefix_blocks ? std::max(S::BYTES, Shape<T, WIDTH, true>::BYTES) : S::BYTES;
    const int64_t own = blocks_for(ceil_div(p.group, S::BLOCK_ROWS) * p.kv_heads * p.batch, p.own_parts);
    if (own + p.prefix_blocks > INT32_MAX) throw std::invalid_argument("attention_decode: expected fewer than 2^31 blocks of work");
    const dim3 grid(static_cast<unsigned>(own + p.prefix_blocks));
    launch(decode_parts<T, WIDTH, MANY>, grid, dim3(S::THREADS), bytes, stream, WHAT, p);
}

template <class T, int WIDTH>
void run(Decode& p, cudaStream_t stream) {
    if (p.prefixes) {
        launch(decode_plan, dim3(1), dim3(PLAN_THREADS), 0, stream, WHAT, p, Shape<T, WIDTH, true>::BLOCK_ROWS);
        const int64_t groups = static_cast<int64_t>(p.chunk_count) * p.kv_heads;
        if (p.prefix_parts) p.prefix_blocks = static_cast<unsigned>(blocks_for(groups, p.prefix_parts));
    }
    (p.group > Shape<T, WIDTH, false>::ROWS ? launch_parts<T, WIDTH, true> : launch_parts<T, WIDTH, false>)(p, stream);
    if (p.prefixes || p.own_parts > 1)
        launch(decode_combine<T>, dim3(static_cast<unsigned>(p.batch * p.heads)), dim3(COMBINE_THREADS), 0, stream, WHAT, p);
}

bool in_packs(int64_t dim, int64_t size, std::initializer_list<const void*> pointers, std::initializer_list<int64_t> strides) {
    bool all = dim * size % 16 == 0;
    for (const void* pointer : pointers) all = all && reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
    for (const int64_t stride : strides) all = all && stride * size % 16 == 0;
    return all;
}

Decode sizes(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, int64_t prefixes, int64_t tokens) {
    Decode p{};
    p.batch = static_cast<int>(batch), p.heads = static_cast<int>(heads), p.kv_heads = static_cast<int>(kv_heads);
    p.group = static_cast<int>(heads / kv_heads), p.dim = static_cast<int>(head_dim);
    p.pitch = static_cast<int>(ceil_div(head_dim, 4) * 4);
    p.capacity = capacity, p.prefix_capacity = tokens, p.prefixes = static_cast<int>(prefixes);
    p.own_parts = static_cast<int>(most_parts(capacity, OWN_PARTS));
    p.prefix_parts = prefixes ? static_cast<int>(most_parts(tokens, PREFIX_PARTS)) : 0;
    return p;
}

}  // namespace

namespace gpu {

int64_t attention_decode_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity,
                                   int64_t prefixes, int64_t prefix_tokens) {
    Decode p = sizes(batch, heads, kv_heads, head_dim, capacity, prefixes, prefix_tokens);
    p.chunk_count = prefixes ? static_cast<int>(most_chunks(batch, p.group, prefixes, rows_of_block(true, 256))) : 0;
    return divide(p, nullptr);
}

void attention_decode(const DecodeProblem& given, int64_t capacity, int64_t prefix_tokens, const DecodePages& pages, void* workspace,
                      cudaStream_t stream) {
    Decode p = sizes(given.batch, given.heads, given.kv_heads, given.head_dim, capacity, given.prefixes, prefix_tokens);
    if (!p.batch) return;
    if (given.batch * given.heads > MOST || capacity > MOST || prefix_tokens > MOST)
        throw std::invalid_argument("attention_decode: expected at most 2^30 queries, and as many keys of one");
    const int64_t size = given.dtype ? 2 : 4;
    const int width = p.dim <= 64 ? 64 : p.dim <= 128 ? 128 : 256;
    if (p.prefixes) p.chunk_count = static_cast<int>(most_chunks(p.batch, p.group, p.prefixes, rows_of_block(!given.dtype, width)));
    p.scale = given.scale * LOG2E, p.q = given.q, p.out = given.out, p.lengths = given.lengths;
    p.owner = given.owner, p.bounds = given.prefix_bounds, p.prefix_lengths = pages.prefix_lengths, p.optional = pages.size;
    p.own = {given.k, given.v, given.k_batch, given.k_token, given.k_head, given.v_batch, given.v_token, given.v_head,
             pages.own, pages.own_width, static_cast<int>(pages.size), static_cast<int>(pages.count), false};
    if (pages.size) {
        p.prefix = p.own, p.prefix.pages = pages.prefix, p.prefix.width = pages.prefix_width;
    } else {
        const Rows &k = given.prefix_k, &v = given.prefix_v;
        p.prefix = {k.data, v.data, 0, k.token_stride, k.head_stride, 0, v.token_stride, v.head_stride, nullptr, 0, 1, 1, false};
    }
    for (Source* s : {&p.own, &p.prefix})
        s->packs = in_packs(p.dim, size, {s->k, s->v}, {s->k_page, s->k_token, s->k_head, s->v_page, s->v_token, s->v_head});
    p.q_packs = in_packs(p.dim, size, {p.q.data}, {p.q.token_stride, p.q.head_stride});
    divide(p, static_cast<unsigned char*>(workspace));
    by_dtype(given.dtype, [&](auto type) {
        using T = decltype(type);
        width == 64 ? run<T, 64>(p, stream) : width == 128 ? run<T, 128>(p, stream) : run<T, 256>(p, stream);
    });
}

}  // namespace gpu

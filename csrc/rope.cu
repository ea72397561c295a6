// A block has a few tokens. Their angles are computed once, in fp64 down to a quarter turn, and all heads share them; a group of
// threads has a head, each thread one chunk of its first half and the same of its second.
#include "rope.h"

#include <algorithm>

#include "gpu.h"
#include "rows.cuh"
#include "sums.cuh"

namespace {

constexpr int BLOCK = 256;

// Of an angle of at least 0. What is left of it beyond whole quarter turns, at most pi/4, goes into the series; fp64's error is
// 6e-17 a quarter turn.
DEVICE void turn(double angle, float& cosine, float& sine) {
    const double quarters = rint(angle * 0.63661977236758134);
    const float x = static_cast<float>(fma(quarters, -1.5707963267948966, angle)), xx = x * x;
    const float s = x + x * xx * (-1.f / 6 + xx * (1.f / 120 + xx * (-1.f / 5040 + xx * (1.f / 362880))));
    const float c = 1 + xx * (-1.f / 2 + xx * (1.f / 24 + xx * (-1.f / 720 + xx * (1.f / 40320 - xx * (1.f / 3628800)))));
    const int quadrant = static_cast<int>(static_cast<long long>(quarters) & 3);
    cosine = quadrant == 0 ? c : quadrant == 1 ? -s : quadrant == 2 ? -c : s;
    sine = quadrant == 0 ? s : quadrant == 1 ? c : quadrant == 2 ? -s : -c;
}

// Cosines, then sines, of tokens from `first` on, in shared memory. A negative position: NaN.
DEVICE void fill_table(const RopeProblem& p, const double* frequencies, int64_t first, int tokens, int size, float* table) {
    const int half = static_cast<int>(p.half);
    for (int i = threadIdx.x; i < tokens * half; i += blockDim.x) {
        const int token = i / half;
        const int64_t position = p.positions[first + token];
        float cosine = NAN, sine = NAN;
        if (position >= 0) turn(static_cast<double>(position) * frequencies[i - token * half], cosine, sine);
        table[i] = cosine, table[size + i] = sine;
    }
}

template <class T>
DEVICE T* head_of(const Rows& rows, int64_t token, int head) {
    return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

// BACK turns dout the other way, which is the gradient where nothing is normalised. Without HELD a head is longer than a chunk a
// thread, and is read again.
template <class T, int W, int GROUP, bool HELD, bool BACK>
__global__ __launch_bounds__(BLOCK) void rope_kernel(RopeProblem p, const double* frequencies, int tile) {
    constexpr int GROUPS = BLOCK / GROUP;
    auto* table = reinterpret_cast<float*>(shared_memory());
    const int half = static_cast<int>(p.half), chunks = half / W, size = tile * half;
    const int lane = threadIdx.x % GROUP, group = threadIdx.x / GROUP;
    const int64_t first = static_cast<int64_t>(blockIdx.x) * tile;
    const int tokens = static_cast<int>(min(static_cast<int64_t>(tile), p.tokens - first));
    fill_table(p, frequencies, first, tokens, size, table);
    __syncthreads();
    const int q_heads = static_cast<int>(p.q.heads), heads = q_heads + static_cast<int>(p.k.heads), items = tokens * heads;
    for (int base = 0; base < items; base += GROUPS) {  // as often in all threads
        const int item = base + group, token = item / heads, at = item - token * heads;
        const bool inside = item < items, of_q = at < q_heads;
        const Rows from = BACK ? (of_q ? p.q.dout : p.k.dout) : of_q ? p.q.x : p.k.x, to = of_q ? p.q.out : p.k.out;
        const float* weight = BACK ? nullptr : of_q ? p.q.weight : p.k.weight;
        const T* x = head_of<const T>(from, first + token, of_q ? at : at - q_heads);
        T* out = head_of<T>(to, first + token, of_q ? at : at - q_heads);
        Chunk<T, W> a = filled<T, W>(0), b = a;
        float u[W], v[W], scale = 1;
        if (HELD && inside && lane < chunks) a = load_chunk<W>(x + lane * W), b = load_chunk<W>(x + half + lane * W);
        if (!BACK && p.q.weight) {
            float squares = 0;
            for (int j = lane; j < chunks && inside; j += GROUP) {
                if (!HELD) a = load_chunk<W>(x + j * W), b = load_chunk<W>(x + half + j * W);
                unpack(a, u), unpack(b, v);
#pragma unroll
                for (int w = 0; w < W; ++w) squares += u[w] * u[w] + v[w] * v[w];
                if (HELD) break;
            }
            scale = 1 / sqrtf(group_sum<GROUP>(squares, nullptr) / static_cast<float>(2 * half) + p.eps);
        }
        for (int j = lane; j < chunks && inside; j += GROUP) {
            if (!HELD) a = load_chunk<W>(x + j * W), b = load_chunk<W>(x + half + j * W);
            unpack(a, u), unpack(b, v);
            float c[W], s[W];
            if (weight) {
                load_floats(weight + j * W, c), load_floats(weight + half + j * W, s);
#pragma unroll
                for (int w = 0; w < W; ++w) u[w] *= scale * c[w], v[w] *= scale * s[w];
            }
            load_floats(table + token * half + j * W, c), load_floats(table + size + token * half + j * W, s);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float one = u[w], sine = BACK ? -s[w] : s[w];
                u[w] = one * c[w] - v[w] * sine;
                v[w] = v[w] * c[w] + one * sine;
            }
            store_values<W>(out + j * W, u), store_values<W>(out + half + j * W, v);
            if (HELD) break;
        }
    }
}

// The gradient g of what was turned is dout turned back. Through the norm: dx = s (g w - x s^2 mean(g w x)), and dw gets g x s:
// where a head is HELD its thread adds it up in `dweight`, else in the block's only warp's `shared`.
template <class T, int W, int GROUP, bool HELD>
DEVICE void backward_heads(const RopeProblem& p, const RopeHeads& h, const float* table, int size, int64_t first, int tokens,
                           float (&dweight)[2][W], float* shared) {
    const int half = static_cast<int>(p.half), chunks = half / W, heads = static_cast<int>(h.heads), items = tokens * heads;
    const int lane = threadIdx.x % GROUP, groups = blockDim.x / GROUP;
    for (int base = 0; base < items; base += groups) {
        const int item = base + threadIdx.x / GROUP, token = item / heads, head = item - token * heads;
        const bool inside = item < items;
        const T *x = head_of<const T>(h.x, first + token, head), *dout = head_of<const T>(h.dout, first + token, head);
        T* dx = head_of<T>(h.out, first + token, head);
        Chunk<T, W> a = filled<T, W>(0), b = a, da = a, db = a;
        float x1[W], x2[W], g1[W], g2[W];
        const auto load = [&](int j) {
            a = load_chunk<W>(x + j * W), b = load_chunk<W>(x + half + j * W);
            da = load_chunk<W>(dout + j * W), db = load_chunk<W>(dout + half + j * W);
        };
        const auto turn_back = [&](int j) {
            float c[W], s[W];
            unpack(a, x1), unpack(b, x2), unpack(da, g1), unpack(db, g2);
            load_floats(table + token * half + j * W, c), load_floats(table + size + token * half + j * W, s);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float one = g1[w];
                g1[w] = one * c[w] + g2[w] * s[w];
                g2[w] = g2[w] * c[w] - one * s[w];
            }
        };
        if (HELD && inside && lane < chunks) load(lane), turn_back(lane);
        float squares = 0, dot = 0;
        for (int j = lane; j < chunks && inside; j += GROUP) {
            if (!HELD) load(j), turn_back(j);
            float w1[W], w2[W];
            load_floats(h.weight + j * W, w1), load_floats(h.weight + half + j * W, w2);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                squares += x1[w] * x1[w] + x2[w] * x2[w];
                dot += g1[w] * w1[w] * x1[w] + g2[w] * w2[w] * x2[w];
            }
            if (HELD) break;
        }
        const float scale = 1 / sqrtf(group_sum<GROUP>(squares, nullptr) / static_cast<float>(2 * half) + p.eps);
        const float pull = group_sum<GROUP>(dot, nullptr) / static_cast<float>(2 * half) * scale * scale;
        for (int j = lane; j < chunks && inside; j += GROUP) {
            if (!HELD) load(j), turn_back(j);
            float w1[W], w2[W];
            load_floats(h.weight + j * W, w1), load_floats(h.weight + half + j * W, w2);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float one = g1[w] * x1[w] * scale, two = g2[w] * x2[w] * scale;
                if (HELD) dweight[0][w] += one, dweight[1][w] += two;
                else shared[j * W + w] += one, shared[half + j * W + w] += two;
                g1[w] = scale * (g1[w] * w1[w] - x1[w] * pull);
                g2[w] = scale * (g2[w] * w2[w] - x2[w] * pull);
            }
            store_values<W>(dx + j * W, g1), store_values<W>(dx + half + j * W, g2);
            if (HELD) break;
        }
    }
}

// `partial` gets a row of 4 half from every block: dw of q's first half, its second, k's first, its second. Shared memory: the
// table, and the sums of the groups or of the only one.
template <class T, int W, int GROUP, bool HELD>
__global__ __launch_bounds__(HELD ? BLOCK : GROUP) void rope_norm_backward_kernel(RopeProblem p, const double* frequencies, int tile,
                                                                                 float* partial) {
    auto* table = reinterpret_cast<float*>(shared_memory());
    const int half = static_cast<int>(p.half), size = tile * half;
    float* sums = table + 2 * size;
    float dq[2][W], dk[2][W];
#pragma unroll
    for (int w = 0; w < W; ++w) dq[0][w] = dq[1][w] = dk[0][w] = dk[1][w] = 0;
    if (!HELD)
        for (int i = threadIdx.x; i < 4 * half; i += GROUP) sums[i] = 0;
    for (int64_t first = static_cast<int64_t>(blockIdx.x) * tile; first < p.tokens; first += static_cast<int64_t>(gridDim.x) * tile) {
        const int tokens = static_cast<int>(min(static_cast<int64_t>(tile), p.tokens - first));
        __syncthreads();  // the table may still be read
        fill_table(p, frequencies, first, tokens, size, table);
        __syncthreads();
        backward_heads<T, W, GROUP, HELD>(p, p.q, table, size, first, tokens, dq, sums);
        backward_heads<T, W, GROUP, HELD>(p, p.k, table, size, first, tokens, dk, sums + 2 * half);
    }
    float* to = partial + static_cast<int64_t>(blockIdx.x) * 4 * half;
    __syncthreads();
    if (HELD) {
        constexpr int GROUPS = BLOCK / GROUP, WIDTH = 4 * GROUP * W;
        float* mine = table + threadIdx.x / GROUP * WIDTH + threadIdx.x % GROUP * W;  // over the table
        store_shared(mine, dq[0]), store_shared(mine + GROUP * W, dq[1]);
        store_shared(mine + 2 * GROUP * W, dk[0]), store_shared(mine + 3 * GROUP * W, dk[1]);
        __syncthreads();
        for (int i = threadIdx.x; i < 4 * half; i += BLOCK) {
            const int quarter = i / half;
            float sum = 0;
            for (int g = 0; g < GROUPS; ++g) sum += table[g * WIDTH + quarter * GROUP * W + i - quarter * half];
            to[i] = sum;
        }
    } else {
        for (int i = threadIdx.x; i < 4 * half; i += GROUP) to[i] = sums[i];
    }
}

constexpr int64_t MULTIPROCESSORS = 132, RESIDENT = 2;  // of an H100, and the blocks that walk over the tokens on each

// Tokens of a block: as many angles as threads, but blocks for all multiprocessors.
int tile_of(const RopeProblem& p) {
    return static_cast<int>(std::max(int64_t{1}, std::min(BLOCK / p.half, ceil_div(p.tokens, MULTIPROCESSORS))));
}

auto fits(const RopeProblem& p) {
    return [&p](int64_t size) {
        bool ok = aligned({p.q.weight, p.k.weight}, {p.half * size, p.half * 4});
        for (const RopeHeads& h : {p.q, p.k})
            for (const Rows& rows : {h.x, h.out, h.dout})
                ok = ok && (!h.heads || aligned({rows.data}, {rows.token_stride * size, rows.head_stride * size}));
        return ok;
    };
}

// Calls f(GROUP, HELD) as constants.
template <int W, class F>
void by_group(int64_t chunks, F&& f) {
    using std::integral_constant;
    if constexpr (W > 1) {
        if (chunks <= 4) return f(integral_constant<int, 4>{}, std::true_type{});
        if (chunks <= 8) return f(integral_constant<int, 8>{}, std::true_type{});
        if (chunks <= 16) return f(integral_constant<int, 16>{}, std::true_type{});
    }
    chunks <= WARP ? f(integral_constant<int, WARP>{}, std::true_type{}) : f(integral_constant<int, WARP>{}, std::false_type{});
}

template <bool BACK>
void turn_heads(const RopeProblem& p, const double* frequencies, cudaStream_t stream) {
    if (!p.tokens || !p.half) return;
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        by_group<W>(p.half / W, [&](auto group, auto held) {
            const int tile = tile_of(p);
            launch(rope_kernel<T, W, decltype(group)::value, decltype(held)::value, BACK>, blocks(ceil_div(p.tokens, tile)), BLOCK,
                   2 * sizeof(float) * tile * p.half, stream, "rope", p, frequencies, tile);
        });
    });
}

}  // namespace

namespace gpu {

int64_t rope_workspace(int64_t tokens, int64_t half) {
    return std::min(tokens, MULTIPROCESSORS * RESIDENT) * 4 * half * static_cast<int64_t>(sizeof(float));
}

void rope_forward(const RopeProblem& p, const double* frequencies, cudaStream_t stream) { turn_heads<false>(p, frequencies, stream); }

void rope_backward(const RopeProblem& p, const double* frequencies, void* workspace, cudaStream_t stream) {
    if (!p.dweight) return turn_heads<true>(p, frequencies, stream);
    if (!p.half) return;
    auto* partial = static_cast<float*>(workspace);
    const int tile = tile_of(p);
    const int64_t sums = std::min(ceil_div(p.tokens, tile), MULTIPROCESSORS * RESIDENT);
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        by_group<W>(p.half / W, [&](auto group, auto held) {
            constexpr int GROUP = decltype(group)::value;
            constexpr bool HELD = decltype(held)::value;
            const size_t table = sizeof(float) * 2 * tile * p.half;
            const size_t shared = HELD ? std::max(table, sizeof(float) * BLOCK * 4 * W) : table + sizeof(float) * 4 * p.half;
            launch(rope_norm_backward_kernel<T, W, GROUP, HELD>, blocks(sums), HELD ? BLOCK : GROUP, shared, stream, "rope", p,
                   frequencies, tile, partial);
        });
    });
    add_partial_sums(partial, sums, 4 * p.half, p.half, rope_room(p.half), p.dweight, stream, "rope");
}

}  // namespace gpu

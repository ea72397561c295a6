// Forward: a row lives in registers, as in softmax.cu, so that it is read once. Backward: blocks walk over the rows, each thread
// always at the same columns, whose part of dweight stays in its registers; the blocks' sums are added at the end, in order.
#include "norm.h"

#include <algorithm>

#include "gpu.h"
#include "rows.cuh"
#include "sums.cuh"

namespace {

template <class T, int W, class S, bool RESIDUAL>
__global__ __launch_bounds__(S::BLOCK) void norm_forward_kernel(NormProblem p) {
    __shared__ float room[WARP];
    const int lane = threadIdx.x % S::GROUP, chunks = static_cast<int>(p.columns / W);
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (S::BLOCK / S::GROUP) + threadIdx.x / S::GROUP) * S::ROWS;
    const int64_t offset = first * p.columns;
    Chunk<T, W> held[S::ROWS][S::HELD];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i)
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            held[i][h] = first + i < p.rows && j < chunks ? load_chunk<W>(static_cast<const T*>(p.x) + offset + i * p.columns + j * W)
                                                         : filled<T, W>(0);
        }
    if constexpr (RESIDUAL) {
        Chunk<T, W> more[S::ROWS][S::HELD];  // all read before the first is written
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i)
#pragma unroll
            for (int h = 0; h < S::HELD; ++h) {
                const int j = lane + h * S::GROUP;
                if (first + i < p.rows && j < chunks)
                    more[i][h] = load_chunk<W>(static_cast<const T*>(p.residual) + offset + i * p.columns + j * W);
            }
#pragma unroll
        for (int i = 0; i < S::ROWS; ++i)
#pragma unroll
            for (int h = 0; h < S::HELD; ++h) {
                const int j = lane + h * S::GROUP;
                if (first + i >= p.rows || j >= chunks) continue;
                float v[W], r[W];
                unpack(held[i][h], v), unpack(more[i][h], r);
#pragma unroll
                for (int w = 0; w < W; ++w) v[w] += r[w];
                pack(held[i][h], v);  // rounded: as backward will read it
                store_chunk(static_cast<T*>(p.total) + offset + i * p.columns + j * W, held[i][h]);
            }
    }
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
        float v[W], weight[W], squares = 0;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            unpack(held[i][h], v);
#pragma unroll
            for (int w = 0; w < W; ++w) squares += v[w] * v[w];
        }
        const float scale = 1 / sqrtf(group_sum<S::GROUP>(squares, room) / static_cast<float>(p.columns) + p.eps);
        if (first + i < p.rows && lane == 0) p.scale[first + i] = scale;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            if (first + i >= p.rows || j >= chunks) continue;
            unpack(repacked(held[i][h], p.rows < 0), v);
            load_floats(p.weight + j * W, weight);
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] *= scale * weight[w];
            store_values<W>(static_cast<T*>(p.y) + offset + i * p.columns + j * W, v);
        }
    }
}

// Rows too long for registers are read again.
constexpr int LONG_BLOCK = 1024;

template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void norm_forward_long_kernel(NormProblem p) {
    __shared__ float room[WARP];
    const int64_t row = blockIdx.x, offset = row * p.columns, chunks = p.columns / W;
    const T* x = static_cast<const T*>(p.x) + offset;
    float v[W], r[W], squares = 0;
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < chunks; j += LONG_BLOCK) {
        unpack(load_chunk<W>(x + j * W), v);
        if (p.residual) {
            unpack(load_chunk<W>(static_cast<const T*>(p.residual) + offset + j * W), r);
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] += r[w];
            Chunk<T, W> kept;
            pack(kept, v);
            unpack(kept, v);
            store_chunk(static_cast<T*>(p.total) + offset + j * W, kept);
        }
#pragma unroll
        for (int w = 0; w < W; ++w) squares += v[w] * v[w];
    }
    const float scale = 1 / sqrtf(block_sum(squares, room) / static_cast<float>(p.columns) + p.eps);
    if (threadIdx.x == 0) p.scale[row] = scale;
    if (p.residual) x = static_cast<const T*>(p.total) + offset;  // each thread reads what it wrote
#pragma unroll 4
    for (int64_t j = threadIdx.x; j < chunks; j += LONG_BLOCK) {
        unpack(load_chunk<W>(x + j * W), v);
        load_floats(p.weight + j * W, r);
#pragma unroll
        for (int w = 0; w < W; ++w) v[w] *= scale * r[w];
        store_values<W>(static_cast<T*>(p.y) + offset + j * W, v);
    }
}

// With s = 1 / rms:  dx = s (dy w - x s^2 mean(dy w x)) + dtotal  and  dw = sum over rows of dy x s.
// `partial` gets a row of dweight from every block.
template <class T, int W, class S>
__global__ __launch_bounds__(S::BLOCK, S::RESIDENT) void norm_backward_kernel(NormProblem p, float* partial) {
    constexpr int GROUPS = S::BLOCK / S::GROUP;
    __shared__ float room[WARP];
    const int lane = threadIdx.x % S::GROUP, group = threadIdx.x / S::GROUP, chunks = static_cast<int>(p.columns / W);
    float dweight[S::HELD][W];
#pragma unroll
    for (int h = 0; h < S::HELD; ++h)
#pragma unroll
        for (int w = 0; w < W; ++w) dweight[h][w] = 0;
    // All threads of a block make the same number of rounds.
    for (int64_t base = static_cast<int64_t>(blockIdx.x) * GROUPS; base < p.rows; base += static_cast<int64_t>(gridDim.x) * GROUPS) {
        const int64_t row = base + group, offset = row * p.columns;
        const bool inside = row < p.rows;
        Chunk<T, W> x[S::HELD], dy[S::HELD], more[S::HELD];
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            x[h] = inside && j < chunks ? load_chunk<W>(static_cast<const T*>(p.x) + offset + j * W) : filled<T, W>(0);
            dy[h] = inside && j < chunks ? load_chunk<W>(static_cast<const T*>(p.dy) + offset + j * W) : filled<T, W>(0);
            more[h] = p.dtotal && inside && j < chunks ? load_chunk<W>(static_cast<const T*>(p.dtotal) + offset + j * W) : filled<T, W>(0);
        }
        const float scale = inside ? p.scale[row] : 0;
        float v[W], g[W], other[W], dot = 0;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            if (j >= chunks) continue;
            unpack(x[h], v), unpack(dy[h], g);
            load_floats(p.weight + j * W, other);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float product = g[w] * v[w];
                dot += product * other[w];
                if (inside) dweight[h][w] += product * scale;
            }
        }
        const float pull = group_sum<S::GROUP>(dot, room) / static_cast<float>(p.columns) * scale * scale;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            if (!inside || j >= chunks) continue;
            unpack(repacked(x[h], p.rows < 0), v), unpack(repacked(dy[h], p.rows < 0), g);
            load_floats(p.weight + j * W, other);
#pragma unroll
            for (int w = 0; w < W; ++w) g[w] = scale * (g[w] * other[w] - v[w] * pull);
            unpack(more[h], other);
            if (p.dtotal)
#pragma unroll
                for (int w = 0; w < W; ++w) g[w] += other[w];
            store_values<W>(static_cast<T*>(p.dx) + offset + j * W, g);
        }
    }
    float* to = partial + blockIdx.x * p.columns;
    if constexpr (GROUPS == 1) {
#pragma unroll
        for (int h = 0; h < S::HELD; ++h)
            if (lane + h * S::GROUP < chunks) store_floats(to + (lane + h * S::GROUP) * W, dweight[h]);
    } else {
        // The groups' sums through shared memory, one column a thread: wide enough that no two lanes meet in a bank.
        constexpr int WIDTH = S::GROUP * S::HELD * W;
        auto* all = reinterpret_cast<float*>(shared_memory());
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) store_shared(all + group * WIDTH + (lane + h * S::GROUP) * W, dweight[h]);
        __syncthreads();
        for (int c = threadIdx.x; c < p.columns; c += S::BLOCK) {
            float sum = 0;
            for (int i = 0; i < GROUPS; ++i) sum += all[i * WIDTH + c];
            to[c] = sum;
        }
    }
}

template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void norm_backward_long_kernel(NormProblem p) {
    __shared__ float room[WARP];
    const int64_t row = blockIdx.x, offset = row * p.columns, chunks = p.columns / W;
    float v[W], g[W], other[W], dot = 0;
    for (int64_t j = threadIdx.x; j < chunks; j += LONG_BLOCK) {
        unpack(load_chunk<W>(static_cast<const T*>(p.x) + offset + j * W), v);
        unpack(load_chunk<W>(static_cast<const T*>(p.dy) + offset + j * W), g);
        load_floats(p.weight + j * W, other);
#pragma unroll
        for (int w = 0; w < W; ++w) dot += g[w] * v[w] * other[w];
    }
    const float scale = p.scale[row], pull = block_sum(dot, room) / static_cast<float>(p.columns) * scale * scale;
    for (int64_t j = threadIdx.x; j < chunks; j += LONG_BLOCK) {
        unpack(load_chunk<W>(static_cast<const T*>(p.x) + offset + j * W), v);
        unpack(load_chunk<W>(static_cast<const T*>(p.dy) + offset + j * W), g);
        load_floats(p.weight + j * W, other);
#pragma unroll
        for (int w = 0; w < W; ++w) g[w] = scale * (g[w] * other[w] - v[w] * pull);
        if (p.dtotal) {
            unpack(load_chunk<W>(static_cast<const T*>(p.dtotal) + offset + j * W), other);
#pragma unroll
            for (int w = 0; w < W; ++w) g[w] += other[w];
        }
        store_values<W>(static_cast<T*>(p.dx) + offset + j * W, g);
    }
}
// dweight of long rows: a thread has one chunk of columns, and of the rows those that its block's slab has.
template <class T, int W>
__global__ __launch_bounds__(256) void norm_dweight_long_kernel(NormProblem p, int64_t slabs, float* partial) {
    const int64_t slab = blockIdx.x % slabs, j = blockIdx.x / slabs * 256 + threadIdx.x;
    if (j >= p.columns / W) return;
    float v[W], g[W], sum[W];
#pragma unroll
    for (int w = 0; w < W; ++w) sum[w] = 0;
#pragma unroll 4
    for (int64_t row = slab; row < p.rows; row += slabs) {
        unpack(load_chunk<W>(static_cast<const T*>(p.x) + row * p.columns + j * W), v);
        unpack(load_chunk<W>(static_cast<const T*>(p.dy) + row * p.columns + j * W), g);
        const float scale = p.scale[row];
#pragma unroll
        for (int w = 0; w < W; ++w) sum[w] += g[w] * v[w] * scale;
    }
    store_floats(partial + slab * p.columns + j * W, sum);
}

// RESIDENT blocks fit on a multiprocessor: so many are started for each of an H100's.
template <int GROUP, int HELD, int RESIDENT_>
struct Walk : Shape<GROUP, HELD> {
    static constexpr int RESIDENT = RESIDENT_;
};
template <class F>
bool by_walk(int64_t chunks, F&& f) {
    if (chunks <= 8) return f(Walk<8, 1, 4>{}), true;
    if (chunks <= 32) return f(Walk<32, 1, 4>{}), true;
    if (chunks <= 64) return f(Walk<32, 2, 3>{}), true;
    if (chunks <= 128) return f(Walk<32, 4, 2>{}), true;
    if (chunks <= 256) return f(Walk<128, 2, 4>{}), true;
    if (chunks <= 512) return f(Walk<256, 2, 3>{}), true;
    if (chunks <= 1024) return f(Walk<512, 2, 2>{}), true;
    if (chunks <= 2048) return f(Walk<1024, 2, 1>{}), true;
    return false;
}
constexpr int64_t MULTIPROCESSORS = 132, MOST = 4 * MULTIPROCESSORS, SLABS = 16;

auto fits(const NormProblem& p) {
    return [&p](int64_t size) {
        return aligned({p.x, p.residual, p.weight, p.y, p.total, p.dy, p.dtotal, p.dx}, {p.columns * size, p.columns * 4});
    };
}

}  // namespace

namespace gpu {

int64_t norm_workspace(int64_t rows, int64_t columns) { return std::min(rows, MOST) * columns * static_cast<int64_t>(sizeof(float)); }

void norm_forward(const NormProblem& p, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const auto held = [&](auto shape) {
            using S = decltype(shape);
            const dim3 grid = blocks(ceil_div(p.rows, S::ROWS_OF_A_BLOCK));
            if constexpr (S::HELD <= 4)
                if (p.residual) return launch(norm_forward_kernel<T, W, S, true>, grid, S::BLOCK, 0, stream, "rms_norm", p);
            launch(norm_forward_kernel<T, W, S, false>, grid, S::BLOCK, 0, stream, "rms_norm", p);
        };
        const int64_t chunks = p.columns / W;
        if (!(p.residual ? by_shape<W, 2>(chunks, held) : by_shape<W, 1>(chunks, held)))
            launch(norm_forward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, 0, stream, "rms_norm", p);
    });
}

void norm_backward(const NormProblem& p, void* workspace, cudaStream_t stream) {
    if (!p.columns) return;
    auto* partial = static_cast<float*>(workspace);
    int64_t sums = 0;
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const auto walk = [&](auto shape) {
            using S = decltype(shape);
            sums = std::min(ceil_div(p.rows, S::BLOCK / S::GROUP), MULTIPROCESSORS * S::RESIDENT);
            const size_t shared = S::BLOCK > S::GROUP ? sizeof(float) * S::BLOCK * S::HELD * W : 0;
            launch(norm_backward_kernel<T, W, S>, blocks(sums), S::BLOCK, shared, stream, "rms_norm", p, partial);
        };
        if (by_walk(p.columns / W, walk)) return;
        sums = std::min(p.rows, SLABS);
        launch(norm_backward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, 0, stream, "rms_norm", p);
        launch(norm_dweight_long_kernel<T, W>, blocks(sums * ceil_div(p.columns / W, 256)), 256, 0, stream, "rms_norm", p, sums, partial);
    });
    add_partial_sums(partial, sums, p.columns, p.columns, p.columns, p.dweight, stream, "rms_norm");
}

}  // namespace gpu

// A row lives in the registers of a part of a warp, a warp or a block, so that it is read once and written once. A row too long
// for that is read for its maximum and sum, as much of it as fits kept in shared memory, and the rest read once more, last first,
// out of the L2 cache.
#include "softmax.h"

#include <algorithm>

#include "gpu.h"
#include "rows.cuh"

namespace {

constexpr int LONG_BLOCK = 1024, AHEAD = 4;  // of rows too long for registers: threads, and loads under way in each

template <class T, int W, class S>
__global__ __launch_bounds__(S::BLOCK) void softmax_forward_kernel(SoftmaxProblem p) {
    __shared__ float room[WARP];
    const int lane = threadIdx.x % S::GROUP, chunks = static_cast<int>(p.columns / W);
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (S::BLOCK / S::GROUP) + threadIdx.x / S::GROUP) * S::ROWS;
    const T* x = static_cast<const T*>(p.x) + first * p.columns;
    T* y = static_cast<T*>(p.out) + first * p.columns;
    Chunk<T, W> held[S::ROWS][S::HELD];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i)
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            held[i][h] = first + i < p.rows && j < chunks ? load_chunk<W>(x + i * p.columns + j * W) : filled<T, W>(-INFINITY);
        }
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
        float v[W], maximum = -INFINITY, sum = 0;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            unpack(held[i][h], v);
#pragma unroll
            for (int w = 0; w < W; ++w) maximum = fmaxf(maximum, v[w]);
        }
        maximum = group_max<S::GROUP>(maximum, room);
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            unpack(repacked(held[i][h], p.rows < 0), v);
#pragma unroll
            for (int w = 0; w < W; ++w) sum += ex2((v[w] - maximum) * LOG2E);
        }
        // Threads beyond a row's end add e^-inf; where the row is nothing but -inf all is NaN.
        const float inverse = 1 / group_sum<S::GROUP>(sum, room);
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            unpack(repacked(held[i][h], p.columns < 0), v);
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] = ex2((v[w] - maximum) * LOG2E) * inverse;
            if (first + i < p.rows && j < chunks) store_values<W>(y + i * p.columns + j * W, v);
        }
    }
}

template <class T, int W, class S>
__global__ __launch_bounds__(S::BLOCK, 1024 / S::BLOCK) void softmax_backward_kernel(SoftmaxProblem p) {
    __shared__ float room[WARP];
    const int lane = threadIdx.x % S::GROUP, chunks = static_cast<int>(p.columns / W);
    const int64_t first = (static_cast<int64_t>(blockIdx.x) * (S::BLOCK / S::GROUP) + threadIdx.x / S::GROUP) * S::ROWS;
    const T *y = static_cast<const T*>(p.x) + first * p.columns, *dy = static_cast<const T*>(p.dy) + first * p.columns;
    T* dx = static_cast<T*>(p.out) + first * p.columns;
    Chunk<T, W> held[S::ROWS][S::HELD], gradient[S::ROWS][S::HELD];
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i)
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            const bool inside = first + i < p.rows && j < chunks;
            held[i][h] = inside ? load_chunk<W>(y + i * p.columns + j * W) : filled<T, W>(0);
            gradient[i][h] = inside ? load_chunk<W>(dy + i * p.columns + j * W) : filled<T, W>(0);
        }
#pragma unroll
    for (int i = 0; i < S::ROWS; ++i) {
        float v[W], g[W], dot = 0;
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            unpack(held[i][h], v), unpack(gradient[i][h], g);
            float part = 0;
#pragma unroll
            for (int w = 0; w < W; ++w) part += v[w] * g[w];
            dot += part;
        }
        dot = group_sum<S::GROUP>(dot, room);
#pragma unroll
        for (int h = 0; h < S::HELD; ++h) {
            const int j = lane + h * S::GROUP;
            unpack(repacked(held[i][h], p.rows < 0), v), unpack(repacked(gradient[i][h], p.rows < 0), g);
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] *= g[w] - dot;
            if (first + i < p.rows && j < chunks) store_values<W>(dx + i * p.columns + j * W, v);
        }
    }
}

// The maximum of what a thread has seen, and the sum of e^(x - maximum).
struct Running {
    float maximum = -INFINITY, sum = 0;

    DEVICE void move_to(float higher) {
        if (maximum > -INFINITY) sum *= ex2((maximum - higher) * LOG2E);  // else it is 0, or NaN and stays that
        maximum = higher;
    }
    template <class T, int W, int N>
    DEVICE void add(const Chunk<T, W> (&chunks)[N]) {
        float v[W], top = -INFINITY;
#pragma unroll
        for (int n = 0; n < N; ++n) {
            unpack(chunks[n], v);
#pragma unroll
            for (int w = 0; w < W; ++w) top = fmaxf(top, v[w]);
        }
        if (top > maximum) move_to(top);
        const float shift = maximum > -INFINITY ? maximum : 0;  // -inf - -inf would be NaN
#pragma unroll
        for (int n = 0; n < N; ++n) {
            unpack(chunks[n], v);
#pragma unroll
            for (int w = 0; w < W; ++w) sum += ex2((v[w] - shift) * LOG2E);
        }
    }
};

// Of the columns from `begin` to `end` of a row, in chunks, over the block; f(chunk, j) sees each.
template <class T, int W, class F>
DEVICE Running running(const T* x, int begin, int end, float* room, F&& f) {
    Running mine;
    for (int base = begin + threadIdx.x; base < end; base += AHEAD * LONG_BLOCK) {
        Chunk<T, W> ahead[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int j = base + n * LONG_BLOCK;
            ahead[n] = j < end ? load_chunk<W>(x + static_cast<int64_t>(j) * W) : filled<T, W>(-INFINITY);
        }
        mine.add(ahead);
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) f(ahead[n], base + n * LONG_BLOCK);
    }
    const float maximum = block_max(mine.maximum, room);
    if (mine.maximum < maximum) mine.move_to(maximum);
    mine.sum = block_sum(mine.sum, room);
    return {maximum, mine.sum};
}

// y's chunks from `begin` to `end`, last first; chunks below `kept` lie in shared memory, each written there by this thread.
template <class T, int W>
DEVICE void write_softmax(const T* x, T* y, int begin, int end, int kept, float maximum, float inverse) {
    const auto* shared = reinterpret_cast<const decltype(Chunk<T, W>::raw)*>(shared_memory());
    const int rounds = (end - begin + AHEAD * LONG_BLOCK - 1) / (AHEAD * LONG_BLOCK);
    for (int round = rounds - 1; round >= 0; --round) {
        const int base = begin + threadIdx.x + round * AHEAD * LONG_BLOCK;
        Chunk<T, W> ahead[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int j = base + n * LONG_BLOCK;
            if (j < kept) ahead[n].raw = shared[j];
            else ahead[n] = j < end ? load_chunk<W>(x + static_cast<int64_t>(j) * W) : filled<T, W>(-INFINITY);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int j = base + n * LONG_BLOCK;
            float v[W];
            unpack(ahead[n], v);
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] = ex2((v[w] - maximum) * LOG2E) * inverse;
            if (j < end) store_values<W>(y + static_cast<int64_t>(j) * W, v);
        }
    }
}

template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_forward_long_kernel(SoftmaxProblem p, int kept) {
    __shared__ float room[WARP];
    auto* shared = reinterpret_cast<decltype(Chunk<T, W>::raw)*>(shared_memory());
    const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.columns;
    const int chunks = static_cast<int>(p.columns / W);
    const Running all = running<T, W>(x, 0, chunks, room, [&](const Chunk<T, W>& chunk, int j) {
        if (j < kept) shared[j] = chunk.raw;
    });
    write_softmax<T, W>(x, static_cast<T*>(p.out) + blockIdx.x * p.columns, 0, chunks, kept, all.maximum, 1 / all.sum);
}

// A few long rows, each by `parts` blocks: first the maximum and sum of every part, then y of every part.
template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_parts_kernel(SoftmaxProblem p, int parts, float2* sums) {
    __shared__ float room[WARP];
    const int row = blockIdx.x / parts, part = blockIdx.x % parts, chunks = static_cast<int>(p.columns / W);
    const int size = (chunks + parts - 1) / parts, begin = min(part * size, chunks), end = min(begin + size, chunks);
    const Running mine = running<T, W>(static_cast<const T*>(p.x) + row * p.columns, begin, end, room, [](const Chunk<T, W>&, int) {});
    if (threadIdx.x == 0) sums[blockIdx.x] = make_float2(mine.maximum, mine.sum);
}
template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_join_kernel(SoftmaxProblem p, int parts, const float2* sums) {
    const int row = blockIdx.x / parts, part = blockIdx.x % parts, chunks = static_cast<int>(p.columns / W);
    const int size = (chunks + parts - 1) / parts, begin = min(part * size, chunks), end = min(begin + size, chunks);
    float maximum = -INFINITY, sum = 0;
    for (int i = 0; i < parts; ++i) maximum = fmaxf(maximum, sums[row * parts + i].x);
    for (int i = 0; i < parts; ++i) {  // in each thread alike
        const float2 one = sums[row * parts + i];
        sum += one.x > -INFINITY ? one.y * ex2((one.x - maximum) * LOG2E) : one.y;
    }
    write_softmax<T, W>(static_cast<const T*>(p.x) + row * p.columns, static_cast<T*>(p.out) + row * p.columns, begin, end, 0,
                        maximum, 1 / sum);
}

template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_backward_long_kernel(SoftmaxProblem p) {
    __shared__ float room[WARP];
    const int64_t offset = blockIdx.x * p.columns;
    const T *y = static_cast<const T*>(p.x) + offset, *dy = static_cast<const T*>(p.dy) + offset;
    T* dx = static_cast<T*>(p.out) + offset;
    const int chunks = static_cast<int>(p.columns / W), rounds = (chunks + 2 * LONG_BLOCK - 1) / (2 * LONG_BLOCK);
    const auto each = [&](int round, auto&& f) {
        Chunk<T, W> held[2], gradient[2];
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            const int j = threadIdx.x + (2 * round + n) * LONG_BLOCK;
            held[n] = j < chunks ? load_chunk<W>(y + static_cast<int64_t>(j) * W) : filled<T, W>(0);
            gradient[n] = j < chunks ? load_chunk<W>(dy + static_cast<int64_t>(j) * W) : filled<T, W>(0);
        }
#pragma unroll
        for (int n = 0; n < 2; ++n) {
            float v[W], g[W];
            unpack(held[n], v), unpack(gradient[n], g);
            f(v, g, threadIdx.x + (2 * round + n) * LONG_BLOCK);
        }
    };
    float dot = 0;
    for (int round = 0; round < rounds; ++round)
        each(round, [&](float (&v)[W], float (&g)[W], int) {
#pragma unroll
            for (int w = 0; w < W; ++w) dot += v[w] * g[w];
        });
    dot = block_sum(dot, room);
    for (int round = rounds - 1; round >= 0; --round)
        each(round, [&](float (&v)[W], float (&g)[W], int j) {
#pragma unroll
            for (int w = 0; w < W; ++w) v[w] *= g[w] - dot;
            if (j < chunks) store_values<W>(dx + static_cast<int64_t>(j) * W, v);
        });
}

constexpr int64_t LONG_ROW = 64 << 10, PART = 16 << 10;  // columns of a row that few blocks should not have alone, and of a part
constexpr int64_t BUSY = 132;                            // rows that keep a large GPU busy

int64_t parts_of(const SoftmaxProblem& p) {
    if (p.rows >= BUSY / 2 || p.columns < LONG_ROW) return 1;
    return std::min(ceil_div(p.columns, PART), ceil_div(BUSY, p.rows));
}

auto fits(const SoftmaxProblem& p) {
    return [&p](int64_t size) { return aligned({p.x, p.dy, p.out}, {p.columns * size}); };
}

}  // namespace

namespace gpu {

int64_t softmax_workspace(int64_t rows, int64_t columns) {
    SoftmaxProblem p{};
    p.rows = rows, p.columns = columns;
    const int64_t parts = rows > 0 ? parts_of(p) : 1;
    return parts > 1 ? rows * parts * static_cast<int64_t>(sizeof(float2)) : 0;
}

void softmax_forward(const SoftmaxProblem& p, void* workspace, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const int64_t chunks = p.columns / W, parts = workspace ? parts_of(p) : 1;
        if (parts > 1) {
            auto* sums = static_cast<float2*>(workspace);
            const int count = static_cast<int>(parts);
            launch(softmax_parts_kernel<T, W>, blocks(p.rows * parts), LONG_BLOCK, 0, stream, "softmax", p, count, sums);
            return launch(softmax_join_kernel<T, W>, blocks(p.rows * parts), LONG_BLOCK, 0, stream, "softmax", p, count, sums);
        }
        const auto held = [&](auto shape) {
            using S = decltype(shape);
            launch(softmax_forward_kernel<T, W, S>, blocks(ceil_div(p.rows, S::ROWS_OF_A_BLOCK)), S::BLOCK, 0, stream, "softmax", p);
        };
        if (by_shape<W, 1>(chunks, held)) return;
        const int64_t size = W * static_cast<int64_t>(sizeof(T));
        const int kept = static_cast<int>(std::min(chunks, (shared_limit() - 1024) / size));
        launch(softmax_forward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, kept * size, stream, "softmax", p, kept);
    });
}

void softmax_backward(const SoftmaxProblem& p, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const auto held = [&](auto shape) {
            using S = decltype(shape);
            launch(softmax_backward_kernel<T, W, S>, blocks(ceil_div(p.rows, S::ROWS_OF_A_BLOCK)), S::BLOCK, 0, stream, "softmax", p);
        };
        if (!by_shape<W, 2>(p.columns / W, held))
            launch(softmax_backward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, 0, stream, "softmax", p);
    });
}

}  // namespace gpu

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

// The maximum of what a thread has seen, and the sum of e^(x - maximum). `never`: see repacked.
struct Running {
    float maximum = -INFINITY, sum = 0;

    DEVICE void move_to(float higher) {
        sum *= ex2((maximum - higher) * LOG2E);
        maximum = higher;
    }
    template <class T, int W, int N>
    DEVICE void add(const Chunk<T, W> (&chunks)[N], bool never) {
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
            unpack(repacked(chunks[n], never), v);
#pragma unroll
            for (int w = 0; w < W; ++w) sum += ex2((v[w] - shift) * LOG2E);
        }
    }
};

// Chunks from `begin` to `end` of a row, over the block, into what a thread has seen; f(chunk, j) sees each.
template <class T, int W, class F>
DEVICE void add_chunks(Running& mine, const T* x, int begin, int end, bool never, F&& f) {
    for (int base = begin + threadIdx.x; base < end; base += AHEAD * LONG_BLOCK) {
        Chunk<T, W> ahead[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int j = base + n * LONG_BLOCK;
            ahead[n] = j < end ? load_chunk<W>(x + static_cast<int64_t>(j) * W) : filled<T, W>(-INFINITY);
        }
        mine.add(ahead, never);
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) f(ahead[n], base + n * LONG_BLOCK);
    }
}
// Of the block, in all threads.
DEVICE Running joined(Running mine, float* room) {
    const float maximum = block_max(mine.maximum, room);
    if (mine.maximum < maximum) mine.move_to(maximum);
    return {maximum, block_sum(mine.sum, room)};
}

template <class T, int W>
DEVICE void write_chunk(T* y, int j, const Chunk<T, W>& x, float maximum, float inverse) {
    float v[W];
    unpack(x, v);
#pragma unroll
    for (int w = 0; w < W; ++w) v[w] = ex2((v[w] - maximum) * LOG2E) * inverse;
    store_values<W>(y + static_cast<int64_t>(j) * W, v);
}
// y's chunks from `begin` to `end`, last first; x's is find(j) where has(j), else it is read.
template <class T, int W, class Has, class Find>
DEVICE void write_chunks(const T* x, T* y, int begin, int end, float maximum, float inverse, Has&& has, Find&& find) {
    const int rounds = (end - begin + AHEAD * LONG_BLOCK - 1) / (AHEAD * LONG_BLOCK);
    for (int round = rounds - 1; round >= 0; --round) {
        const int base = begin + threadIdx.x + round * AHEAD * LONG_BLOCK;
        Chunk<T, W> ahead[AHEAD];
#pragma unroll
        for (int n = 0; n < AHEAD; ++n) {
            const int j = base + n * LONG_BLOCK;
            if (j < end) ahead[n] = has(j) ? find(j) : load_chunk<W>(x + static_cast<int64_t>(j) * W);
        }
#pragma unroll
        for (int n = 0; n < AHEAD; ++n)
            if (base + n * LONG_BLOCK < end) write_chunk(y, base + n * LONG_BLOCK, ahead[n], maximum, inverse);
    }
}

// HELD chunks of a row stay in the registers of each thread, then `kept` in shared memory, each where its own thread put it.
constexpr int HELD = 4;

template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_forward_long_kernel(SoftmaxProblem p, int kept) {
    __shared__ float room[WARP];
    using Raw = decltype(Chunk<T, W>::raw);
    auto* shared = reinterpret_cast<Raw*>(shared_memory());
    constexpr int FIRST = HELD * LONG_BLOCK;
    const int chunks = static_cast<int>(p.columns / W), last = FIRST + kept;
    const T* x = static_cast<const T*>(p.x) + blockIdx.x * p.columns;
    T* y = static_cast<T*>(p.out) + blockIdx.x * p.columns;
    Chunk<T, W> held[HELD];
#pragma unroll
    for (int n = 0; n < HELD; ++n) held[n] = load_chunk<W>(x + (threadIdx.x + n * LONG_BLOCK) * W);
    Running mine;
    mine.add(held, p.columns < 0);
    add_chunks<T, W>(mine, x, FIRST, chunks, p.columns < 0, [&](const Chunk<T, W>& chunk, int j) {
        if (j < last) shared[j - FIRST] = chunk.raw;
    });
    const Running all = joined(mine, room);
    const float inverse = 1 / all.sum;
    write_chunks<T, W>(x, y, FIRST, chunks, all.maximum, inverse, [&](int j) { return j < last; },
                       [&](int j) { return Chunk<T, W>{shared[j - FIRST]}; });
#pragma unroll
    for (int n = 0; n < HELD; ++n)
        write_chunk(y, threadIdx.x + n * LONG_BLOCK, repacked(held[n], p.rows < 0), all.maximum, inverse);
}

// A few long rows, each by `parts` blocks: first the maximum and sum of every part, then y of every part.
template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_parts_kernel(SoftmaxProblem p, int parts, float2* sums) {
    __shared__ float room[WARP];
    const int row = blockIdx.x / parts, part = blockIdx.x % parts, chunks = static_cast<int>(p.columns / W);
    const int size = (chunks + parts - 1) / parts, begin = min(part * size, chunks), end = min(begin + size, chunks);
    Running mine;
    add_chunks<T, W>(mine, static_cast<const T*>(p.x) + row * p.columns, begin, end, p.columns < 0, [](const Chunk<T, W>&, int) {});
    mine = joined(mine, room);
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
        sum += one.y * ex2((one.x - maximum) * LOG2E);
    }
    write_chunks<T, W>(static_cast<const T*>(p.x) + row * p.columns, static_cast<T*>(p.out) + row * p.columns, begin, end, maximum,
                       1 / sum, [](int) { return false; }, [](int) { return filled<T, W>(0); });
}

// As forward, for two rows: half as many chunks of each are held and kept.
template <class T, int W>
__global__ __launch_bounds__(LONG_BLOCK) void softmax_backward_long_kernel(SoftmaxProblem p, int kept) {
    __shared__ float room[WARP];
    auto* shared = reinterpret_cast<decltype(Chunk<T, W>::raw)*>(shared_memory());
    constexpr int PAIRS = HELD / 2, FIRST = PAIRS * LONG_BLOCK;
    const int64_t offset = blockIdx.x * p.columns;
    const T *y = static_cast<const T*>(p.x) + offset, *dy = static_cast<const T*>(p.dy) + offset;
    T* dx = static_cast<T*>(p.out) + offset;
    const int chunks = static_cast<int>(p.columns / W), last = FIRST + kept;
    float dot = 0;
    const auto add = [&](const Chunk<T, W>& chunk, const Chunk<T, W>& gradient) {
        float v[W], g[W];
        unpack(chunk, v), unpack(gradient, g);
#pragma unroll
        for (int w = 0; w < W; ++w) dot += v[w] * g[w];
    };
    const auto write = [&](const Chunk<T, W>& chunk, const Chunk<T, W>& gradient, int j) {
        float v[W], g[W];
        unpack(chunk, v), unpack(gradient, g);
#pragma unroll
        for (int w = 0; w < W; ++w) v[w] *= g[w] - dot;
        store_values<W>(dx + static_cast<int64_t>(j) * W, v);
    };
    Chunk<T, W> held[PAIRS], gradient[PAIRS], ahead[PAIRS], gradient_ahead[PAIRS];
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) {
        held[n] = load_chunk<W>(y + (threadIdx.x + n * LONG_BLOCK) * W);
        gradient[n] = load_chunk<W>(dy + (threadIdx.x + n * LONG_BLOCK) * W);
    }
#pragma unroll
    for (int n = 0; n < PAIRS; ++n) add(held[n], gradient[n]);
    const int rounds = (chunks - FIRST + FIRST - 1) / FIRST;
    for (int round = 0; round < rounds; ++round) {
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            const int j = threadIdx.x + ((1 + round) * PAIRS + n) * LONG_BLOCK;
            ahead[n] = j < chunks ? load_chunk<W>(y + static_cast<int64_t>(j) * W) : filled<T, W>(0);
            gradient_ahead[n] = j < chunks ? load_chunk<W>(dy + static_cast<int64_t>(j) * W) : filled<T, W>(0);
        }
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            const int j = threadIdx.x + ((1 + round) * PAIRS + n) * LONG_BLOCK;
            add(ahead[n], gradient_ahead[n]);
            if (j < last) shared[j - FIRST] = ahead[n].raw, shared[kept + j - FIRST] = gradient_ahead[n].raw;
        }
    }
    dot = block_sum(dot, room);
    for (int round = rounds - 1; round >= 0; --round) {
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            const int j = threadIdx.x + ((1 + round) * PAIRS + n) * LONG_BLOCK;
            if (j >= chunks) continue;
            ahead[n] = j < last ? Chunk<T, W>{shared[j - FIRST]} : load_chunk<W>(y + static_cast<int64_t>(j) * W);
            gradient_ahead[n] = j < last ? Chunk<T, W>{shared[kept + j - FIRST]} : load_chunk<W>(dy + static_cast<int64_t>(j) * W);
        }
#pragma unroll
        for (int n = 0; n < PAIRS; ++n) {
            const int j = threadIdx.x + ((1 + round) * PAIRS + n) * LONG_BLOCK;
            if (j < chunks) write(ahead[n], gradient_ahead[n], j);
        }
    }
#pragma unroll
    for (int n = 0; n < PAIRS; ++n)
        write(repacked(held[n], p.rows < 0), repacked(gradient[n], p.rows < 0), threadIdx.x + n * LONG_BLOCK);
}

// Chunks that shared memory can keep of rows that are read `arrays` at a time.
template <class T, int W>
int kept_of(int64_t chunks, int arrays) {
    return static_cast<int>(std::min(chunks - HELD / arrays * LONG_BLOCK, (shared_limit() - 1024) / (W * int64_t{sizeof(T)} * arrays)));
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
        const int kept = kept_of<T, W>(chunks, 1);
        launch(softmax_forward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, kept * W * sizeof(T), stream, "softmax", p, kept);
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
        if (by_shape<W, 2>(p.columns / W, held)) return;
        const int kept = kept_of<T, W>(p.columns / W, 2);
        launch(softmax_backward_long_kernel<T, W>, blocks(p.rows), LONG_BLOCK, 2 * kept * W * sizeof(T), stream, "softmax", p, kept);
    });
}

}  // namespace gpu

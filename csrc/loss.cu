// With z the logits over the temperature and m their maximum, a row is reduced in one read to
//   s = sum e^(z - m)   and   t = sum e^(z - m) (z - m) <= 0,
// in base 2, moved over whenever a higher maximum comes; then lse = m + log s and entropy = log s - t / s, a sum of terms that
// are never negative: no cancellation. Backward is element by element, in place.
#include "loss.h"

#include <algorithm>

#include "gpu.h"
#include "rows.cuh"

namespace {

constexpr int BLOCK = 512;  // threads of a row, fewer for short ones
template <int W>
constexpr int AHEAD = W == 1 ? 16 : 4;  // loads under way in each of them
constexpr float LOWEST = -1000;        // of an exponent, in place of -inf: 2^LOWEST is 0, and 0 * -inf would be NaN

struct Sums {
    float maximum = -INFINITY, s = 0, t = 0;  // the maximum is of the logits, not of z

    DEVICE void move_to(float higher, float factor) {
        const float shift = fmaxf((maximum - higher) * factor, LOWEST), shrink = ex2(shift);
        t = shrink * (t + shift * s);
        s *= shrink;
        maximum = higher;
    }
};

// Of the whole block, valid in all threads.
DEVICE Sums joined(Sums mine, float factor, float* room) {
    const float maximum = block_max(mine.maximum, room);
    if (mine.maximum < maximum) mine.move_to(maximum, factor);
    mine.s = block_sum(mine.s, room);
    mine.t = block_sum(mine.t, room);
    return {maximum, mine.s, mine.t};
}

template <class T>
DEVICE void finish(const LossProblem& p, int64_t row, const Sums& sums, float inverse) {
    const int64_t target = p.targets[row];
    const float log_s = logf(sums.s);
    float logprob = NAN;
    if (target >= 0 && target < p.columns) {
        const double at_target = static_cast<double>(to_float(static_cast<const T*>(p.logits)[row * p.stride + target])) - sums.maximum;
        logprob = static_cast<float>(at_target * inverse - log_s);
    }
    p.logprob[row] = logprob;
    p.entropy[row] = log_s - sums.t * LN2 / sums.s;
    p.lse[row] = static_cast<double>(sums.maximum) * inverse + log_s;
}

// Block `part` of `parts` of a row. With one alone the row is done, else its sums go to `partial`.
template <class T, int W>
__global__ __launch_bounds__(BLOCK) void loss_forward_kernel(LossProblem p, int parts, Sums* partial) {
    __shared__ float room[WARP];
    const int64_t row = blockIdx.x / parts;
    const int chunks = static_cast<int>(p.columns / W), size = (chunks + parts - 1) / parts, threads = blockDim.x;
    const int begin = static_cast<int>(blockIdx.x % parts) * size, end = min(begin + size, chunks);
    const T* x = static_cast<const T*>(p.logits) + row * p.stride;
    const float inverse = 1 / p.temperature, factor = inverse * LOG2E;
    Sums mine;
    for (int base = begin + threadIdx.x; base < end; base += AHEAD<W> * threads) {
        Chunk<T, W> ahead[AHEAD<W>];
        float v[W], top = -INFINITY;
#pragma unroll
        for (int n = 0; n < AHEAD<W>; ++n) {
            const int j = base + n * threads;
            ahead[n] = j < end ? load_chunk<W>(x + static_cast<int64_t>(j) * W) : filled<T, W>(-INFINITY);
        }
#pragma unroll
        for (int n = 0; n < AHEAD<W>; ++n) {
            unpack(ahead[n], v);
#pragma unroll
            for (int w = 0; w < W; ++w) top = fmaxf(top, v[w]);
        }
        if (top > mine.maximum) mine.move_to(top, factor);
        const float shift = mine.maximum > -INFINITY ? mine.maximum : 0;  // -inf - -inf would be NaN
#pragma unroll
        for (int n = 0; n < AHEAD<W>; ++n) {
            unpack(repacked(ahead[n], p.rows < 0), v);
#pragma unroll
            for (int w = 0; w < W; ++w) {
                const float z = (v[w] - shift) * factor, e = ex2(z);  // z <= 0 whatever the rounding
                mine.s += e;
                mine.t += e * fmaxf(z, LOWEST);
            }
        }
    }
    mine = joined(mine, factor, room);
    if (threadIdx.x) return;
    if (parts == 1) finish<T>(p, row, mine, inverse);
    else partial[blockIdx.x] = mine;
}

template <class T>
__global__ __launch_bounds__(WARP) void loss_join_kernel(LossProblem p, int parts, const Sums* partial) {
    __shared__ float room[WARP];
    const float inverse = 1 / p.temperature, factor = inverse * LOG2E;
    Sums mine;
    for (int i = threadIdx.x; i < parts; i += WARP) {
        Sums one = partial[static_cast<int64_t>(blockIdx.x) * parts + i];
        const float maximum = fmaxf(one.maximum, mine.maximum);
        if (mine.maximum < maximum) mine.move_to(maximum, factor);
        if (one.maximum < maximum) one.move_to(maximum, factor);
        mine.s += one.s;
        mine.t += one.t;
    }
    mine = joined(mine, factor, room);
    if (threadIdx.x == 0) finish<T>(p, blockIdx.x, mine, inverse);
}

// d logits = (g_lp (onehot - p) - g_H p (log p + H) + g_lse p) / T, over the logits. A thread has AHEAD chunks of a row.
template <class T, int W>
__global__ __launch_bounds__(BLOCK) void loss_backward_kernel(LossProblem p, int parts) {
    const int64_t row = blockIdx.x / parts;
    const int chunks = static_cast<int>(p.columns / W), threads = blockDim.x;
    const int base = static_cast<int>(blockIdx.x % parts) * AHEAD<W> * threads + threadIdx.x;
    T* x = static_cast<T*>(p.logits) + row * p.stride;
    Chunk<T, W> ahead[AHEAD<W>];
#pragma unroll
    for (int n = 0; n < AHEAD<W>; ++n)
        if (base + n * threads < chunks) ahead[n] = load_chunk<W>(x + static_cast<int64_t>(base + n * threads) * W);
    const float inverse = 1 / p.temperature;
    const int64_t target = p.targets[row];
    const bool known = target >= 0 && target < p.columns;
    const float g_logprob = p.logprob_grad[row] * inverse, g_entropy = p.entropy_grad[row] * inverse;
    const float g_weight = known ? p.lse_grad[row] * inverse - g_logprob : NAN;
    const double lse = p.lse[row];
    const float high = static_cast<float>(lse), low = static_cast<float>(lse - high), entropy = p.entropy[row];
#pragma unroll
    for (int n = 0; n < AHEAD<W>; ++n) {
        const int j = base + n * threads, hit = static_cast<int>(known ? target : -1) - j * W;
        if (j >= chunks) continue;
        float v[W];
        unpack(ahead[n], v);
#pragma unroll
        for (int w = 0; w < W; ++w) {
            const float log_p = fmaf(v[w], inverse, -high) - low;
            const float slope = g_weight - g_entropy * (fmaxf(log_p, LOWEST) + entropy);
            v[w] = ex2(log_p * LOG2E) * slope + (hit == w ? g_logprob : 0.f);
        }
        store_values<W>(x + static_cast<int64_t>(j) * W, v);
    }
}

// Threads that leave none of them without a chunk.
unsigned threads_for(int64_t chunks, int ahead) {
    unsigned threads = WARP;
    while (threads < BLOCK && threads * ahead < chunks) threads *= 2;
    return threads;
}

// Long rows go to several blocks, however many rows there are: a row's bits do not depend on it.
constexpr int64_t PART = 16 << 10;

int64_t parts_of(int64_t columns) { return columns <= 2 * PART ? 1 : ceil_div(columns, PART); }

void check_columns(const LossProblem& p) {
    if (p.columns > INT32_MAX / 2) throw std::invalid_argument("token_logprobs: expected at most 2^30 - 1 logits a row");
}
auto fits(const LossProblem& p) {
    return [&p](int64_t size) { return aligned({p.logits}, {p.columns * size, p.stride * size}); };
}

}  // namespace

namespace gpu {

int64_t loss_workspace(int64_t rows, int64_t columns) {
    const int64_t parts = parts_of(columns);
    return parts > 1 ? rows * parts * static_cast<int64_t>(sizeof(Sums)) : 0;
}

void loss_forward(const LossProblem& p, void* workspace, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    check_columns(p);
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const int parts = workspace ? static_cast<int>(parts_of(p.columns)) : 1;
        auto* partial = static_cast<Sums*>(workspace);
        const unsigned threads = threads_for(ceil_div(p.columns / W, parts), AHEAD<W>);
        launch(loss_forward_kernel<T, W>, blocks(p.rows * parts), threads, 0, stream, "loss", p, parts, partial);
        if (parts > 1) launch(loss_join_kernel<T>, blocks(p.rows), WARP, 0, stream, "loss", p, parts, partial);
    });
}

void loss_backward(const LossProblem& p, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    check_columns(p);
    by_type(p.dtype, fits(p), [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const int64_t chunks = p.columns / W;
        const unsigned threads = std::min(threads_for(chunks, AHEAD<W>), 256u);
        const int parts = static_cast<int>(ceil_div(chunks, threads * AHEAD<W>));
        launch(loss_backward_kernel<T, W>, blocks(p.rows * parts), threads, 0, stream, "loss", p, parts);
    });
}

}  // namespace gpu

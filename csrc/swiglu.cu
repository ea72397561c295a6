// Element by element: a thread has one chunk of 16 bytes of every array, wherever its row lies.
#include "swiglu.h"

#include "gpu.h"
#include "rows.cuh"

namespace {

constexpr int BLOCK = 256;

DEVICE float sigmoid(float x) {
    // Beyond 87 the exponential overflows, while the sigmoid is already 0 to fp32's precision.
    return __fdividef(1.f, 1 + ex2(-LOG2E * fmaxf(x, -87.f)));
}

// I counts all chunks: dividing by their number in a row is cheap in 32 bits, which mostly do.
template <class T, int W, class I>
__global__ __launch_bounds__(BLOCK) void swiglu_forward_kernel(SwigluProblem p, I chunks, I total) {
    const I i = static_cast<I>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= total) return;
    const I row = i / chunks, j = (i - row * chunks) * W;
    const auto gate = load_chunk<W>(static_cast<const T*>(p.gate) + static_cast<int64_t>(row) * p.gate_stride + j);
    const auto up = load_chunk<W>(static_cast<const T*>(p.up) + static_cast<int64_t>(row) * p.up_stride + j);
    float g[W], u[W];
    unpack(gate, g), unpack(up, u);
#pragma unroll
    for (int w = 0; w < W; ++w) u[w] *= g[w] * sigmoid(g[w]);
    store_values<W>(static_cast<T*>(p.out) + static_cast<int64_t>(i) * W, u);
}

template <class T, int W, class I>
__global__ __launch_bounds__(BLOCK) void swiglu_backward_kernel(SwigluProblem p, I chunks, I total) {
    const I i = static_cast<I>(blockIdx.x) * BLOCK + threadIdx.x;
    if (i >= total) return;
    const I row = i / chunks, j = (i - row * chunks) * W;
    const auto gate = load_chunk<W>(static_cast<const T*>(p.gate) + static_cast<int64_t>(row) * p.gate_stride + j);
    const auto up = load_chunk<W>(static_cast<const T*>(p.up) + static_cast<int64_t>(row) * p.up_stride + j);
    const auto dout = load_chunk<W>(static_cast<const T*>(p.dout) + static_cast<int64_t>(i) * W);
    float g[W], u[W], d[W];
    unpack(gate, g), unpack(up, u), unpack(dout, d);
#pragma unroll
    for (int w = 0; w < W; ++w) {
        const float s = sigmoid(g[w]), ds = d[w] * s;
        u[w] *= ds * (1 + g[w] * (1 - s));
        g[w] *= ds;
    }
    const int64_t at = static_cast<int64_t>(row) * p.gradient_stride + j;
    store_values<W>(static_cast<T*>(p.dgate) + at, u);
    store_values<W>(static_cast<T*>(p.dup) + at, g);
}

template <bool BACKWARD>
void swiglu(const SwigluProblem& p, cudaStream_t stream) {
    if (!p.rows || !p.columns) return;
    const auto fits = [&](int64_t size) {
        return aligned({p.gate, p.up, p.dout, p.out, p.dgate, p.dup},
                       {p.columns * size, p.gate_stride * size, p.up_stride * size, p.gradient_stride * size});
    };
    by_type(p.dtype, fits, [&](auto type, auto width) {
        using T = decltype(type);
        constexpr int W = decltype(width)::value;
        const int64_t chunks = p.columns / W, total = p.rows * chunks;
        const auto start = [&](auto index) {
            using I = decltype(index);
            launch(BACKWARD ? swiglu_backward_kernel<T, W, I> : swiglu_forward_kernel<T, W, I>, blocks(ceil_div(total, BLOCK)), BLOCK, 0,
                   stream, "swiglu", p, chunks, total);
        };
        total < INT32_MAX ? start(uint32_t{}) : start(uint64_t{});
    });
}

}  // namespace

namespace gpu {

void swiglu_forward(const SwigluProblem& p, cudaStream_t stream) { swiglu<false>(p, stream); }
void swiglu_backward(const SwigluProblem& p, cudaStream_t stream) { swiglu<true>(p, stream); }

}  // namespace gpu

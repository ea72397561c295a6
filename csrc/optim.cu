// What an optimiser does to many arrays at once (optim.h). The table of arrays is on the device, so the host knows no sizes: a grid
// of one size for everything, whose blocks take the runs of all arrays in turn.
#include "optim.h"

#include "device.cuh"
#include "gpu.h"

namespace {

// Elements of a thread at once, of a block; spans looked at together.
constexpr int THREADS = 256, EACH = 16, RUN = THREADS * EACH;
// The order of a sum of squares is that of the blocks, so their number is the same on every GPU: eight for each of an H100's 132 SMs.
constexpr int BLOCKS = 1056;

struct Four {
    float v[4];
};
// Four elements, those beyond `left` 0. They go through memory as one where `whole` says that all addresses allow it.
DEVICE Four take(const float* from, int64_t left, bool whole) {
    Four r;
    if (whole && left >= 4) {
        const float4 x = *reinterpret_cast<const float4*>(from);
        r.v[0] = x.x, r.v[1] = x.y, r.v[2] = x.z, r.v[3] = x.w;
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) r.v[i] = i < left ? from[i] : 0.f;
    }
    return r;
}
DEVICE Four take(const bf16* from, int64_t left, bool whole) {
    Four r;
    if (whole && left >= 4) {
        const uint2 x = *reinterpret_cast<const uint2*>(from);
        r.v[0] = low_half(x.x), r.v[1] = high_half(x.x), r.v[2] = low_half(x.y), r.v[3] = high_half(x.y);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i) r.v[i] = i < left ? to_float(from[i]) : 0.f;
    }
    return r;
}
DEVICE void put(float* to, const Four& x, int64_t left, bool whole) {
    if (whole && left >= 4) {
        *reinterpret_cast<float4*>(to) = make_float4(x.v[0], x.v[1], x.v[2], x.v[3]);
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) to[i] = x.v[i];
    }
}
DEVICE void put(bf16* to, const Four& x, int64_t left, bool whole) {
    if (whole && left >= 4) {
        *reinterpret_cast<uint2*>(to) = make_uint2(pack_bf16(x.v[0], x.v[1]), pack_bf16(x.v[2], x.v[3]));
    } else {
#pragma unroll
        for (int i = 0; i < 4; ++i)
            if (i < left) to[i] = from_float<bf16>(x.v[i]);
    }
}

DEVICE int64_t runs_of(const OptimSpan& span) { return span.size > 0 ? (span.size + RUN - 1) / RUN : 0; }

// Calls f(span, begin) for every BLOCKS-th run of all spans, from the block's own on; all threads of a block alike.
template <class F>
DEVICE void each_run(const OptimProblem& p, F&& f) {
    __shared__ int64_t ends[THREADS];  // of so many spans: runs up to and with each
    __shared__ int64_t warp_ends[THREADS / WARP];
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t run = blockIdx.x, before = 0;
    for (int64_t first = 0; first < p.count; first += THREADS) {
        int64_t end = first + threadIdx.x < p.count ? runs_of(p.spans[first + threadIdx.x]) : 0;
#pragma unroll
        for (int lanes = 1; lanes < WARP; lanes *= 2) {
            const int64_t left = __shfl_up_sync(0xffffffffu, end, lanes);
            end += lane >= lanes ? left : 0;
        }
        __syncthreads();  // the spans before may still be looked up
        if (lane == WARP - 1) warp_ends[warp] = end;
        __syncthreads();
        end += before;
        for (int w = 0; w < warp; ++w) end += warp_ends[w];
        ends[threadIdx.x] = end;
        __syncthreads();
        for (; run < ends[THREADS - 1]; run += BLOCKS) {
            int low = 0, high = THREADS - 1;  // the first span whose end is beyond the run
            while (low < high) {
                const int middle = (low + high) / 2;
                ends[middle] > run ? high = middle : low = middle + 1;
            }
            const OptimSpan span = p.spans[first + low];
            f(span, (run - (low ? ends[low - 1] : before)) * RUN);
        }
        before = ends[THREADS - 1];
    }
}

// Calls f(offset, how many of its four elements there are) for the thread's part of a run.
template <class F>
DEVICE void each_four(const OptimSpan& span, int64_t begin, F&& f) {
#pragma unroll
    for (int i = 0; i < EACH; i += 4) {
        const int64_t at = begin + i * THREADS + 4 * static_cast<int64_t>(threadIdx.x);
        if (at < span.size) f(at, span.size - at);
    }
}

// The same elements in the same order whether or not they can be read as one.
__global__ void __launch_bounds__(THREADS) norm_kernel(OptimProblem p, double* sums) {
    __shared__ float room[THREADS / WARP];
    double total = 0;
    each_run(p, [&](const OptimSpan& s, int64_t begin) {
        const bool whole = reinterpret_cast<uintptr_t>(s.gradient) % 16 == 0;
        float sum = 0;
        each_four(s, begin, [&](int64_t at, int64_t left) {
            const Four g = take(s.gradient + at, left, whole);
            sum += (g.v[0] * g.v[0] + g.v[1] * g.v[1]) + (g.v[2] * g.v[2] + g.v[3] * g.v[3]);
        });
        total += static_cast<double>(block_sum(sum, room));
    });
    if (threadIdx.x == 0) sums[1 + blockIdx.x] = total;
}
__global__ void __launch_bounds__(WARP) norm_sum_kernel(double* sums) {
    double total = 0;
    for (int i = threadIdx.x; i < BLOCKS; i += WARP) total += sums[1 + i];
#pragma unroll
    for (int lanes = WARP / 2; lanes; lanes /= 2) total += __shfl_xor_sync(0xffffffffu, total, lanes);
    if (threadIdx.x == 0) sums[0] = total;
}

__global__ void __launch_bounds__(THREADS) adamw_kernel(OptimProblem p) {
    each_run(p, [&](const OptimSpan& s, int64_t begin) {
        const uintptr_t all = reinterpret_cast<uintptr_t>(s.gradient) | reinterpret_cast<uintptr_t>(s.parameter) |
                              reinterpret_cast<uintptr_t>(s.first) | reinterpret_cast<uintptr_t>(s.second);
        const bool whole = all % 16 == 0;
        each_four(s, begin, [&](int64_t at, int64_t left) {
            const Four g = take(s.gradient + at, left, whole);
            Four x = take(s.parameter + at, left, whole), m = take(s.first + at, left, whole), v = take(s.second + at, left, whole);
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scaled = g.v[i] * p.scale;
                m.v[i] = m.v[i] + p.one_minus_beta1 * (scaled - m.v[i]);
                v.v[i] = p.beta2 * v.v[i] + p.one_minus_beta2 * scaled * scaled;
                x.v[i] = p.keep * x.v[i] - p.rate * m.v[i] / (sqrtf(v.v[i]) * p.root + p.eps);
            }
            put(s.first + at, m, left, whole);
            put(s.second + at, v, left, whole);
            put(s.parameter + at, x, left, whole);
        });
    });
}

template <class T>
__global__ void __launch_bounds__(THREADS) momentum_kernel(OptimProblem p) {
    each_run(p, [&](const OptimSpan& s, int64_t begin) {
        const uintptr_t all = reinterpret_cast<uintptr_t>(s.gradient) | reinterpret_cast<uintptr_t>(s.first);
        const bool whole = all % 16 == 0 && reinterpret_cast<uintptr_t>(s.other) % (4 * sizeof(T)) == 0;
        each_four(s, begin, [&](int64_t at, int64_t left) {
            const Four g = take(s.gradient + at, left, whole);
            Four m = take(s.first + at, left, whole), update;
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const float scaled = g.v[i] * p.scale;
                m.v[i] = m.v[i] + p.one_minus_beta1 * (scaled - m.v[i]);
                update.v[i] = scaled + p.beta1 * (m.v[i] - scaled);
            }
            put(s.first + at, m, left, whole);
            put(static_cast<T*>(s.other) + at, update, left, whole);
        });
    });
}

template <class T>
__global__ void __launch_bounds__(THREADS) apply_kernel(OptimProblem p) {
    each_run(p, [&](const OptimSpan& s, int64_t begin) {
        const auto fits = [](const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; };
        const bool whole = fits(s.parameter, 16) && fits(s.other, 4 * sizeof(T));
        each_four(s, begin, [&](int64_t at, int64_t left) {
            const Four update = take(static_cast<const T*>(s.other) + at, left, whole);
            Four x = take(s.parameter + at, left, whole);
#pragma unroll
            for (int i = 0; i < 4; ++i) x.v[i] = p.keep * x.v[i] - p.rate * update.v[i];
            put(s.parameter + at, x, left, whole);
        });
    });
}

}  // namespace

int64_t gpu::optim_workspace() { return (1 + BLOCKS) * static_cast<int64_t>(sizeof(double)); }

void gpu::optim(const OptimProblem& problem, void* workspace, cudaStream_t stream) {
    const auto run = [&](auto kernel, const auto&... more) {
        launch(kernel, dim3(BLOCKS), dim3(THREADS), 0, stream, "optim", problem, more...);
    };
    if (problem.kind == OPTIM_NORM) {
        double* const sums = static_cast<double*>(workspace);
        run(norm_kernel, sums);
        launch(norm_sum_kernel, dim3(1), dim3(WARP), 0, stream, "optim", sums);
    } else if (problem.kind == OPTIM_ADAMW) {
        run(adamw_kernel);
    } else {
        by_dtype(problem.dtype, [&](auto type) {
            using T = decltype(type);
            problem.kind == OPTIM_MOMENTUM ? run(momentum_kernel<T>) : run(apply_kernel<T>);
        });
    }
}

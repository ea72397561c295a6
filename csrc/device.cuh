// What every kernel for NVIDIA GPUs starts from: element types, 16-byte accesses, sums over a warp and a block, launches.
// Compiled by nvcc for the device; the tests compile the same sources for the host, against an emulator (tests/emulator).
#pragma once
#include <cuda_runtime.h>

#include <cfloat>
#include <cstdint>
#include <stdexcept>
#include <string>

#ifdef NANORLHF_EMULATED
#include "emulated_ptx.h"
#else
#include "ptx.cuh"
#endif

#define DEVICE __device__ __forceinline__

constexpr float LOG2E = 1.4426950408889634f, LN2 = 0.6931471805599453f;
constexpr int WARP = 32;

// bf16 as its upper half of an fp32's bits.
struct bf16 {
    uint16_t bits;
};

DEVICE float to_float(float x) { return x; }
DEVICE float to_float(bf16 x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
template <class T>
DEVICE T from_float(float x);
template <>
DEVICE float from_float<float>(float x) {
    return x;
}
template <>
DEVICE bf16 from_float<bf16>(float x) {
    return {static_cast<uint16_t>(pack_bf16(x, 0.f))};
}
DEVICE float low_half(uint32_t pair) { return __uint_as_float(pair << 16); }
DEVICE float high_half(uint32_t pair) { return __uint_as_float(pair & 0xffff0000u); }

// 16 bytes of elements: what one thread reads or writes at once where addresses and sizes are multiples of 16 bytes.
template <class T>
struct alignas(16) Pack {
    static constexpr int SIZE = 16 / sizeof(T);
    T v[SIZE];
};
template <class T>
DEVICE Pack<T> load_pack(const T* from) {
    return *reinterpret_cast<const Pack<T>*>(from);
}
template <class T>
DEVICE void store_pack(T* to, const Pack<T>& pack) {
    *reinterpret_cast<Pack<T>*>(to) = pack;
}

template <int WIDTH = WARP>
DEVICE float warp_max(float x) {
#pragma unroll
    for (int lanes = WIDTH / 2; lanes; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(0xffffffffu, x, lanes));
    return x;
}
template <int WIDTH = WARP>
DEVICE float warp_sum(float x) {
#pragma unroll
    for (int lanes = WIDTH / 2; lanes; lanes /= 2) x += __shfl_xor_sync(0xffffffffu, x, lanes);
    return x;
}

// Over all threads of a block of whole warps, 1024 at most; `room` holds a float a warp. All threads get the result, always
// added in the same order.
DEVICE float block_sum(float x, float* room) {
    x = warp_sum(x);
    __syncthreads();  // the room may still be read
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    return warp_sum(lane < warps ? room[lane] : 0.f);
}
DEVICE float block_max(float x, float* room) {
    x = warp_max(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) room[threadIdx.x / WARP] = x;
    __syncthreads();
    const int warps = blockDim.x / WARP, lane = threadIdx.x % WARP;
    return warp_max(lane < warps ? room[lane] : -INFINITY);
}

// The block's dynamic shared memory, on a multiple of 1024 bytes.
DEVICE unsigned char* shared_memory() {
#ifdef NANORLHF_EMULATED
    return emulator::shared_memory();
#else
    extern __shared__ __align__(1024) unsigned char memory[];
    return memory;
#endif
}

inline void check(cudaError_t error, const char* what) {
    if (error != cudaSuccess) throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// kernel<<<grid, block, shared, stream>>>(args...), for any amount of shared memory; throws where it cannot be started.
template <class... Parameters, class... Arguments>
void launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared, cudaStream_t stream, const char* what,
            const Arguments&... arguments) {
    if (!grid.x || !grid.y || !grid.z) return;
    if (shared > 48 << 10)
        check(cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel), cudaFuncAttributeMaxDynamicSharedMemorySize,
                                   static_cast<int>(shared)), what);
    cudaLaunchConfig_t config{};
    config.gridDim = grid, config.blockDim = block, config.dynamicSmemBytes = shared, config.stream = stream;
    check(cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...), what);
}

// Calls f with a value of the type that the code stands for: 0 float, 1 bf16.
template <class F>
void by_dtype(int dtype, F&& f) {
    dtype ? f(bf16{}) : f(float{});
}

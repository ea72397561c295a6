// Stands in for NVIDIA's header: CUDA C++ as far as the kernels use it, on the emulator.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <tuple>

#include "emulator.h"

#define __global__
#define __device__
#define __host__
#define __constant__
#define __shared__ static
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) __attribute__((aligned(n)))

using std::isfinite;
using std::isinf;
using std::isnan;
using std::max;
using std::min;

inline emulator::Index& threadIdx = emulator::thread;
inline emulator::Index& blockIdx = emulator::block;
inline emulator::Index& blockDim = emulator::block_size;
inline emulator::Index& gridDim = emulator::grid_size;
constexpr int warpSize = 32;

struct dim3 {
    unsigned x, y, z;
    constexpr dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
#define EMULATED_VECTORS(T, NAME)                                                                  \
    struct alignas(2 * sizeof(T)) NAME##2 { T x, y; };                                              \
    struct NAME##3 { T x, y, z; };                                                                  \
    struct alignas(4 * sizeof(T) > 16 ? 16 : 4 * sizeof(T)) NAME##4 { T x, y, z, w; };              \
    inline NAME##2 make_##NAME##2(T x, T y) { return {x, y}; }                                      \
    inline NAME##3 make_##NAME##3(T x, T y, T z) { return {x, y, z}; }                              \
    inline NAME##4 make_##NAME##4(T x, T y, T z, T w) { return {x, y, z, w}; }
EMULATED_VECTORS(float, float)
EMULATED_VECTORS(double, double)
EMULATED_VECTORS(int, int)
EMULATED_VECTORS(unsigned, uint)
EMULATED_VECTORS(short, short)
EMULATED_VECTORS(unsigned short, ushort)
EMULATED_VECTORS(long long, longlong)

template <class To, class From>
inline To emulated_bits(From from) {
    static_assert(sizeof(To) == sizeof(From), "of one size");
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}
inline unsigned __float_as_uint(float x) { return emulated_bits<unsigned>(x); }
inline int __float_as_int(float x) { return emulated_bits<int>(x); }
inline float __uint_as_float(unsigned x) { return emulated_bits<float>(x); }
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline long long __double_as_longlong(double x) { return emulated_bits<long long>(x); }
inline double __longlong_as_double(long long x) { return emulated_bits<double>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline unsigned __brev(unsigned x) {
    unsigned r = 0;
    for (int i = 0; i < 32; ++i) r |= (x >> i & 1) << (31 - i);
    return r;
}
inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned long long>(a) * b >> 32; }
inline unsigned long long __umul64hi(unsigned long long a, unsigned long long b) { return static_cast<unsigned __int128>(a) * b >> 64; }

inline float rsqrtf(float x) { return 1 / std::sqrt(x); }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __log2f(float x) { return std::log2(x); }
inline float __fdividef(float x, float y) { return x / y; }
inline float __fmul_rn(float x, float y) { return x * y; }
inline float __fadd_rn(float x, float y) { return x + y; }
inline float __fsub_rn(float x, float y) { return x - y; }
inline float __fdiv_rn(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __frcp_rn(float x) { return 1 / x; }
inline float __fsqrt_rn(float x) { return std::sqrt(x); }
inline double __dmul_rn(double x, double y) { return x * y; }
inline double __dadd_rn(double x, double y) { return x + y; }
inline int __float2int_rn(float x) { return static_cast<int>(std::nearbyint(x)); }
inline int __float2int_rd(float x) { return static_cast<int>(std::floor(x)); }

inline void __syncthreads() { emulator::barrier(0, -1, true); }
inline void __threadfence() {}
inline void __threadfence_block() {}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
    emulator::collective(mask, "__syncwarp", nullptr, [](void**) {});
}
// Calls combine(pointers to every lane's value, lane) for this lane when all have come.
template <class T, class F>
inline auto emulated_exchange(unsigned mask, const char* what, T value, F&& combine) {
    struct Operand {
        T value, all[32];
        unsigned present;
    } operand{value, {}, 0};
    emulator::collective(mask, what, &operand, [](void** operands) {
        T all[32] = {};
        unsigned present = 0;
        for (int i = 0; i < 32; ++i)
            if (operands[i]) all[i] = static_cast<Operand*>(operands[i])->value, present |= 1u << i;
        for (int i = 0; i < 32; ++i)
            if (operands[i]) std::memcpy(static_cast<Operand*>(operands[i])->all, all, sizeof all), static_cast<Operand*>(operands[i])->present = present;
    });
    return combine(operand.all, emulator::here->number % 32, operand.present);
}
template <class T>
inline T __shfl_sync(unsigned mask, T value, int from, int width = 32) {
    return emulated_exchange(mask, "__shfl_sync", value, [=](const T* all, int lane, unsigned) {
        return all[(lane & ~(width - 1)) | (from & (width - 1))];
    });
}
template <class T>
inline T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32) {
    return emulated_exchange(mask, "__shfl_xor_sync", value, [=](const T* all, int lane, unsigned) {
        const int from = lane ^ lanes;
        return (from & ~(width - 1)) > (lane & ~(width - 1)) ? value : all[from & 31];
    });
}
template <class T>
inline T __shfl_down_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    return emulated_exchange(mask, "__shfl_down_sync", value, [=](const T* all, int lane, unsigned) {
        return (lane & (width - 1)) + static_cast<int>(lanes) >= width ? value : all[lane + lanes];
    });
}
template <class T>
inline T __shfl_up_sync(unsigned mask, T value, unsigned lanes, int width = 32) {
    return emulated_exchange(mask, "__shfl_up_sync", value, [=](const T* all, int lane, unsigned) {
        return (lane & (width - 1)) < static_cast<int>(lanes) ? value : all[lane - lanes];
    });
}
inline unsigned __ballot_sync(unsigned mask, int predicate) {
    return emulated_exchange(mask, "__ballot_sync", predicate ? 1u : 0u, [=](const unsigned* all, int, unsigned present) {
        unsigned bits = 0;
        for (int i = 0; i < 32; ++i) bits |= (present & mask & 1u << i) && all[i] ? 1u << i : 0u;
        return bits;
    });
}
inline int __any_sync(unsigned mask, int predicate) { return __ballot_sync(mask, predicate) != 0; }
inline int __all_sync(unsigned mask, int predicate) { return __ballot_sync(mask, !predicate) == 0; }
template <class F>
inline int emulated_vote(int predicate, F&& combine) {
    // Kept in the block's own place: all threads meet, add, meet again.
    static int total;
    emulator::barrier(0, -1, true);
    total = combine(0, 0, true);
    emulator::barrier(0, -1, true);
    total = combine(total, predicate != 0, false);
    emulator::barrier(0, -1, true);
    return total;
}
inline int __syncthreads_or(int predicate) {
    return emulated_vote(predicate, [](int t, int p, bool first) { return first ? 0 : t | p; });
}
inline int __syncthreads_and(int predicate) {
    return emulated_vote(predicate, [](int t, int p, bool first) { return first ? 1 : t & p; });
}
inline int __syncthreads_count(int predicate) {
    return emulated_vote(predicate, [](int t, int p, bool first) { return first ? 0 : t + p; });
}

template <class T, class U>
inline T atomicAdd(T* at, U value) {
    const T before = *at;
    *at = before + static_cast<T>(value);
    return before;
}
template <class T, class U>
inline T atomicMax(T* at, U value) {
    const T before = *at;
    *at = std::max(before, static_cast<T>(value));
    return before;
}
template <class T, class U>
inline T atomicMin(T* at, U value) {
    const T before = *at;
    *at = std::min(before, static_cast<T>(value));
    return before;
}
template <class T, class U>
inline T atomicExch(T* at, U value) {
    const T before = *at;
    *at = static_cast<T>(value);
    return before;
}
template <class T, class U>
inline T atomicOr(T* at, U value) {
    const T before = *at;
    *at = before | static_cast<T>(value);
    return before;
}
template <class T, class U, class V>
inline T atomicCAS(T* at, U compare, V value) {
    const T before = *at;
    if (before == static_cast<T>(compare)) *at = static_cast<T>(value);
    return before;
}
template <class T>
inline T __ldg(const T* at) { return *at; }
template <class T>
inline T __ldcs(const T* at) { return *at; }
template <class T>
inline T __ldcg(const T* at) { return *at; }
template <class T>
inline void __stcs(T* at, T value) { *at = value; }
template <class T>
inline void __stcg(T* at, T value) { *at = value; }

// The runtime's calls.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorNoDevice = 100, cudaErrorNotSupported = 801, cudaErrorLaunchFailure = 719 };
struct CUstream_st;
using cudaStream_t = CUstream_st*;
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8, cudaFuncAttributePreferredSharedMemoryCarveout = 9 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrComputeCapabilityMajor = 75, cudaDevAttrComputeCapabilityMinor = 76,
                      cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaMemcpyKind { cudaMemcpyHostToDevice = 1, cudaMemcpyDeviceToHost = 2, cudaMemcpyDeviceToDevice = 3, cudaMemcpyDefault = 4 };
enum cudaDriverEntryPointQueryResult { cudaDriverEntryPointSuccess = 0, cudaDriverEntryPointSymbolNotFound = 1 };
constexpr unsigned long long cudaEnableDefault = 0;
struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute* attrs;
    unsigned numAttrs;
};
inline std::string& emulated_error() {
    static std::string message;
    return message;
}
inline const char* cudaGetErrorString(cudaError_t error) {
    return error == cudaSuccess ? "no error" : error == cudaErrorLaunchFailure ? emulated_error().c_str() : "invalid value";
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline cudaError_t cudaPeekAtLastError() { return cudaSuccess; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }
inline cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
inline cudaError_t cudaDriverGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaRuntimeGetVersion(int* version) { return *version = 13000, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 8  // few, so that loops over many blocks' work are taken
             : attribute == cudaDevAttrComputeCapabilityMajor ? 8
             : attribute == cudaDevAttrComputeCapabilityMinor ? 0 : emulator::SHARED_LIMIT;
    return cudaSuccess;
}
template <class F>
inline cudaError_t cudaFuncSetAttribute(F, cudaFuncAttribute, int value) {
    return value > emulator::SHARED_LIMIT ? cudaErrorInvalidValue : cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) { return std::memset(to, value, bytes), cudaSuccess; }
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
    return std::memcpy(to, from, bytes), cudaSuccess;
}
template <class... Parameters, class... Arguments>
inline cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...), Arguments&&... arguments) {
    const std::tuple<std::decay_t<Parameters>...> values{std::forward<Arguments>(arguments)...};
    const auto of = [](dim3 d) { return emulator::Index{d.x, d.y, d.z}; };
    emulated_error() = emulator::run(of(config->gridDim), of(config->blockDim), config->dynamicSmemBytes, [&] { std::apply(kernel, values); });
    return emulated_error().empty() ? cudaSuccess : cudaErrorLaunchFailure;
}
#include "cuda.h"
inline cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned, unsigned long long,
                                                    cudaDriverEntryPointQueryResult* result = nullptr) {
    const bool known = !std::strcmp(name, "cuTensorMapEncodeTiled");
    *function = known ? reinterpret_cast<void*>(&cuTensorMapEncodeTiled) : nullptr;
    if (result) *result = known ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
    return cudaSuccess;
}

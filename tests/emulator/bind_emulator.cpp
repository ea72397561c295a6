// What the tests ask of the emulator itself: its seed, and small kernels, some with a planted mistake.
#include <pybind11/pybind11.h>

#include <map>

#include "ptx_sm90.cuh"

namespace {

constexpr int TILE = 128 * 64 * 2;  // bytes: 128 rows of 64 bf16

// out[i] = in[n - 1 - i] through shared memory; without the barrier most threads read what is not yet there.
template <bool BARRIER>
void reverse(float* out, const float* in) {
    auto* room = reinterpret_cast<float*>(shared_memory());
    room[threadIdx.x] = in[threadIdx.x];
    if (BARRIER) __syncthreads();
    out[threadIdx.x] = room[blockDim.x - 1 - threadIdx.x];
}

template <bool WAITS>
void copy(float* out, const float* in) {
    auto* room = reinterpret_cast<float4*>(shared_memory());
    cp_async_16(room + threadIdx.x, reinterpret_cast<const float4*>(in) + threadIdx.x, true);
    cp_async_commit();
    if (WAITS) cp_async_wait<0>();
    reinterpret_cast<float4*>(out)[threadIdx.x] = room[threadIdx.x];
}

void half_a_barrier(float*, const float*) {
    if (threadIdx.x < 64) bar_sync(1, 128);
}
void half_a_warp(float* out, const float* in) {
    if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_xor_sync(0xffffffffu, in[threadIdx.x], 1);
    else __syncwarp();
}
void past_the_end(float*, const float*) { shared_memory()[16 * 128 + threadIdx.x] = 1; }

// A (64 x 64) times B^T (64 x 64), both rows of one tensor that TMA brings, by one warpgroup.
enum { RIGHT, EARLY, NO_EXPECT, TWICE };
template <int MISTAKE>
void product(float* out, const float*, const CUtensorMap map) {
    unsigned char* tiles = shared_memory();
    auto* barrier = reinterpret_cast<uint64_t*>(tiles + TILE);
    if (threadIdx.x == 0) mbarrier_init(barrier, 1), mbarrier_init_fence();
    __syncthreads();
    if (threadIdx.x == 0) {
        MISTAKE == NO_EXPECT ? mbarrier_arrive(barrier) : mbarrier_arrive_expect(barrier, TILE);
        tma_load_3d(tiles, &map, barrier, 0, 0, 0);
        if (MISTAKE == TWICE) mbarrier_arrive(barrier);
    }
    mbarrier_wait(barrier, 0);
    float d[32];
    wgmma_fence();
    for (int k = 0; k < 4; ++k)
        wgmma_shared<false, false>(d, wgmma_descriptor(tiles + 32 * k), wgmma_descriptor(tiles + TILE / 2 + 32 * k), k > 0);
    wgmma_commit();
    if (MISTAKE != EARLY) wgmma_wait<0>();
    const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    for (int i = 0; i < 32; ++i) out[(warp * 16 + lane / 4 + 8 * (i % 4 / 2)) * 64 + i / 4 * 8 + 2 * (lane % 4) + i % 2] = d[i];
    if (MISTAKE == EARLY) wgmma_wait<0>();
}

CUtensorMap map_of(uintptr_t rows) {
    CUtensorMap map;
    const cuuint64_t sizes[3] = {64, 1, 128}, strides[2] = {128, 128};
    const cuuint32_t box[3] = {64, 1, 128}, ones[3] = {1, 1, 1};
    if (cuTensorMapEncodeTiled(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, reinterpret_cast<void*>(rows), sizes, strides, box, ones,
                               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
                               CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
        throw std::invalid_argument("no such map");
    return map;
}

void try_kernel(const std::string& name, uintptr_t out, uintptr_t in) {
    auto *to = reinterpret_cast<float*>(out);
    const auto* from = reinterpret_cast<const float*>(in);
    using Plain = void (*)(float*, const float*);
    using Mapped = void (*)(float*, const float*, CUtensorMap);
    static const std::map<std::string, Plain> plain{{"reverse", reverse<true>}, {"reverse without a barrier", reverse<false>},
        {"copy", copy<true>}, {"copy without waiting", copy<false>}, {"half a barrier", half_a_barrier},
        {"half a warp", half_a_warp}, {"past the end", past_the_end}};
    static const std::map<std::string, Mapped> mapped{{"product", product<RIGHT>}, {"product read early", product<EARLY>},
        {"product without expecting", product<NO_EXPECT>}, {"product that arrives twice", product<TWICE>}};
    if (plain.count(name)) return launch(plain.at(name), 1, 128, 16 * 128, nullptr, "try", to, from);
    launch(mapped.at(name), 1, 128, TILE + 16, nullptr, "try", to, from, map_of(in));
}

}  // namespace

void bind_emulator(pybind11::module_& m) {
    m.def("seed", &emulator::seed, "The order of threads, blocks and background work from now on.");
    m.def("try_kernel", &try_kernel, "One of this file's kernels, by name.");
}

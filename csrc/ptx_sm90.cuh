// Hopper's own instructions (sm_90a), one function each, in PTX's terms: barriers in memory, the copy engine (TMA), products of
// a warpgroup (wgmma). The tests' emulator has the same functions. Source: NVIDIA's PTX ISA, sections on mbarrier,
// cp.async.bulk.tensor and wgmma.mma_async.
#pragma once
#include <cuda.h>  // CUtensorMap

#include "device.cuh"

#ifndef NANORLHF_EMULATED

// A barrier in shared memory completes a phase when `count` threads have arrived and all bytes expected have come.
PTX void mbarrier_init(uint64_t* barrier, int count) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" :: "r"(shared_address(barrier)), "r"(count) : "memory");
}
// After mbarrier_init, before other threads' and the copy engine's use (with a __syncthreads).
PTX void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
PTX void mbarrier_arrive(uint64_t* barrier) {
    asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" :: "r"(shared_address(barrier)) : "memory");
}
// Arrives once, and makes the phase wait for so many bytes more.
PTX void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" :: "r"(shared_address(barrier)), "r"(bytes) : "memory");
}
// Until the phase of this parity (0, 1, 0, ... from the first) is complete. A fresh barrier counts as past its phase of parity 1.
PTX void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    asm volatile(
        "{\n.reg .pred done;\nWAIT:\nmbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n@done bra DONE;\nbra WAIT;\nDONE:\n}\n"
        :: "r"(shared_address(barrier)), "r"(parity) : "memory");
}

// One thread: the map's box at these coordinates (innermost first) into shared memory, aligned to 1024 bytes for the 128-byte
// swizzle. Counts its bytes, those outside the tensor too (they are zeros), at the barrier.
PTX void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], [%2];"
                 :: "r"(shared_address(shared)), "l"(map), "r"(shared_address(barrier)), "r"(x), "r"(y), "r"(z) : "memory");
}
PTX void tma_prefetch(const CUtensorMap* map) { asm volatile("prefetch.tensormap [%0];" :: "l"(map) : "memory"); }
// One thread: shared memory into the map's box; what lies outside the tensor is not written. Then bulk_commit and a wait.
PTX void tma_store_3d(const CUtensorMap* map, const void* shared, int x, int y, int z) {
    asm volatile("cp.async.bulk.tensor.3d.global.shared::cta.tile.bulk_group [%0, {%2, %3, %4}], [%1];"
                 :: "l"(map), "r"(shared_address(shared)), "r"(x), "r"(y), "r"(z) : "memory");
}
// One thread: adds `bytes` of floats in shared memory to those in global memory, both aligned to 16 bytes.
PTX void bulk_add_f32(float* global, const float* shared, uint32_t bytes) {
    asm volatile("cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%0], [%1], %2;"
                 :: "l"(global), "r"(shared_address(shared)), "r"(bytes) : "memory");
}
PTX void bulk_commit() { asm volatile("cp.async.bulk.commit_group;" ::: "memory"); }
template <int PENDING>  // until at most this many of this thread's groups still read shared memory
PTX void bulk_wait_read() {
    asm volatile("cp.async.bulk.wait_group.read %0;" :: "n"(PENDING) : "memory");
}
// Shared memory written by ordinary stores, before wgmma or the copy engine reads it: by each thread that wrote, before the barrier.
PTX void fence_async() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }

template <int REGISTERS>
PTX void registers_down() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}
template <int REGISTERS>
PTX void registers_up() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" :: "n"(REGISTERS));
}

PTX void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
PTX void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>  // until at most this many of the warpgroup's groups are under way
PTX void wgmma_wait() {
    asm volatile("wgmma.wait_group.sync.aligned %0;" :: "n"(PENDING) : "memory");
}
// The accumulators of a product that was waited for are read, or written before its start, on this side of here: the compiler
// knows neither that wgmma writes them late nor what a wait stands for.
template <int R>
PTX void wgmma_hold(float (&d)[R]) {
#pragma unroll
    for (int i = 0; i < R; ++i) asm volatile("" : "+f"(d[i]) :: "memory");
}

#define WGMMA_8(x, d, i) x(d[i]), x(d[i + 1]), x(d[i + 2]), x(d[i + 3]), x(d[i + 4]), x(d[i + 5]), x(d[i + 6]), x(d[i + 7])
#define WGMMA_16(x, d, i) WGMMA_8(x, d, i), WGMMA_8(x, d, i + 8)
#define WGMMA_32(x, d, i) WGMMA_16(x, d, i), WGMMA_16(x, d, i + 16)
#define WGMMA_48(x, d, i) WGMMA_32(x, d, i), WGMMA_16(x, d, i + 32)
#define WGMMA_64(x, d, i) WGMMA_32(x, d, i), WGMMA_32(x, d, i + 32)
#define WGMMA_96(x, d, i) WGMMA_64(x, d, i), WGMMA_32(x, d, i + 64)
#define WGMMA_NAMES_16 "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
#define WGMMA_NAMES_32 WGMMA_NAMES_16 ",%16,%17,%18,%19,%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
#define WGMMA_NAMES_48 WGMMA_NAMES_32 ",%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45,%46,%47"
#define WGMMA_NAMES_64 WGMMA_NAMES_48 ",%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63"
#define WGMMA_NAMES_96 WGMMA_NAMES_64 ",%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95"

// `first`: d = a b, for which the compiler need not have d's registers defined before.
// One function of each kind for N columns, with R = N / 2 registers of accumulator; o0 .. o4 number the operands after those.
#define WGMMA_FOR(N, R, NAMES, REGISTERS, o0, o1, o2, o3, o4, o5, o6)                                                              \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                                                \
    PTX void wgmma_shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {                                                \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o2 ", 0;\n"                                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" o0 ", %" o1 ", p, 1, 1, %" o3       \
                     ", %" o4 ";\n}\n"                                                                                             \
                     : REGISTERS("+f", d, 0) : "l"(a), "l"(b), "r"(static_cast<int>(accumulate)), "n"(A_TRANSPOSED),               \
                       "n"(B_TRANSPOSED));                                                                                         \
    }                                                                                                                              \
    template <bool A_TRANSPOSED, bool B_TRANSPOSED>                                                                                \
    PTX void wgmma_shared_first(float (&d)[R], uint64_t a, uint64_t b) {                                                           \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, 0, 0;\n"                                                                   \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, %" o0 ", %" o1 ", p, 1, 1, %" o2       \
                     ", %" o3 ";\n}\n"                                                                                             \
                     : REGISTERS("=f", d, 0) : "l"(a), "l"(b), "n"(A_TRANSPOSED), "n"(B_TRANSPOSED));                              \
    }                                                                                                                              \
    template <bool B_TRANSPOSED>                                                                                                   \
    PTX void wgmma_registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {                                 \
        asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" o5 ", 0;\n"                                                              \
                     "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32.bf16.bf16 {" NAMES "}, {%" o0 ",%" o1 ",%" o2 ",%" o3 "}, %"  \
                     o4 ", p, 1, 1, %" o6 ";\n}\n"                                                                                 \
                     : REGISTERS("+f", d, 0) : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(accumulate)),          \
                       "n"(B_TRANSPOSED));                                                                                         \
    }
WGMMA_FOR(32, 16, WGMMA_NAMES_16, WGMMA_16, "16", "17", "18", "19", "20", "21", "22")
WGMMA_FOR(64, 32, WGMMA_NAMES_32, WGMMA_32, "32", "33", "34", "35", "36", "37", "38")
WGMMA_FOR(96, 48, WGMMA_NAMES_48, WGMMA_48, "48", "49", "50", "51", "52", "53", "54")
WGMMA_FOR(128, 64, WGMMA_NAMES_64, WGMMA_64, "64", "65", "66", "67", "68", "69", "70")
WGMMA_FOR(192, 96, WGMMA_NAMES_96, WGMMA_96, "96", "97", "98", "99", "100", "101", "102")
#endif

// The descriptor of a bf16 operand in shared memory with the 128-byte swizzle: rows of 64 elements (128 bytes), eight rows
// after one another 1024 bytes, the tile on a multiple of 1024. `leading`: for an operand whose rows run along K (transposed),
// the bytes from one block of 64 columns to the next. K advances by 32 bytes a step of 16 within a row, by 2048 along rows.
PTX uint64_t wgmma_descriptor(const void* tile, uint32_t leading = 16) {
    const uint64_t address = (shared_address(tile) & 0x3ffff) >> 4;
    return address | static_cast<uint64_t>(leading >> 4) << 16 | static_cast<uint64_t>(1024 >> 4) << 32 | 1ull << 62;
}

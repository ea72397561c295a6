// The functions of csrc/ptx.cuh and csrc/ptx_sm90.cuh on the emulator, after NVIDIA's PTX ISA.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

#include "cuda.h"
#include "emulator.h"

#define PTX inline

PTX float ex2(float x) { return std::exp2(x); }
PTX float lg2(float x) { return std::log2(x); }
PTX float max_nan(float x, float y) { return std::isnan(x) || std::isnan(y) ? NAN : std::fmax(x, y); }

PTX uint32_t emulated_bf16(float x) {  // to the nearest, ties to even; NaN stays NaN
    uint32_t bits;
    std::memcpy(&bits, &x, sizeof bits);
    if (std::isnan(x)) return 0x7fff;
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
PTX float emulated_float(uint32_t bits) {
    bits <<= 16;
    float x;
    std::memcpy(&x, &bits, sizeof x);
    return x;
}
PTX uint32_t pack_bf16(float low, float high) { return emulated_bf16(low) | emulated_bf16(high) << 16; }
PTX uint32_t shared_address(const void* pointer) { return emulator::shared_offset(pointer); }

PTX void emulated_aligned(const void* address, uintptr_t bytes, const char* what) {
    if (reinterpret_cast<uintptr_t>(address) % bytes) emulator::fail(std::string(what) + ": an address that is no multiple of " + std::to_string(bytes));
}

struct EmulatedLoad {
    const unsigned char* row;
    uint32_t* r;
};
template <bool TRANS>
PTX void emulated_ldmatrix(uint32_t (&r)[4], const void* row) {
    emulated_aligned(row, 16, "ldmatrix");
    shared_address(row);
    EmulatedLoad mine{static_cast<const unsigned char*>(row), r};
    emulator::collective(0xffffffffu, TRANS ? "ldmatrix.trans" : "ldmatrix", &mine, [](void** lanes) {
        const auto element = [&](int matrix, int i, int j) {
            uint16_t bits;
            std::memcpy(&bits, static_cast<EmulatedLoad*>(lanes[matrix * 8 + i])->row + 2 * j, 2);
            return static_cast<uint32_t>(bits);
        };
        for (int lane = 0; lane < 32; ++lane)
            for (int m = 0; m < 4; ++m) {
                const int i = lane / 4, j = 2 * (lane % 4);
                static_cast<EmulatedLoad*>(lanes[lane])->r[m] =
                    TRANS ? element(m, j, i) | element(m, j + 1, i) << 16 : element(m, i, j) | element(m, i, j + 1) << 16;
            }
    });
}
PTX void ldmatrix_x4(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<false>(r, row); }
PTX void ldmatrix_x4_trans(uint32_t (&r)[4], const void* row) { emulated_ldmatrix<true>(r, row); }

struct EmulatedMma {
    float* d;
    const uint32_t* a;
    uint32_t b[2];
};
PTX void mma_m16n8k16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    EmulatedMma mine{d, a, {b0, b1}};
    emulator::collective(0xffffffffu, "mma", &mine, [](void** lanes) {
        float x[16][16], y[8][16], sum[16][8];
        for (int lane = 0; lane < 32; ++lane) {
            const auto& from = *static_cast<EmulatedMma*>(lanes[lane]);
            const int g = lane / 4, t = 2 * (lane % 4);
            for (int part = 0; part < 4; ++part)
                for (int half = 0; half < 2; ++half) {
                    x[g + 8 * (part & 1)][t + half + 8 * (part >> 1)] = emulated_float(from.a[part] >> 16 * half & 0xffff);
                    if (part < 2) y[g][t + half + 8 * part] = emulated_float(from.b[part] >> 16 * half & 0xffff);
                }
        }
        for (int i = 0; i < 16; ++i)
            for (int j = 0; j < 8; ++j) {
                sum[i][j] = 0;
                for (int k = 0; k < 16; ++k) sum[i][j] += x[i][k] * y[j][k];
            }
        for (int lane = 0; lane < 32; ++lane)
            for (int part = 0; part < 4; ++part)
                static_cast<EmulatedMma*>(lanes[lane])->d[part] += sum[lane / 4 + 8 * (part >> 1)][2 * (lane % 4) + (part & 1)];
    });
}

PTX void emulated_copy(const emulator::Copy& c) {
    c.valid ? std::memcpy(c.to, c.from, 16) : std::memset(c.to, 0, 16);
}
PTX void cp_async_16(void* shared, const void* global, bool valid) {
    emulated_aligned(shared, 16, "cp.async");
    if (valid) emulated_aligned(global, 16, "cp.async");
    shared_address(shared);
    const emulator::Copy copy{shared, global, valid};
    emulator::coin() ? emulated_copy(copy) : emulator::here->copies.open.push_back(copy);
}
PTX void cp_async_commit() { emulator::here->copies.commit(); }
template <int PENDING>
PTX void cp_async_wait() {
    auto& groups = emulator::here->copies.committed;
    while (groups.size() > static_cast<size_t>(PENDING)) {
        for (const auto& copy : groups.front()) emulated_copy(copy);
        groups.erase(groups.begin());
    }
}
PTX void bar_sync(int id, int threads) { emulator::barrier(id, threads, true); }
PTX void bar_arrive(int id, int threads) { emulator::barrier(id, threads, false); }

// Hopper's.

struct EmulatedBarrier {  // in 64 bits of shared memory
    uint64_t phase : 1, count : 16, pending : 16;
    int64_t bytes : 31;
};
PTX EmulatedBarrier& emulated_barrier(const uint64_t* at) {
    emulated_aligned(at, 8, "mbarrier");
    shared_address(at);
    return *reinterpret_cast<EmulatedBarrier*>(const_cast<uint64_t*>(at));
}
PTX EmulatedBarrier& emulated_live_barrier(const uint64_t* at) {
    EmulatedBarrier& b = emulated_barrier(at);
    if (b.count == 0xffff || b.count == 0) emulator::fail("an mbarrier that was not initialised");
    return b;
}
PTX void emulated_progress(EmulatedBarrier& b) {
    if (b.pending || b.bytes) return;
    b.phase = !b.phase;
    b.pending = b.count;
}
PTX void mbarrier_init(uint64_t* barrier, int count) {
    EmulatedBarrier& b = emulated_barrier(barrier);
    b.phase = 0, b.count = b.pending = count, b.bytes = 0;
}
PTX void mbarrier_init_fence() {}
PTX void emulated_arrive(EmulatedBarrier& b) {
    if (!b.pending) emulator::fail("more arrivals at an mbarrier than its phase has");
    --b.pending;
    emulated_progress(b);
}
PTX void mbarrier_arrive(uint64_t* barrier) { emulated_arrive(emulated_live_barrier(barrier)); }
PTX void mbarrier_arrive_expect(uint64_t* barrier, uint32_t bytes) {
    EmulatedBarrier& b = emulated_live_barrier(barrier);
    b.bytes += bytes;
    emulated_arrive(b);
}
PTX void mbarrier_wait(uint64_t* barrier, uint32_t parity) {
    if (parity > 1) emulator::fail("an mbarrier's parity is 0 or 1");
    EmulatedBarrier& b = emulated_live_barrier(barrier);
    if (b.phase == parity)
        emulator::wait("an mbarrier", [](const void* at, uint64_t p) { return static_cast<const EmulatedBarrier*>(at)->phase != p; }, &b, parity);
}

// Calls move(shared byte offset, global address or null where outside, bytes) for each row of the box.
template <class F>
PTX void emulated_box(const CUtensorMap* map, uint32_t shared, int x, int y, int z, F&& move) {
    const EmulatedTensor& t = *reinterpret_cast<const EmulatedTensor*>(map);
    if (t.magic != EmulatedTensor::MAGIC) emulator::fail("a tensor map that was not encoded");
    for (int k = 0; k < static_cast<int>(t.box[2]); ++k)
        for (int j = 0; j < static_cast<int>(t.box[1]); ++j)
            for (int i = 0; i < static_cast<int>(t.box[0]); ++i) {
                uint32_t offset = shared + ((k * t.box[1] + j) * t.box[0] + i) * 2;
                if (t.swizzled) offset ^= (offset >> 7 & 7) << 4;
                const int64_t at[3] = {x + i, y + j, z + k};
                bool inside = true;
                for (int d = 0; d < 3; ++d) inside = inside && at[d] >= 0 && at[d] < static_cast<int64_t>(t.sizes[d]);
                move(emulator::shared_memory() + offset, inside ? t.data + at[0] * 2 + at[1] * t.strides[0] + at[2] * t.strides[1] : nullptr);
            }
}
PTX void emulated_whole(const CUtensorMap* map, uint32_t shared) {
    const EmulatedTensor& t = *reinterpret_cast<const EmulatedTensor*>(map);
    if (shared % (t.swizzled ? 1024 : 128)) emulator::fail("TMA: a tile in shared memory that is not aligned");
}
PTX void tma_load_3d(void* shared, const CUtensorMap* map, uint64_t* barrier, int x, int y, int z) {
    const uint32_t to = shared_address(shared);
    emulated_whole(map, to);
    EmulatedBarrier& b = emulated_live_barrier(barrier);
    const CUtensorMap copy = *map;
    emulator::in_background([=, &b] {
        int64_t bytes = 0;
        emulated_box(&copy, to, x, y, z, [&](unsigned char* s, unsigned char* g) {
            g ? std::memcpy(s, g, 2) : std::memset(s, 0, 2);
            bytes += 2;
        });
        b.bytes -= bytes;
        emulated_progress(b);
    });
}
PTX void tma_prefetch(const CUtensorMap*) {}
PTX void tma_store_3d(const CUtensorMap* map, const void* shared, int x, int y, int z) {
    const uint32_t from = shared_address(shared);
    emulated_whole(map, from);
    const CUtensorMap copy = *map;
    emulator::here->bulk.open.push_back([=] {
        emulated_box(&copy, from, x, y, z, [&](unsigned char* s, unsigned char* g) {
            if (g) std::memcpy(g, s, 2);
        });
    });
}
PTX void bulk_add_f32(float* global, const float* shared, uint32_t bytes) {
    emulated_aligned(global, 16, "cp.reduce.async.bulk");
    emulated_aligned(shared, 16, "cp.reduce.async.bulk");
    if (bytes % 16) emulator::fail("cp.reduce.async.bulk: a size that is no multiple of 16");
    shared_address(shared);
    emulator::here->bulk.open.push_back([=] {
        for (uint32_t i = 0; i < bytes / 4; ++i) global[i] += shared[i];
    });
}
PTX void bulk_commit() { emulator::here->bulk.commit(); }
template <int PENDING>
PTX void bulk_wait_read() {
    auto& groups = emulator::here->bulk.committed;
    while (groups.size() > static_cast<size_t>(PENDING)) {
        for (const auto& action : groups.front()) action();
        groups.erase(groups.begin());
    }
}
PTX void fence_async() {}
template <int REGISTERS>
PTX void registers_down() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8"); }
template <int REGISTERS>
PTX void registers_up() { static_assert(REGISTERS % 8 == 0 && REGISTERS >= 24 && REGISTERS <= 256, "a multiple of 8"); }

// Element (row, k) of an operand in shared memory: rows of A or columns of B.
PTX float emulated_element(uint64_t descriptor, bool transposed, int row, int k) {
    if (descriptor >> 62 != 1) emulator::fail("wgmma: a descriptor without the 128-byte swizzle");
    const uint32_t start = (descriptor & 0x3fff) << 4, leading = (descriptor >> 16 & 0x3fff) << 4, stride = (descriptor >> 32 & 0x3fff) << 4;
    uint32_t at = transposed ? start + row / 64 * leading + k / 8 * stride + k % 8 * 128 + row % 64 * 2
                             : start + row / 8 * stride + row % 8 * 128 + k * 2;
    at ^= (at >> 7 & 7) << 4;
    uint16_t bits;
    std::memcpy(&bits, emulator::shared_memory() + at, 2);
    return emulated_float(bits);
}
PTX void wgmma_fence() {}
template <int R>
PTX void wgmma_hold(float (&)[R]) {}
PTX void wgmma_commit() { emulator::here->products.commit(); }
PTX void emulated_wgmma(emulator::Thread** t, const std::vector<emulator::Wgmma*>& parts) {
    const emulator::Wgmma& first = *parts[0];
    const int n = first.n;
    static float a[64][16], b[256][16], sum[64][256];
    for (int i = 0; i < 64; ++i)
        for (int k = 0; k < 16; ++k) {
            if (first.a_in_registers) {
                const int lane = i / 16 * 32 + i % 8 * 4 + k % 8 / 2, part = (i % 16 >= 8) + 2 * (k >= 8);
                a[i][k] = emulated_float(parts[lane]->a[part] >> 16 * (k % 2) & 0xffff);
            } else {
                a[i][k] = emulated_element(first.a_descriptor, first.a_transposed, i, k);
            }
        }
    for (int j = 0; j < n; ++j)
        for (int k = 0; k < 16; ++k) b[j][k] = emulated_element(first.b_descriptor, first.b_transposed, j, k);
    for (int i = 0; i < 64; ++i)
        for (int j = 0; j < n; ++j) {
            float s = 0;
            for (int k = 0; k < 16; ++k) s += a[i][k] * b[j][k];
            sum[i][j] = s;
        }
    for (int lane = 0; lane < 128; ++lane) {
        const emulator::Wgmma& mine = *parts[lane];
        if (mine.a_descriptor != first.a_descriptor || mine.b_descriptor != first.b_descriptor || mine.n != n || mine.accumulate != first.accumulate)
            emulator::fail("wgmma: warps of a group with different operands");
        for (int r = 0; r < n / 2; ++r) {
            const int i = lane / 32 * 16 + lane % 32 / 4 + 8 * (r % 4 / 2), j = r / 4 * 8 + 2 * (lane % 4) + r % 2;
            mine.d[r] = mine.accumulate ? mine.d[r] + sum[i][j] : sum[i][j];
        }
    }
    (void)t;
}
template <int PENDING>
PTX void wgmma_wait() {
    emulator::warpgroup("wgmma.wait_group", emulator::here, [](void** all) {
        auto** threads = reinterpret_cast<emulator::Thread**>(all);
        auto& groups = threads[0]->products.committed;
        for (int i = 0; i < 128; ++i)
            if (threads[i]->products.committed.size() != groups.size()) emulator::fail("wgmma: warps of a group have committed different numbers");
        while (groups.size() > static_cast<size_t>(PENDING)) {
            for (size_t p = 0; p < groups.front().size(); ++p) {
                std::vector<emulator::Wgmma*> parts(128);
                for (int i = 0; i < 128; ++i) {
                    auto& mine = threads[i]->products.committed.front();
                    if (p >= mine.size()) emulator::fail("wgmma: warps of a group have issued different numbers");
                    parts[i] = &mine[p];
                }
                emulated_wgmma(threads, parts);
            }
            for (int i = 0; i < 128; ++i) threads[i]->products.committed.erase(threads[i]->products.committed.begin());
        }
    });
}
template <bool A_TRANSPOSED, bool B_TRANSPOSED, int R>
PTX void wgmma_shared(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
    emulator::here->products.open.push_back({d, 2 * R, false, A_TRANSPOSED, B_TRANSPOSED, accumulate, {}, a, b});
}
template <bool A_TRANSPOSED, bool B_TRANSPOSED, int R>
PTX void wgmma_shared_first(float (&d)[R], uint64_t a, uint64_t b) {
    wgmma_shared<A_TRANSPOSED, B_TRANSPOSED>(d, a, b, false);
}
template <bool B_TRANSPOSED, int R>
PTX void wgmma_registers(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
    emulator::here->products.open.push_back({d, 2 * R, true, false, B_TRANSPOSED, accumulate, {a[0], a[1], a[2], a[3]}, 0, b});
}

// What the kernels of rows share: W elements read and written at once (16 bytes, or one element where addresses or sizes do not
// allow it), which threads hold a row, and sums over those threads.
#pragma once
#include <initializer_list>
#include <type_traits>

#include "device.cuh"

// W elements as they lie in memory.
template <class T, int W>
struct Chunk;
template <> struct Chunk<float, 4> { float4 raw; };
template <> struct Chunk<float, 1> { float raw; };
template <> struct Chunk<bf16, 8> { uint4 raw; };
template <> struct Chunk<bf16, 1> { uint16_t raw; };

DEVICE void unpack(const Chunk<float, 4>& c, float (&v)[4]) { v[0] = c.raw.x, v[1] = c.raw.y, v[2] = c.raw.z, v[3] = c.raw.w; }
DEVICE void unpack(const Chunk<float, 1>& c, float (&v)[1]) { v[0] = c.raw; }
DEVICE void unpack(const Chunk<bf16, 8>& c, float (&v)[8]) {
    v[0] = low_half(c.raw.x), v[1] = high_half(c.raw.x), v[2] = low_half(c.raw.y), v[3] = high_half(c.raw.y);
    v[4] = low_half(c.raw.z), v[5] = high_half(c.raw.z), v[6] = low_half(c.raw.w), v[7] = high_half(c.raw.w);
}
DEVICE void unpack(const Chunk<bf16, 1>& c, float (&v)[1]) { v[0] = to_float(bf16{c.raw}); }

DEVICE void pack(Chunk<float, 4>& c, const float (&v)[4]) { c.raw = make_float4(v[0], v[1], v[2], v[3]); }
DEVICE void pack(Chunk<float, 1>& c, const float (&v)[1]) { c.raw = v[0]; }
DEVICE void pack(Chunk<bf16, 8>& c, const float (&v)[8]) {
    c.raw = make_uint4(pack_bf16(v[0], v[1]), pack_bf16(v[2], v[3]), pack_bf16(v[4], v[5]), pack_bf16(v[6], v[7]));
}
DEVICE void pack(Chunk<bf16, 1>& c, const float (&v)[1]) { c.raw = from_float<bf16>(v[0]).bits; }

// The same elements, but the compiler does not know it: it unpacks them again instead of keeping eight floats in the room of two
// chunks. `never` is false, and not a constant.
template <class T, int W>
DEVICE Chunk<T, W> repacked(const Chunk<T, W>& c, bool never) {
    if constexpr (W == 8) {
        const uint32_t zero = never ? 0xffffffffu : 0u;  // all bits, or it knows the upper halves
        return {make_uint4(c.raw.x ^ zero, c.raw.y ^ zero, c.raw.z ^ zero, c.raw.w ^ zero)};
    } else {
        return c;
    }
}

template <int W, class T>
DEVICE Chunk<T, W> load_chunk(const T* from) {
    return {*reinterpret_cast<const decltype(Chunk<T, W>::raw)*>(from)};
}
// To global memory. An assignment of 16 bytes the compiler may make into four; __stcg stays one, and is how stores go anyway.
template <int W, class T>
DEVICE void store_chunk(T* to, const Chunk<T, W>& chunk) {
    auto* raw = reinterpret_cast<decltype(Chunk<T, W>::raw)*>(to);
    if constexpr (W == 1) *raw = chunk.raw;
    else __stcg(raw, chunk.raw);
}
template <int W, class T>
DEVICE void store_values(T* to, const float (&v)[W]) {
    Chunk<T, W> chunk;
    pack(chunk, v);
    store_chunk(to, chunk);
}
template <class T, int W>
DEVICE Chunk<T, W> filled(float x) {
    float v[W];
#pragma unroll
    for (int w = 0; w < W; ++w) v[w] = x;
    Chunk<T, W> chunk;
    pack(chunk, v);
    return chunk;
}
// W floats beside a chunk of W elements of any type, 16 bytes at a time.
template <int W>
DEVICE void load_floats(const float* from, float (&v)[W]) {
    if constexpr (W == 1)
        v[0] = *from;
    else
#pragma unroll
        for (int w = 0; w < W; w += 4) {
            const float4 x = *reinterpret_cast<const float4*>(from + w);
            v[w] = x.x, v[w + 1] = x.y, v[w + 2] = x.z, v[w + 3] = x.w;
        }
}
template <int W>
DEVICE void store_floats(float* to, const float (&v)[W]) {  // to global memory
    if constexpr (W == 1)
        *to = v[0];
    else
#pragma unroll
        for (int w = 0; w < W; w += 4) __stcg(reinterpret_cast<float4*>(to + w), make_float4(v[w], v[w + 1], v[w + 2], v[w + 3]));
}
template <int W>
DEVICE void store_shared(float* to, const float (&v)[W]) {
#pragma unroll
    for (int w = 0; w < W; ++w) to[w] = v[w];
}

// Over GROUP neighbouring threads that hold a row: within a warp, or the whole block.
template <int GROUP>
DEVICE float group_sum(float x, float* room) {
    if constexpr (GROUP <= WARP)
        return warp_sum<GROUP>(x);
    else
        return block_sum(x, room);
}
template <int GROUP>
DEVICE float group_max(float x, float* room) {
    if constexpr (GROUP <= WARP)
        return warp_max<GROUP>(x);
    else
        return block_max(x, room);
}

// GROUP threads hold HELD chunks each of one row; small groups stand in blocks of 256 and hold ROWS rows at once, so that every
// thread has several loads under way.
template <int GROUP_, int HELD_, int ROWS_ = 1>
struct Shape {
    static constexpr int GROUP = GROUP_, HELD = HELD_, ROWS = ROWS_;
    static constexpr int BLOCK = GROUP > WARP ? GROUP : 256;
    static constexpr int ROWS_OF_A_BLOCK = BLOCK / GROUP * ROWS;
};

// Calls f with the Shape whose registers hold a row of so many chunks in each of one or two ARRAYS; false where none does.
template <int W, int ARRAYS, class F>
bool by_shape(int64_t chunks, F&& f) {
    if (chunks <= 4) return f(Shape<4, 1, 4>{}), true;
    if (chunks <= 32 && W > 1) return chunks <= 16 ? f(Shape<16, 1, 4>{}) : f(Shape<32, 1, 4>{}), true;
    if (chunks <= 64 && W > 1) return f(Shape<32, 2, 2>{}), true;
    if (chunks <= 128) return f(Shape<32, 4>{}), true;
    if (chunks <= 256 && W > 1) return f(Shape<64, 4>{}), true;
    if (chunks <= 512 && W > 1) return f(Shape<128, 4>{}), true;
    if (chunks <= 1024) return f(Shape<256, 4>{}), true;
    if (chunks <= 2048 && W > 1) return f(Shape<512, 4>{}), true;
    if (chunks <= 4096) return f(Shape<1024, 4>{}), true;
    if constexpr (ARRAYS == 1)
        if (chunks <= 8192) return f(Shape<1024, 8>{}), true;
    return false;
}

// Whether all of these lie on multiples of 16 bytes.
inline bool aligned(std::initializer_list<const void*> addresses, std::initializer_list<int64_t> bytes) {
    bool ok = true;
    for (const void* address : addresses) ok = ok && reinterpret_cast<uintptr_t>(address) % 16 == 0;
    for (const int64_t size : bytes) ok = ok && size % 16 == 0;
    return ok;
}
// Calls f with T's elements in 16 bytes, or 1, as a constant.
template <class T, class F>
void by_width(bool wide, F&& f) {
    wide ? f(std::integral_constant<int, 16 / sizeof(T)>{}) : f(std::integral_constant<int, 1>{});
}
// Calls f(T{}, W) for the dtype and, by `fits(T{})`, the width.
template <class Fits, class F>
void by_type(int dtype, Fits&& fits, F&& f) {
    by_dtype(dtype, [&](auto type) {
        by_width<decltype(type)>(fits(static_cast<int64_t>(sizeof type)), [&](auto width) { f(type, width); });
    });
}

inline dim3 blocks(int64_t count) { return dim3(static_cast<unsigned>(count)); }

// Bytes of shared memory that a block can have on the current device.
inline int64_t shared_limit() {
    int device = 0, bytes = 0;
    check(cudaGetDevice(&device), "cudaGetDevice");
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device), "cudaDeviceGetAttribute");
    return bytes;
}

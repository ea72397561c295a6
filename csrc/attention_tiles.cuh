// Tiles of bf16 rows in shared memory and their products by mma.m16n8k16, for attention's portable kernels.
// A tile has rows of DP elements, DP / 8 chunks of 16 bytes, their place exchanged so that eight rows' chunks of one column lie in
// different banks. Fragments are those of ptx.cuh; M is how many times 16 rows a warp owns.
#pragma once
#include <type_traits>

#include "attention_gpu.h"
#include "device.cuh"

namespace {

template <int DP>
constexpr int TURN = DP % 64 == 0 ? 8 : DP % 32 == 0 ? 4 : 2;  // chunks that change places with one another

template <int DP>
DEVICE int place_of(int row, int chunk) {  // in elements
    return row * DP + (chunk ^ row / (8 / TURN<DP>) % TURN<DP>) * 8;
}
// The place `chunks` (even) behind that of an even chunk or of the odd one after it, in the same row.
template <int DP>
DEVICE int behind(int place, int chunks) {
    return (place ^ chunks % TURN<DP> * 8) + chunks / TURN<DP> * TURN<DP> * 8;
}

// One head's rows of one sequence.
struct Source {
    const bf16* data;
    int64_t stride;
    int count, head_dim;
};

DEVICE Source source_of(const Rows& rows, int first, int head, int count, int head_dim) {
    return {static_cast<const bf16*>(rows.data) + first * rows.token_stride + head * rows.head_stride, rows.token_stride, count, head_dim};
}

// Calls f(row, chunk) for this thread's chunks of a tile. Not unrolled: the addresses would take all registers.
template <int DP, int ROWS, int THREADS, class F>
DEVICE void for_chunks(F&& f) {
    constexpr int CHUNKS = DP / 8, ALL = ROWS * CHUNKS;
#pragma unroll 1
    for (int i = 0; i < (ALL + THREADS - 1) / THREADS; ++i) {
        const int index = threadIdx.x + i * THREADS;
        if (ALL % THREADS == 0 || index < ALL) f(index / CHUNKS, index % CHUNKS);
    }
}

// The rows from `first` on into a tile, zeros past the sequence's last row and past D. ALIGNED: in the background.
template <int DP, int ROWS, int THREADS, bool ALIGNED>
DEVICE void load_rows(bf16* tile, const Source& from, int first) {
    constexpr int CHUNKS = DP / 8, STEP = THREADS / CHUNKS;
    if (ALIGNED && THREADS % (8 * CHUNKS) == 0 && ROWS % STEP == 0) {  // a thread's chunks lie in one column, evenly
        const int row = threadIdx.x / CHUNKS, chunk = threadIdx.x % CHUNKS;
        const bf16* place = from.data + first * from.stride + (row * from.stride + chunk * 8);
        const int count = chunk * 8 < from.head_dim ? from.count - first - row : 0;
        bf16* to = tile + place_of<DP>(row, chunk);
#pragma unroll
        for (int i = 0; i < ROWS / STEP; ++i) {
            cp_async_16(to + i * STEP * DP, place, i * STEP < count);
            place += STEP * from.stride;
        }
        return;
    }
    for_chunks<DP, ROWS, THREADS>([&](int row, int chunk) {
        const bool valid = first + row < from.count && chunk * 8 < from.head_dim;
        const bf16* place = from.data + ((first + row) * from.stride + chunk * 8);
        if (ALIGNED) {
            cp_async_16(tile + place_of<DP>(row, chunk), place, valid);
        } else {
            Pack<bf16> pack{};
#pragma unroll
            for (int i = 0; i < 8; ++i)
                if (valid && chunk * 8 + i < from.head_dim) pack.v[i] = place[i];
            store_pack(tile + place_of<DP>(row, chunk), pack);
        }
    });
}

// Turns the sign of what this thread has loaded.
template <int DP, int ROWS, int THREADS>
DEVICE void negate_rows(bf16* tile) {
    cp_async_wait<0>();
    for_chunks<DP, ROWS, THREADS>([&](int row, int chunk) {
        uint4& x = *reinterpret_cast<uint4*>(tile + place_of<DP>(row, chunk));
        x.x ^= 0x80008000u, x.y ^= 0x80008000u, x.z ^= 0x80008000u, x.w ^= 0x80008000u;
    });
}

template <int M, int N>
DEVICE void clear(float (&x)[M][N][4]) {
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N; ++n)
#pragma unroll
            for (int i = 0; i < 4; ++i) x[m][n][i] = 0;
}

// s = the warp's rows of `a`, from a_row (a multiple of 16) on, times the first N rows of `b`, over all columns.
template <int DP, int M, int N8>
DEVICE void rows_times_rows(float (&s)[M][N8][4], const bf16* a, int a_row, const bf16* b) {
    const int lane = threadIdx.x % WARP, in = lane % 8, part = lane / 8;
    const int of_a = place_of<DP>(lane % 16, lane / 16), of_b = place_of<DP>((part >> 1) * 8 + in, part & 1);
    clear(s);
#pragma unroll 4
    for (int k = 0; k < DP / 8; k += 2) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; ++m) ldmatrix_x4(x[m], a + behind<DP>(of_a, k) + (a_row + m * 16) * DP);
#pragma unroll
        for (int n = 0; n < N8; n += 2) {
            ldmatrix_x4(y, b + behind<DP>(of_b, k) + n * 8 * DP);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16(s[m][n], x[m], y[0], y[1]);
                mma_m16n8k16(s[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}

// What queries `row`, row + 8, ... do not see of the keys from first_key on becomes `instead`.
template <int M, int N8>
DEVICE void hide(float (&s)[M][N8][4], const AttentionTile& tile, int row, int first_key, bool causal, float instead) {
    const int behind = tile.keys - first_key - 2 * (threadIdx.x % 4), diagonal = row + 1 - tile.queries + behind;
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int end = (causal ? min(diagonal + m * 16 + i / 2 * 8, behind) : behind) - i % 2;
#pragma unroll
            for (int n = 0; n < N8; ++n) s[m][n][i] = n * 8 < end ? s[m][n][i] : instead;
        }
}

// Accumulators of 16 columns become the operand that has them as its depth, rounded to bf16.
DEVICE void to_operand(uint32_t (&a)[4], const float (&low)[4], const float (&high)[4]) {
    a[0] = pack_bf16(low[0], low[1]), a[1] = pack_bf16(low[2], low[3]);
    a[2] = pack_bf16(high[0], high[1]), a[3] = pack_bf16(high[2], high[3]);
}

// sum += weights, rounded to bf16, times the first rows of `b`, for the N8 * 8 columns from chunk `first` on. Calls beside(m, operand)
// with the rounded weights of each 16 columns.
template <int DP, int M, int K8, int N8, class F>
DEVICE void weights_times_rows(float (&sum)[M][N8][4], const float (&weights)[M][K8][4], const bf16* b, int first, F&& beside) {
    const int lane = threadIdx.x % WARP, of_b = place_of<DP>(lane % 16, lane / 16);
#pragma unroll
    for (int k = 0; k < K8; k += 2) {
        uint32_t x[M][4], y[4];
#pragma unroll
        for (int m = 0; m < M; ++m) {
            to_operand(x[m], weights[m][k], weights[m][k + 1]);
            beside(m, x[m]);
        }
#pragma unroll
        for (int n = 0; n < N8; n += 2) {
            ldmatrix_x4_trans(y, b + behind<DP>(of_b, first + n) + k * 8 * DP);
#pragma unroll
            for (int m = 0; m < M; ++m) {
                mma_m16n8k16(sum[m][n], x[m], y[0], y[1]);
                mma_m16n8k16(sum[m][n + 1], x[m], y[2], y[3]);
            }
        }
    }
}
template <int DP, int M, int K8, int N8>
DEVICE void weights_times_rows(float (&sum)[M][N8][4], const float (&weights)[M][K8][4], const bf16* b, int first = 0) {
    weights_times_rows<DP>(sum, weights, b, first, [](int, const uint32_t (&)[4]) {});
}

// factor[m][half] * x becomes the warp's rows `row` on (of `to.count`), columns from chunk `first` on; `room` is a tile of which the
// warp's own rows, from room_row on, are in no more use.
template <int DP, bool ALIGNED, int M, int N8>
DEVICE void store_rows(const Source& to, int row, const float (&x)[M][N8][4], const float (&factor)[M][2], bf16* room, int room_row,
                       int first = 0) {
    const int lane = threadIdx.x % WARP, g = lane / 4, t = lane % 4;
    bf16* data = const_cast<bf16*>(to.data);
    if (ALIGNED) __syncwarp();  // all lanes have read the room
#pragma unroll
    for (int m = 0; m < M; ++m)
#pragma unroll
        for (int n = 0; n < N8; ++n)
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int at = m * 16 + half * 8 + g, d = (first + n) * 8 + 2 * t;
                const uint32_t pair = pack_bf16(x[m][n][2 * half] * factor[m][half], x[m][n][2 * half + 1] * factor[m][half]);
                if (ALIGNED) {
                    *reinterpret_cast<uint32_t*>(room + place_of<DP>(room_row + at, first + n) + 2 * t) = pair;
                } else if (row + at < to.count) {
                    bf16* place = data + (row + at) * to.stride + d;
                    if (d < to.head_dim) place[0] = {static_cast<uint16_t>(pair)};
                    if (d + 1 < to.head_dim) place[1] = {static_cast<uint16_t>(pair >> 16)};
                }
            }
    if (!ALIGNED) return;
    __syncwarp();
#pragma unroll
    for (int i = 0; i < M * N8 / 2; ++i) {
        const int index = i * WARP + lane, at = index / N8, chunk = first + index % N8;
        if (row + at < to.count && chunk * 8 < to.head_dim)
            store_pack(data + (row + at) * to.stride + chunk * 8, load_pack(room + place_of<DP>(room_row + at, chunk)));
    }
}

// Calls f(integral_constant of DP, bool_constant of ALIGNED): D padded to what there are kernels for.
template <class F>
void by_head_dim(int64_t head_dim, bool aligned, F&& f) {
    const auto take = [&](auto size, auto by_packs) {
        if (head_dim > decltype(size)::value || aligned != decltype(by_packs)::value) return false;
        f(size, by_packs);
        return true;
    };
    const auto of = [&](auto by_packs) {
        constexpr bool ALL = decltype(by_packs)::value;  // sizes that only packs have kernels for
        if constexpr (ALL)
            if (take(std::integral_constant<int, 16>{}, by_packs)) return;
        if (take(std::integral_constant<int, 32>{}, by_packs) || take(std::integral_constant<int, 64>{}, by_packs)) return;
        if constexpr (ALL)
            if (take(std::integral_constant<int, 96>{}, by_packs)) return;
        if (take(std::integral_constant<int, 128>{}, by_packs)) return;
        if constexpr (ALL)
            if (take(std::integral_constant<int, 192>{}, by_packs)) return;
        take(std::integral_constant<int, 256>{}, by_packs);
    };
    if (aligned) of(std::true_type{});
    else of(std::false_type{});
}

inline bool by_packs(const Rows& rows) {
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && rows.token_stride % 8 == 0 && rows.head_stride % 8 == 0;
}

}  // namespace

// out = x w^T + bias (matmul.h). An element's sum goes over the depth in one order whatever the tile: bf16 sixteen at a time into one
// fp32 register of mma.m16n8k16, whose rows and columns do not know of each other; fp32 one at a time in passes whose sums are added
// up. So tiles are free to be small where there are few rows, and no other choice depends on the number of rows.
#include "device.cuh"
#include "gpu.h"
#include "matmul.h"

namespace {

struct Corner {
    int64_t row, column;
};
// Blocks that run together take tiles near each other: eight tiles of rows by all columns, so that both sides stay in the L2 cache.
template <int ROWS, int COLUMNS>
DEVICE Corner corner(const MatmulProblem& p) {
    constexpr int64_t GROUP = 8;
    const int64_t high = (p.rows + ROWS - 1) / ROWS, wide = (p.columns + COLUMNS - 1) / COLUMNS;
    const int64_t group = blockIdx.x / (GROUP * wide), within = blockIdx.x - group * GROUP * wide;
    const int64_t height = min(GROUP, high - group * GROUP);
    return {(group * GROUP + within % height) * ROWS, within / height * COLUMNS};
}

// One side of a tile on its way into shared memory, DEPTH elements of each of ROWS rows at a time, with zeros for what is outside.
// A thread takes 16 bytes at one place of every STEP-th row: in the background where addresses allow it, else element by element.
template <class T, int ROWS, int DEPTH, int THREADS, bool ALIGNED>
struct Side {
    static constexpr int SIZE = 16 / sizeof(T), CHUNKS = DEPTH / SIZE, STEP = THREADS / CHUNKS;
    static_assert(STEP % 8 == 0 && ROWS % STEP == 0, "all of a thread's places are turned alike");
    const T* next;
    int64_t depth;
    int left, rows;  // elements from `next` to the end of its row; rows of the thread's that exist

    DEVICE Side(const void* from, int64_t first, int64_t count, int64_t depth) : depth(depth) {
        const int row = threadIdx.x / CHUNKS, skipped = threadIdx.x % CHUNKS * SIZE;
        const int64_t below = count - first - row;
        rows = below > 0 ? static_cast<int>(min(below + STEP - 1, int64_t{ROWS})) / STEP : 0;
        next = static_cast<const T*>(from) + (first + (rows ? row : 0)) * depth + skipped;
        left = static_cast<int>(depth) - skipped;
    }
    template <int PITCH>
    DEVICE void bring(T* to) {  // where the thread's first 16 bytes go
#pragma unroll
        for (int i = 0; i < ROWS / STEP; ++i) {
            const T* const row = next + i * STEP * depth;
            if constexpr (ALIGNED) {
                cp_async_16(to + i * STEP * PITCH, row, i < rows && left > 0);
            } else {
                Pack<T> pack;
#pragma unroll
                for (int j = 0; j < SIZE; ++j) pack.v[j] = i < rows && j < left ? row[j] : T{};
                store_pack(to + i * STEP * PITCH, pack);
            }
        }
        next += DEPTH, left -= DEPTH;
    }
};

template <class T>
DEVICE void put_pair(const MatmulProblem& p, int64_t row, int64_t column, float first, float second, bool paired) {
    T* const to = static_cast<T*>(p.out) + row * p.columns + column;
    if (paired && column + 1 < p.columns) {
        if constexpr (sizeof(T) == 4) *reinterpret_cast<float2*>(to) = make_float2(first, second);
        else *reinterpret_cast<uint32_t*>(to) = pack_bf16(first, second);
    } else {
        if (column < p.columns) to[0] = from_float<T>(first);
        if (column + 1 < p.columns) to[1] = from_float<T>(second);
    }
}

// --- bf16 ----------------------------------------------------------------------------------------------------------------------

template <int M, int N, int K, int DOWN, int ACROSS, int STAGES_>
struct Tile {
    static constexpr int ROWS = M, COLUMNS = N, DEPTH = K, STAGES = STAGES_;
    static constexpr int WARPS_ACROSS = ACROSS, THREADS = DOWN * ACROSS * WARP;
    static constexpr int HIGH = M / DOWN / 16, WIDE = N / ACROSS / 8;  // of a warp, in 16x8 products
    static constexpr int STAGE = (M + N) * K;                          // elements
    static constexpr size_t BYTES = static_cast<size_t>(STAGE) * STAGES * sizeof(bf16);
};
using Large = Tile<128, 128, 32, 2, 2, 4>;
using Medium = Tile<64, 64, 64, 2, 2, 4>;
using Small = Tile<16, 32, 64, 1, 2, 8>;

// Where chunk `chunk` (of 8 elements) of a row lies in a stage: turned by the row, so that the eight rows that ldmatrix reads at once
// lie in different banks.
template <int DEPTH>
DEVICE int place(int row, int chunk) {
    constexpr int CHUNKS = DEPTH / 8;
    const int turn = CHUNKS == 4 ? row >> 1 & 3 : row & 7;
    return row * DEPTH + (chunk ^ turn) * 8;
}

template <class T>
struct Fragments {
    uint32_t a[T::HIGH][4], b[T::WIDE / 2][4];
};
template <class T>
DEVICE void load_fragments(Fragments<T>& f, const bf16* stage, int down, int across, int step) {
    const int lane = threadIdx.x % WARP;
#pragma unroll
    for (int i = 0; i < T::HIGH; ++i)
        ldmatrix_x4(f.a[i], stage + place<T::DEPTH>(down + 16 * i + lane % 16, 2 * step + lane / 16));
#pragma unroll
    for (int j = 0; j < T::WIDE / 2; ++j)
        ldmatrix_x4(f.b[j], stage + T::ROWS * T::DEPTH +
                                place<T::DEPTH>(across + 16 * j + lane % 8 + lane / 16 * 8, 2 * step + lane / 8 % 2));
}

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(T::THREADS, T::THREADS == 128 ? 2 : 4) matmul_bf16_kernel(MatmulProblem p) {
    constexpr int STEPS = T::DEPTH / 16;
    bf16* const stages = reinterpret_cast<bf16*>(shared_memory());
    const Corner at = corner<T::ROWS, T::COLUMNS>(p);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int down = warp / T::WARPS_ACROSS * T::HIGH * 16, across = warp % T::WARPS_ACROSS * T::WIDE * 8;
    const int runs = static_cast<int>((p.depth + T::DEPTH - 1) / T::DEPTH);

    Side<bf16, T::ROWS, T::DEPTH, T::THREADS, ALIGNED> x(p.x, at.row, p.rows, p.depth);
    Side<bf16, T::COLUMNS, T::DEPTH, T::THREADS, ALIGNED> weight(p.weight, at.column, p.columns, p.depth);
    bf16* const mine = stages + place<T::DEPTH>(threadIdx.x / x.CHUNKS, threadIdx.x % x.CHUNKS);
    const auto fetch = [&](int run) {
        if (run < runs) {
            bf16* const to = mine + run % T::STAGES * T::STAGE;
            x.template bring<T::DEPTH>(to);
            weight.template bring<T::DEPTH>(to + T::ROWS * T::DEPTH);
        }
        cp_async_commit();  // also without anything, so that the number under way tells which have come
    };
    const auto arrive = [] {
        cp_async_wait<T::STAGES - 2>();
        __syncthreads();
    };
    for (int run = 0; run < T::STAGES - 1; ++run) fetch(run);
    arrive();

    float sum[T::HIGH][T::WIDE][4] = {};
    Fragments<T> fragments[2];
    load_fragments(fragments[0], stages, down, across, 0);
    for (int run = 0; run < runs; ++run) {
#pragma unroll
        for (int step = 0; step < STEPS; ++step) {
            // What the next products take is loaded before these are made.
            if (step + 1 < STEPS) {
                load_fragments(fragments[(step + 1) % 2], stages + run % T::STAGES * T::STAGE, down, across, step + 1);
            } else {
                arrive();
                load_fragments(fragments[(step + 1) % 2], stages + (run + 1) % T::STAGES * T::STAGE, down, across, 0);
            }
            if (step == 0) fetch(run + T::STAGES - 1);  // into the stage that all have left at the last barrier
            const Fragments<T>& now = fragments[step % 2];
#pragma unroll
            for (int i = 0; i < T::HIGH; ++i)
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) mma_m16n8k16(sum[i][j], now.a[i], now.b[j / 2][j % 2 * 2], now.b[j / 2][j % 2 * 2 + 1]);
        }
    }
    cp_async_wait<0>();

    const bool paired = p.columns % 2 == 0 && reinterpret_cast<uintptr_t>(p.out) % 8 == 0;
#pragma unroll
    for (int j = 0; j < T::WIDE; ++j) {
        const int64_t column = at.column + across + 8 * j + 2 * (lane % 4);
        const float first = p.bias && column < p.columns ? p.bias[column] : 0.f;
        const float second = p.bias && column + 1 < p.columns ? p.bias[column + 1] : 0.f;
#pragma unroll
        for (int i = 0; i < 2 * T::HIGH; ++i) {
            const int64_t row = at.row + down + 8 * i + lane / 4;
            if (row >= p.rows) continue;
            const float *pair = sum[i / 2][j] + i % 2 * 2, x = pair[0] + first, y = pair[1] + second;
            p.out_dtype ? put_pair<bf16>(p, row, column, x, y, paired) : put_pair<float>(p, row, column, x, y, paired);
        }
    }
}

// --- fp32 ----------------------------------------------------------------------------------------------------------------------

// A thread's products are HIGH rows by WIDE columns, each a stride of threads apart; a warp's threads are 4 rows of 8.
template <int M, int N, int HIGH_, int WIDE_>
struct WideTile {
    static constexpr int ROWS = M, COLUMNS = N, DEPTH = 16, STAGES = 3, HIGH = HIGH_, WIDE = WIDE_;
    static constexpr int DOWN = M / HIGH_, ACROSS = N / WIDE_, THREADS = DOWN * ACROSS;
    static constexpr int PITCH = DEPTH + 4;  // floats: 16 bytes each of eight rows lie in different banks
    static constexpr int STAGE = (M + N) * PITCH;
    static constexpr size_t BYTES = static_cast<size_t>(STAGE) * STAGES * sizeof(float);
};
using WideLarge = WideTile<128, 64, 8, 4>;
using WideSmall = WideTile<16, 32, 4, 2>;
constexpr int PASS = 256;  // depth of one sum; a sum of sums rounds less

template <class T, bool ALIGNED>
__global__ void __launch_bounds__(T::THREADS, 2) matmul_fp32_kernel(MatmulProblem p) {
    float* const stages = reinterpret_cast<float*>(shared_memory());
    const Corner at = corner<T::ROWS, T::COLUMNS>(p);
    const int warp = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const int across = lane % 8 + warp % (T::ACROSS / 8) * 8, down = lane / 8 + warp / (T::ACROSS / 8) * 4;
    const int runs = static_cast<int>((p.depth + T::DEPTH - 1) / T::DEPTH);
    Side<float, T::ROWS, T::DEPTH, T::THREADS, ALIGNED> left(p.x, at.row, p.rows, p.depth);
    Side<float, T::COLUMNS, T::DEPTH, T::THREADS, ALIGNED> right(p.weight, at.column, p.columns, p.depth);
    float* const mine = stages + threadIdx.x / left.CHUNKS * T::PITCH + threadIdx.x % left.CHUNKS * 4;
    const auto fetch = [&](int run) {
        if (run < runs) {
            float* const to = mine + run % T::STAGES * T::STAGE;
            left.template bring<T::PITCH>(to);
            right.template bring<T::PITCH>(to + T::ROWS * T::PITCH);
        }
        cp_async_commit();
    };
    for (int run = 0; run < T::STAGES - 1; ++run) fetch(run);

    float total[T::HIGH][T::WIDE] = {}, sum[T::HIGH][T::WIDE] = {};
    for (int run = 0; run < runs; ++run) {
        cp_async_wait<T::STAGES - 2>();
        __syncthreads();  // the run has come for all, and all have left the one before
        fetch(run + T::STAGES - 1);
        const float* const x = stages + run % T::STAGES * T::STAGE + down * T::PITCH;
        const float* const weight = stages + run % T::STAGES * T::STAGE + (T::ROWS + across) * T::PITCH;
#pragma unroll 1  // more at a time would take more registers than two blocks of a multiprocessor have
        for (int k = 0; k < T::DEPTH; k += 4) {
            float4 w[T::WIDE];
#pragma unroll
            for (int j = 0; j < T::WIDE; ++j) w[j] = *reinterpret_cast<const float4*>(weight + j * T::ACROSS * T::PITCH + k);
#pragma unroll
            for (int i = 0; i < T::HIGH; ++i) {
                const float4 a = *reinterpret_cast<const float4*>(x + i * T::DOWN * T::PITCH + k);
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) sum[i][j] = fmaf(a.x, w[j].x, sum[i][j]);
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) sum[i][j] = fmaf(a.y, w[j].y, sum[i][j]);
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) sum[i][j] = fmaf(a.z, w[j].z, sum[i][j]);
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) sum[i][j] = fmaf(a.w, w[j].w, sum[i][j]);
            }
        }
        if ((run + 1) % (PASS / T::DEPTH) == 0 || run + 1 == runs) {
#pragma unroll
            for (int i = 0; i < T::HIGH; ++i)
#pragma unroll
                for (int j = 0; j < T::WIDE; ++j) total[i][j] += sum[i][j], sum[i][j] = 0.f;
        }
    }
    cp_async_wait<0>();

#pragma unroll
    for (int j = 0; j < T::WIDE; ++j) {
        const int64_t column = at.column + across + j * T::ACROSS;
        if (column >= p.columns) continue;
        const float bias = p.bias ? p.bias[column] : 0.f;
#pragma unroll
        for (int i = 0; i < T::HIGH; ++i) {
            const int64_t row = at.row + down + i * T::DOWN;
            if (row >= p.rows) continue;
            const float x = total[i][j] + bias;
            if (p.out_dtype) static_cast<bf16*>(p.out)[row * p.columns + column] = from_float<bf16>(x);
            else static_cast<float*>(p.out)[row * p.columns + column] = x;
        }
    }
}

template <class T>
void start(void (*kernel)(MatmulProblem), const MatmulProblem& p, cudaStream_t stream) {
    const int64_t tiles = ceil_div(p.rows, T::ROWS) * ceil_div(p.columns, T::COLUMNS);
    launch(kernel, dim3(static_cast<unsigned>(tiles)), dim3(T::THREADS), T::BYTES, stream, "matmul", p);
}
template <class T>
void start_bf16(const MatmulProblem& p, bool aligned, cudaStream_t stream) {
    start<T>(aligned ? matmul_bf16_kernel<T, true> : matmul_bf16_kernel<T, false>, p, stream);
}

}  // namespace

void gpu::matmul(const MatmulProblem& p, cudaStream_t stream) {
    const int64_t size = p.dtype ? sizeof(bf16) : sizeof(float);
    const uintptr_t both = reinterpret_cast<uintptr_t>(p.x) | reinterpret_cast<uintptr_t>(p.weight);
    const bool aligned = p.depth * size % 16 == 0 && both % 16 == 0;
    // A tile that leaves much of a GPU without work is too large; a hundred is about what an A100 or H100 has room for at once.
    const auto fills = [&](int64_t rows, int64_t columns) { return ceil_div(p.rows, rows) * ceil_div(p.columns, columns) >= 100; };
    if (!p.dtype && p.rows > 16 && aligned && fills(128, 64)) {
        start<WideLarge>(matmul_fp32_kernel<WideLarge, true>, p, stream);
    } else if (!p.dtype) {
        start<WideSmall>(aligned ? matmul_fp32_kernel<WideSmall, true> : matmul_fp32_kernel<WideSmall, false>, p, stream);
    } else if (p.rows <= 16) {
        start_bf16<Small>(p, aligned, stream);
    } else if (p.rows <= 64 || !aligned || !fills(128, 128)) {
        start_bf16<Medium>(p, aligned, stream);
    } else {
        start<Large>(matmul_bf16_kernel<Large, true>, p, stream);
    }
}

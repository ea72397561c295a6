// Shares rows out among threads in equal runs; small work stays on the calling thread.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <utility>
#include <vector>

// Whether rows are better written past the caches: they are too many to be there when somebody reads them, and every row of
// every array (address, row stride in elements) begins and ends on a multiple of 64 bytes.
inline bool streams(int64_t rows, int64_t columns, int dtype, std::initializer_list<std::pair<uintptr_t, int64_t>> arrays) {
    constexpr int64_t LARGE = 32 << 20;
    const int64_t size = dtype == 0 ? 4 : 2;
    bool fits = columns * size % 64 == 0 && rows * columns * size * static_cast<int64_t>(arrays.size()) >= LARGE;
    for (const auto& [address, stride] : arrays) fits = fits && address % 64 == 0 && stride * size % 64 == 0;
    return fits;
}

// From now on a forked child may use threads. libgomp keeps a team of idle threads for every thread that ran a loop; a child
// inherits the record of them without the threads, and its first loop, ours or torch's, would wait for them for ever. So
// the forking thread's team is ended before each fork; parent and child start another at their next loop.
void survive_forks();

template <class F>
void parallel_rows(int64_t rows, int64_t columns, int num_threads, F&& work) {
    constexpr int64_t WORTH_A_THREAD = 16384;  // elements: about the cost of waking a thread
    int64_t runs = rows * columns / WORTH_A_THREAD;
    runs = runs < num_threads ? runs : num_threads;
    runs = runs < rows ? runs : rows;
    if (runs <= 1) {
        if (rows > 0) work(int64_t{0}, rows);
        return;
    }
#pragma omp parallel for schedule(static, 1) num_threads(static_cast<int>(runs))
    for (int64_t i = 0; i < runs; ++i) work(rows * i / runs, rows * (i + 1) / runs);
}

// The same for work that also sums over rows into `width` floats: each run of rows adds to a sum of its own, with room for whole
// registers, then the runs are added in order. The runs do not depend on the number of threads, so neither does the rounding.
template <class F>
void parallel_sums(int64_t rows, int64_t columns, int64_t width, int num_threads, float* sums, F&& work) {
    constexpr int64_t RUN = 128;
    const int64_t runs = (rows + RUN - 1) / RUN, stride = (width + 15) / 16 * 16;
    std::vector<float> partial(static_cast<size_t>(runs * stride), 0.0f);
    parallel_rows(runs, RUN * columns, num_threads, [&](int64_t begin, int64_t end) {
        for (int64_t run = begin; run < end; ++run)
            work(run * RUN, std::min((run + 1) * RUN, rows), partial.data() + run * stride);
    });
    for (int64_t j = 0; j < width; ++j) {
        double total = 0;
        for (int64_t run = 0; run < runs; ++run) total += partial[run * stride + j];
        sums[j] = static_cast<float>(total);
    }
}

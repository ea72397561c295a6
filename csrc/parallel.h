// Shares rows out among threads in equal runs; small work stays on the calling thread.
#pragma once
#include <cstdint>

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

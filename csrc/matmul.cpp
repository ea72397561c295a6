#include "matmul.h"

#include <omp.h>

#include <algorithm>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

void matmul(const MatmulProblem& p, int num_threads) {
    constexpr int64_t WORTH_A_THREAD = 1 << 20;  // products: about the cost of waking a thread
    if (!p.rows || !p.columns) return;
    const bool x_in_lanes = p.rows <= 128;
    const int64_t lanes = x_in_lanes ? p.rows : p.columns, rows = x_in_lanes ? p.columns : p.rows, step = matmul_lanes(p.depth);
    const int64_t blocks = (lanes + step - 1) / step, worth = p.rows * p.columns * p.depth / WORTH_A_THREAD;
    const int64_t wanted = std::clamp<int64_t>(worth, 1, std::max(num_threads, 1));
    // A task packs its lanes anew, so rows are cut no finer than the threads need.
    const int64_t pieces = wanted > 1 ? (4 * wanted + blocks - 1) / blocks : 1;
    const int64_t run = ((rows + pieces - 1) / pieces + MATMUL_RUN - 1) / MATMUL_RUN * MATMUL_RUN;
    const int64_t tasks = blocks * ((rows + run - 1) / run);
    const int threads = static_cast<int>(std::min(wanted, tasks));
    Scratch scratch(threads, matmul_scratch(p.depth));
    const auto kernel = kernels().matmul;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (threads > 1)
    for (int64_t task = 0; task < tasks; ++task) {
        const int64_t lane = task % blocks * step, row = task / blocks * run;
        kernel(p, {x_in_lanes, lane, std::min(lane + step, lanes), row, std::min(row + run, rows)}, scratch.slice(omp_get_thread_num()));
    }
}

#include "head.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

bool has_head() { return kernels().head_forward != nullptr; }

namespace {

// kernel(begin, end, scratch) of each task's tokens.
template <class F>
void each_task(int64_t rows, int64_t floats, int num_threads, F&& kernel) {
    const int64_t tasks = head_padded(rows) / HEAD_TOKENS;
    if (!tasks) return;
    const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), tasks));
    Scratch scratch(threads, floats);
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t task = 0; task < tasks; ++task)
        kernel(task * HEAD_TOKENS, std::min(rows, (task + 1) * HEAD_TOKENS), scratch.slice(omp_get_thread_num()));
}

}  // namespace

void head_forward(const HeadProblem& p, int num_threads) {
    each_task(p.rows, head_forward_scratch(p.dim), num_threads,
              [&, kernel = kernels().head_forward](int64_t begin, int64_t end, float* scratch) { kernel(p, begin, end, scratch); });
}

void head_divergence(const HeadProblem& p, const HeadProblem& ref, float* kl, int num_threads) {
    each_task(p.rows, head_forward_scratch(p.dim) + head_forward_scratch(ref.dim), num_threads,
              [&, kernel = kernels().head_divergence](int64_t begin, int64_t end, float* scratch) { kernel(p, ref, kl, begin, end, scratch); });
}

namespace {

// The sum of the hidden states' gradient passes through memory once for each run of words, which is then best long; the run's own
// gradient stays in the L2 cache. VDPBF16PS is slow enough for short ones, that fit a smaller cache.
int64_t words_of(const HeadProblem& p, int num_threads) {
    const int64_t longest = isa() == "amx" ? 131072 / std::max<int64_t>(p.dim, 32) : 128, share = p.vocabulary / std::max(num_threads, 1);
    return std::clamp<int64_t>(std::min(longest, share) / 32 * 32, 32, 512);
}

}  // namespace

void head_backward(const HeadProblem& given, int num_threads) {
    HeadProblem p = given;
    p.words = words_of(p, num_threads);
    const int64_t tasks = (p.vocabulary + p.words - 1) / p.words, size = head_padded(p.rows) * p.dim;
    std::fill(p.dhidden, p.dhidden + size, 0.0f);
    if (!p.rows) return std::fill(p.dweight, p.dweight + p.vocabulary * p.dim, 0.0f);
    const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), tasks));
    Scratch scratch(threads, head_backward_scratch(p.dim, p.words)), packed(1, size), sums(threads - 1, size);
    const Kernels& table = kernels();
    const HeadRows hidden = table.head_pack(p, reinterpret_cast<uint16_t*>(packed.slice(0)));
#pragma omp parallel for schedule(static, 1) num_threads(threads)
    for (int64_t thread = 0; thread < threads; ++thread) {
        const int index = static_cast<int>(thread);
        float* dhidden = index ? sums.slice(index - 1) : p.dhidden;
        if (index) std::memset(dhidden, 0, static_cast<size_t>(size) * sizeof(float));
        for (int64_t task = tasks * thread / threads; task < tasks * (thread + 1) / threads; ++task)
            table.head_backward(p, hidden, task * p.words, std::min(p.vocabulary, (task + 1) * p.words), dhidden,
                                scratch.slice(index));
    }
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t row = 0; row < p.rows; ++row)
        for (int thread = 1; thread < threads; ++thread) {
            const float* more = sums.slice(thread - 1) + row * p.dim;
            for (int64_t d = 0; d < p.dim; ++d) p.dhidden[row * p.dim + d] += more[d];
        }
}

#include "attention.h"

#include <omp.h>

#include <algorithm>
#include <cstring>
#include <vector>

#include "isa.h"
#include "kernels.h"
#include "scratch.h"

namespace {

constexpr int64_t QUERIES_PER_TASK = 256;  // packing keys and values costs little beside this many queries
constexpr int64_t TASKS_PER_THREAD = 4;    // with so many no thread waits long for the last one
constexpr int64_t WORTH_THREADS = 65536;   // elements of keys, for each query: about the cost of waking threads

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

}  // namespace

std::vector<AttentionTask> attention_tasks(const AttentionProblem& p, int num_threads, bool backward) {
    std::vector<AttentionTask> tasks;
    const bool split_queries = !backward && p.batch * p.kv_heads < TASKS_PER_THREAD * num_threads;
    for (int64_t b = 0; b < p.batch; ++b) {
        const int64_t start = p.cu_seqlens[b], length = p.cu_seqlens[b + 1] - start;
        const int64_t step = split_queries ? QUERIES_PER_TASK : std::max<int64_t>(length, 1);
        for (int64_t begin = 0; begin < length; begin += step)
            for (int64_t head = 0; head < p.kv_heads; ++head)
                tasks.push_back({&p, start, length, head, begin, std::min(begin + step, length)});
    }
    std::stable_sort(tasks.begin(), tasks.end(), [](const AttentionTask& a, const AttentionTask& b) {
        return a.query_end * (a.query_end - a.query_begin) > b.query_end * (b.query_end - b.query_begin);
    });
    return tasks;
}

namespace {

using Kernel = void (*)(const AttentionTask&, float*);

void run(const std::vector<AttentionTask>& tasks, Kernel kernel, int64_t scratch_floats, int num_threads) {
    if (tasks.empty()) return;
    const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), tasks.size()));
    Scratch scratch(threads, scratch_floats);
    const int64_t count = static_cast<int64_t>(tasks.size());
    int64_t work = 0;
    for (const AttentionTask& t : tasks) work += (t.query_end - t.query_begin) * t.length * t.problem->head_dim;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads) if (work > WORTH_THREADS)
    for (int64_t i = 0; i < count; ++i) kernel(tasks[i], scratch.slice(omp_get_thread_num()));
}

int64_t longest(const AttentionProblem& p) {
    int64_t length = 0;
    for (int64_t b = 0; b < p.batch; ++b) length = std::max<int64_t>(length, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    return padded(length);
}

}  // namespace

void attention_forward(const AttentionProblem& p, int num_threads) {
    run(attention_tasks(p, num_threads, false), kernels().attention_forward,
        attention_forward_scratch(longest(p), padded(p.head_dim)), num_threads);
}

void attention_backward(const AttentionProblem& p, int num_threads) {
    run(attention_tasks(p, num_threads, true), kernels().attention_backward,
        attention_backward_scratch(longest(p), padded(p.head_dim)), num_threads);
}

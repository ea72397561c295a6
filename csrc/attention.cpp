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

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// Tasks, the heaviest first, so that no thread is left with a long one at the end.
std::vector<AttentionTask> tasks_of(const AttentionProblem& p, int num_threads, bool backward) {
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

using Kernel = void (*)(const AttentionTask&, float*);

void run(const std::vector<AttentionTask>& tasks, Kernel kernel, int64_t scratch_floats, int num_threads) {
    if (tasks.empty()) return;
    const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), tasks.size()));
    Scratch scratch(threads, scratch_floats);
    const int64_t count = static_cast<int64_t>(tasks.size());
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t i = 0; i < count; ++i) kernel(tasks[i], scratch.slice(omp_get_thread_num()));
}

int64_t longest(const AttentionProblem& p) {
    int64_t length = 0;
    for (int64_t b = 0; b < p.batch; ++b) length = std::max<int64_t>(length, p.cu_seqlens[b + 1] - p.cu_seqlens[b]);
    return padded(length);
}

// What the sequences of a decode see: the runs of keys and values, and which of them are whose.
struct Views {
    std::vector<KeyRun> runs;
    std::vector<KeySpan> spans;

    void open() { spans.push_back({static_cast<int64_t>(runs.size()), 0}); }
    void add(int64_t k, int64_t v, int64_t count) {
        if (count) runs.push_back({k, v, count});
        spans.back().length += count;
    }
    // Tokens [begin, end) of a row of a table of pages.
    void add(const DecodeProblem& p, const DecodePages& pages, const int32_t* row, int64_t begin, int64_t end) {
        for (int64_t token = begin, slot, count; token < end; token += count) {
            slot = token % pages.size, count = std::min(pages.size - slot, end - token);
            const int64_t page = row[token / pages.size];
            add(page * p.k_batch + slot * p.k_token, page * p.v_batch + slot * p.v_token, count);
        }
    }
    void add_prefix(const DecodeProblem& p, const DecodePages& pages, int64_t prefix, int64_t begin, int64_t end) {
        if (pages.own) return add(p, pages, pages.prefix + prefix * pages.prefix_width, begin, end);
        const int64_t first = p.prefix_bounds[prefix] + begin;
        add(first * p.prefix_k.token_stride, first * p.prefix_v.token_stride, end - begin);
    }
    void add_own(const DecodeProblem& p, const DecodePages& pages, int64_t b) {
        if (pages.own) add(p, pages, pages.own + b * pages.own_width, 0, p.lengths[b]);
        else add(b * p.k_batch, b * p.v_batch, p.lengths[b]);
    }
};

int64_t prefix_length(const DecodeProblem& p, const DecodePages& pages, int64_t prefix) {
    return pages.own ? pages.prefix_lengths[prefix] : p.prefix_bounds[prefix + 1] - p.prefix_bounds[prefix];
}

// The heads that share keys are the queries of one tile; a query's place in its tile changes nothing.
void decode_as_forward(const DecodeProblem& p, int64_t sequence, int64_t kv_head, float* scratch) {
    const int64_t group = p.heads / p.kv_heads, first = kv_head * group, size = p.dtype == FLOAT32 ? 4 : 2;
    const auto at = [&](const void* data, int64_t element) { return static_cast<char*>(const_cast<void*>(data)) + element * size; };
    const auto row = [&](const Rows& x) {
        return Rows{at(x.data, sequence * x.token_stride + first * x.head_stride), x.head_stride, 0};
    };
    std::vector<double> lse(static_cast<size_t>(group));  // not wanted
    AttentionProblem one{};
    one.heads = one.kv_heads = 1, one.head_dim = p.head_dim, one.scale = p.scale, one.dtype = p.dtype, one.lse = lse.data();
    one.q = row(p.q), one.out = row(p.out), one.runs = p.runs + p.spans[sequence].first;
    one.k = {at(p.k, kv_head * p.k_head), p.k_token, 0}, one.v = {at(p.v, kv_head * p.v_head), p.v_token, 0};
    kernels().attention_forward({&one, 0, p.spans[sequence].length, 0, 0, group}, scratch);
}

}  // namespace

void attention_forward(const AttentionProblem& p, int num_threads) {
    run(tasks_of(p, num_threads, false), kernels().attention_forward,
        attention_forward_scratch(longest(p), padded(p.head_dim)), num_threads);
}

void attention_backward(const AttentionProblem& p, int num_threads) {
    run(tasks_of(p, num_threads, true), kernels().attention_backward,
        attention_backward_scratch(longest(p), padded(p.head_dim)), num_threads);
}

void attention_decode(const DecodeProblem& given, const DecodePages& pages, bool as_forward, int num_threads) {
    DecodeProblem p = given;
    Views views;
    for (int64_t b = 0; as_forward && b < p.batch; ++b) {
        views.open();
        if (p.prefixes && p.owner[b] >= 0) views.add_prefix(p, pages, p.owner[b], 0, prefix_length(p, pages, p.owner[b]));
        views.add_own(p, pages, b);
    }
    if (as_forward) p.prefixes = 0;
    const int64_t group = p.heads / p.kv_heads, width = padded(p.head_dim), size = p.dtype == FLOAT32 ? 4 : 2;
    std::vector<PrefixParts> of(p.prefixes, PrefixParts{0, 0, 0}), parts(p.batch, PrefixParts{0, 0, 0});
    for (int64_t b = 0; p.prefixes && b < p.batch; ++b)
        if (p.owner[b] >= 0) of[p.owner[b]].step += group;
    int64_t rows = 0, splits = 0, longest = 0;
    for (int64_t i = 0; i < p.prefixes; ++i) {
        const int64_t length = of[i].step ? prefix_length(p, pages, i) : 0;
        of[i].row = rows, of[i].count = (length + PREFIX_KEYS - 1) / PREFIX_KEYS;
        rows += of[i].count * of[i].step, splits += of[i].count;
        for (int64_t begin = 0; begin < length; begin += PREFIX_KEYS) {
            views.open();
            views.add_prefix(p, pages, i, begin, std::min(begin + PREFIX_KEYS, length));
        }
    }
    for (int64_t b = 0; !as_forward && b < p.batch; ++b) {
        views.open();
        views.add_own(p, pages, b);
    }
    p.runs = views.runs.data(), p.spans = views.spans.data() + splits;
    // Queries lie like what becomes of them, (rows, kv_heads, D): a prefix's in the rows of its first part.
    Scratch packed(1, rows * p.kv_heads * p.head_dim), part_out(1, rows * p.kv_heads * width);
    std::vector<double> part_lse(rows * p.kv_heads);
    std::vector<AttentionProblem> problems;
    std::vector<AttentionTask> tasks;
    problems.reserve(splits);
    const auto shifted = [&](Rows x, int64_t tokens) {
        x.data = static_cast<char*>(x.data) + tokens * x.token_stride * size;
        return x;
    };
    const Rows q{packed.slice(0), p.kv_heads * p.head_dim, p.head_dim};
    if (pages.own) {
        p.prefix_k = {const_cast<void*>(p.k), p.k_token, p.k_head}, p.prefix_v = {const_cast<void*>(p.v), p.v_token, p.v_head};
    }
    for (int64_t i = 0; i < p.prefixes; ++i)
        for (int64_t part = 0; part < of[i].count; ++part) {
            const int64_t row = (of[i].row + part * of[i].step) * p.kv_heads;
            const KeySpan& span = views.spans[problems.size()];
            AttentionProblem problem{};
            problem.heads = problem.kv_heads = p.kv_heads, problem.head_dim = p.head_dim;
            problem.scale = p.scale, problem.dtype = p.dtype, problem.wide = true;
            problem.q = shifted(q, of[i].row), problem.k = p.prefix_k, problem.v = p.prefix_v, problem.runs = p.runs + span.first;
            problem.out = {part_out.slice(0) + row * width, p.kv_heads * width, width}, problem.lse = part_lse.data() + row;
            problems.push_back(problem);
            for (int64_t head = 0; head < p.kv_heads; ++head)
                tasks.push_back({&problems.back(), 0, span.length, head, 0, of[i].step});
        }
    std::vector<PrefixParts> next = of;
    for (int64_t b = 0; b < p.batch; ++b) {
        longest = std::max<int64_t>(longest, p.spans[b].length);
        if (!p.prefixes || p.owner[b] < 0 || !of[p.owner[b]].count) continue;
        parts[b] = next[p.owner[b]], next[p.owner[b]].row += group;
        for (int64_t h = 0; h < p.heads; ++h)
            std::memcpy(static_cast<char*>(q.data) + ((parts[b].row + h % group) * p.kv_heads + h / group) * p.head_dim * size,
                        static_cast<char*>(p.q.data) + (b * p.q.token_stride + h * p.q.head_stride) * size, p.head_dim * size);
    }
    run(tasks, kernels().attention_prefix, attention_forward_scratch(PREFIX_KEYS, width), num_threads);
    p.parts = parts.data(), p.part_out = part_out.slice(0), p.part_lse = part_lse.data();
    const int64_t count = p.batch * p.kv_heads;
    const int threads = static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), std::max<int64_t>(count, 1)));
    Scratch scratch(threads, as_forward ? attention_forward_scratch(padded(longest), width) : attention_decode_scratch(padded(longest), width, group));
    const Kernels& table = kernels();
#pragma omp parallel for schedule(dynamic, 4) num_threads(threads) if (count * longest * p.head_dim > 65536)
    for (int64_t i = 0; i < count; ++i)
        (as_forward && p.spans[i / p.kv_heads].length ? decode_as_forward : table.attention_decode)(
            p, i / p.kv_heads, i % p.kv_heads, scratch.slice(omp_get_thread_num()));
}

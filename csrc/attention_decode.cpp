#include "attention_decode.h"

#include <omp.h>

#include <algorithm>
#include <cstring>

#include "isa.h"
#include "kernels.h"

namespace {

constexpr int64_t TASKS_PER_THREAD = 4;  // with so many no thread waits long for the last one
constexpr int64_t WORTH_THREADS = 65536;  // elements of keys, for each query: about the cost of waking threads

int64_t padded(int64_t n) { return (n + 15) / 16 * 16; }

// What the sequences of a decode see: the runs of keys and values, and which of them are whose.
struct Views {
    std::vector<KeyRun>& runs;
    std::vector<KeySpan>& spans;

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
        if (pages.size) return add(p, pages, pages.prefix + prefix * pages.prefix_width, begin, end);
        const int64_t first = p.prefix_bounds[prefix] + begin;
        add(first * p.prefix_k.token_stride, first * p.prefix_v.token_stride, end - begin);
    }
    void add_own(const DecodeProblem& p, const DecodePages& pages, int64_t b) {
        if (pages.size) add(p, pages, pages.own + b * pages.own_width, 0, p.lengths[b]);
        else add(b * p.k_batch, b * p.v_batch, p.lengths[b]);
    }
};

int64_t prefix_length(const DecodeProblem& p, const DecodePages& pages, int64_t prefix) {
    return pages.size ? pages.prefix_lengths[prefix] : p.prefix_bounds[prefix + 1] - p.prefix_bounds[prefix];
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

Rows shifted(Rows x, int64_t tokens, int64_t size) {
    x.data = static_cast<char*>(x.data) + tokens * x.token_stride * size;
    return x;
}
int64_t size_of(const DecodeProblem& p) { return p.dtype == FLOAT32 ? 4 : 2; }

}  // namespace

DecodePlan::DecodePlan(const DecodeProblem& given, const DecodePages& pages, bool as_forward) : problem(given) {
    DecodeProblem& p = problem;
    Views views{runs_, spans_};
    for (int64_t b = 0; as_forward && b < p.batch; ++b) {
        views.open();
        if (p.prefixes && p.owner[b] >= 0) views.add_prefix(p, pages, p.owner[b], 0, prefix_length(p, pages, p.owner[b]));
        views.add_own(p, pages, b);
    }
    if (as_forward) p.prefixes = 0;
    const int64_t group = p.heads / p.kv_heads, width = padded(p.head_dim);
    std::vector<PrefixParts> of(p.prefixes, PrefixParts{0, 0, 0});
    parts_.assign(p.batch, PrefixParts{0, 0, 0});
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
    p.runs = runs_.data(), p.spans = spans_.data() + splits;
    // Queries lie like what becomes of them, (rows, kv_heads, D): a prefix's in the rows of its first part.
    packed_.emplace(1, rows * p.kv_heads * p.head_dim), part_out_.emplace(1, rows * p.kv_heads * width);
    part_lse_.resize(rows * p.kv_heads);
    problems_.reserve(splits);
    plan_prefixes(pages, of);
    for (int64_t b = 0; b < p.batch; ++b) {
        longest = std::max<int64_t>(longest, p.spans[b].length);
        if (!p.prefixes || p.owner[b] < 0 || !of[p.owner[b]].count) continue;
        parts_[b] = of[p.owner[b]], of[p.owner[b]].row += group;
    }
    p.parts = parts_.data(), p.part_out = part_out_->slice(0), p.part_lse = part_lse_.data();
    prefix_scratch = attention_forward_scratch(PREFIX_KEYS, width);
    own_scratch = as_forward ? attention_forward_scratch(padded(longest), width) : attention_decode_scratch(padded(longest), width, group);
}

void DecodePlan::plan_prefixes(const DecodePages& pages, const std::vector<PrefixParts>& of) {
    DecodeProblem& p = problem;
    const int64_t width = padded(p.head_dim);
    const Rows q{packed_->slice(0), p.kv_heads * p.head_dim, p.head_dim};
    if (pages.size) {
        p.prefix_k = {const_cast<void*>(p.k), p.k_token, p.k_head}, p.prefix_v = {const_cast<void*>(p.v), p.v_token, p.v_head};
    }
    for (const PrefixParts& prefix : of)
        for (int64_t part = 0; part < prefix.count; ++part) {
            const int64_t row = (prefix.row + part * prefix.step) * p.kv_heads;
            const KeySpan& span = spans_[problems_.size()];
            AttentionProblem one{};
            one.heads = one.kv_heads = p.kv_heads, one.head_dim = p.head_dim;
            one.scale = p.scale, one.dtype = p.dtype, one.wide = true;
            one.q = shifted(q, prefix.row, size_of(p)), one.k = p.prefix_k, one.v = p.prefix_v, one.runs = p.runs + span.first;
            one.out = {part_out_->slice(0) + row * width, p.kv_heads * width, width}, one.lse = part_lse_.data() + row;
            problems_.push_back(one);
            for (int64_t head = 0; head < p.kv_heads; ++head)
                tasks.push_back({&problems_.back(), 0, span.length, head, 0, prefix.step});
        }
}

void DecodePlan::turn_to(const void* k, const void* v) {
    problem.k = k, problem.v = v;
    for (AttentionProblem& one : problems_) one.k.data = const_cast<void*>(k), one.v.data = const_cast<void*>(v);
}

void DecodePlan::gather(int64_t b) {
    const DecodeProblem& p = problem;
    if (!parts_[b].count) return;
    const int64_t group = p.heads / p.kv_heads, size = size_of(p);
    for (int64_t h = 0; h < p.heads; ++h)
        std::memcpy(reinterpret_cast<char*>(packed_->slice(0)) + ((parts_[b].row + h % group) * p.kv_heads + h / group) * p.head_dim * size,
                    static_cast<char*>(p.q.data) + (b * p.q.token_stride + h * p.q.head_stride) * size, p.head_dim * size);
}

void attention_decode(const DecodeProblem& given, const DecodePages& pages, bool as_forward, int num_threads) {
    DecodePlan plan(given, pages, as_forward);
    const DecodeProblem& p = plan.problem;
    const Kernels& table = kernels();
    for (int64_t b = 0; b < p.batch; ++b) plan.gather(b);
    const int64_t first = static_cast<int64_t>(plan.tasks.size()), count = p.batch * p.kv_heads;
    const auto threads = [&](int64_t tasks) { return static_cast<int>(std::min<int64_t>(std::max(num_threads, 1), std::max<int64_t>(tasks, 1))); };
    Scratch scratch(std::max(num_threads, 1), std::max(plan.prefix_scratch, plan.own_scratch));
    int64_t longest = 0, work = 0;
    for (int64_t b = 0; b < p.batch; ++b) longest = std::max(longest, p.spans[b].length);
    for (const AttentionTask& t : plan.tasks) work += (t.query_end - t.query_begin) * t.length * p.head_dim;
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads(first)) if (work > WORTH_THREADS)
    for (int64_t i = 0; i < first; ++i) table.attention_prefix(plan.tasks[i], scratch.slice(omp_get_thread_num()));
    const int64_t turn = std::clamp<int64_t>(count / (TASKS_PER_THREAD * threads(count)), 1, 4);
#pragma omp parallel for schedule(dynamic, turn) num_threads(threads(count)) if (count * longest * p.head_dim > WORTH_THREADS)
    for (int64_t i = 0; i < count; ++i) {
        float* own = scratch.slice(omp_get_thread_num());
        if (as_forward && p.spans[i / p.kv_heads].length) decode_as_forward(p, i / p.kv_heads, i % p.kv_heads, own);
        else table.attention_decode(p, i, i + 1, i + 1 < count ? i + 1 : -1, own);
    }
}

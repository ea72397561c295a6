// Ragged flash attention on the CPU: softmax(scale * q k^T) v for each sequence of a packed batch, without (T, T)
// memory. Grouped-query: query head h reads key/value head h / (heads / kv_heads), no copies.
// All accumulation is fp32; inputs and outputs are fp32 or bf16. Rows have unit stride in the last dimension;
// strides are in elements. Nothing is shared between threads: results do not depend on their number.
// Source: FlashAttention-2, arXiv 2307.08691, algorithms 1 and 2.
#pragma once
#include <cstdint>
#include <vector>

struct Rows {  // (N, heads, D)
    void* data;
    int64_t token_stride, head_stride;
};

// Tokens whose keys and values lie one after another: the elements, counted from where an array of them begins, at which the first
// token's key and value are, and how many tokens there are.
struct KeyRun {
    int64_t k, v, count;
};

struct AttentionProblem {
    const int32_t* cu_seqlens;  // (batch + 1,)
    int64_t batch, heads, kv_heads, head_dim;
    bool causal;
    float scale;
    int dtype;       // of all Rows
    bool wide;       // out is fp32 whatever the dtype
    Rows q, k, v, out;
    // (N, heads), natural logarithm. fp64: rounded to fp32 it would cost the gradient, which takes it as the exact
    // normaliser of a whole row, two bits.
    double* lse;
    Rows dout, dq, dk, dv;  // backward only; out and lse are then inputs
    const KeyRun* runs;     // forward on the CPU: if not null, the keys of a sequence that begins at token 0 lie in these
};

struct AttentionTask {
    const AttentionProblem* problem;
    int64_t start, length;         // the sequence: its first token and its length
    int64_t kv_head;
    int64_t query_begin, query_end;  // forward only, a multiple of 16 unless it is the end
};

constexpr int64_t PREFIX_KEYS = 128;  // of a task: a prefix is split so that all threads work, and always alike
constexpr int64_t FEW_QUERIES = 8;    // of a prefix: products of tiles are not worth packing its keys for

// What a sequence's queries got from each part of its prefix: rows of part_out from `row` on, `step` from part to part.
struct PrefixParts {
    int64_t row, step, count;
};

struct KeySpan {
    int64_t first, length;  // of its runs; tokens in them
};

struct DecodeProblem {
    int64_t batch, heads, kv_heads, head_dim;
    const int32_t* lengths;  // (batch,), at least 0; a sequence without keys gets zeros
    float scale;
    int dtype;
    Rows q, out;                                        // (batch, heads, D)
    const void *k, *v;                                  // (batch, Tmax, kv_heads, D), or pages of a pool
    int64_t k_batch, k_token, k_head, v_batch, v_token, v_head;  // strides; from page to page those of the batch
    // Sequence b sees the keys of prefix owner[b] before its own; ragged like AttentionProblem's sequences.
    int64_t prefixes;
    const int32_t *prefix_bounds, *owner;  // (prefixes + 1,), (batch,)
    Rows prefix_k, prefix_v;
    // Filled on the way on the CPU: all runs, those of each sequence; (batch,), (rows, kv_heads, D padded to 16), (rows, kv_heads).
    const KeyRun* runs;
    const KeySpan* spans;
    const PrefixParts* parts;
    const float* part_out;
    const double* part_lse;
};

// Keys and values in pages of `size` tokens, a pool of `count` of them: sequence b's are row b of `own`, (batch, own_width). Prefixes
// lie in the same pool: their pages, (prefixes, prefix_width), and lengths; an owner of -1 is none. size = 0: none of this.
struct DecodePages {
    const int32_t *own, *prefix, *prefix_lengths;
    int64_t own_width, prefix_width, size, count;
};

// Floats of scratch that one task needs; both arguments are multiples of 16.
constexpr int64_t KEYS_PER_PASS = 256;     // scores of 16 queries against these stay in the L1 cache
constexpr int64_t QUERIES_PER_PASS = 128;  // backward: two (128, 16) tiles stay in the L1 cache
constexpr int64_t attention_forward_scratch(int64_t length, int64_t dim) {
    const int64_t width = (dim + 31) / 32 * 32;  // of bf16, whose tiles have 32 queries
    return 2 * (length + 32) * width + 6 * 32 * width + 48 * KEYS_PER_PASS;
}
constexpr int64_t attention_decode_scratch(int64_t length, int64_t dim, int64_t group) {
    return 4 * length + (2 * group + 16) * (dim + 16) + 16 * dim + 2 * group + 32;
}
constexpr int64_t attention_backward_scratch(int64_t length, int64_t dim) {
    const int64_t width = (dim + 31) / 32 * 32, rows = (length + 31) / 32 * 32;  // of bf16, whose tiles have 32 keys
    const int64_t of_floats = 8 * length * dim + 2 * 16 * dim + 3 * length + 2 * 16 * QUERIES_PER_PASS;
    const int64_t of_bf16 = 5 * rows * width + 4 * 32 * width + 2 * rows + 4 * 32 * QUERIES_PER_PASS;
    return of_floats > of_bf16 ? of_floats : of_bf16;
}

// The heaviest first, so that no thread is left with a long one at the end.
std::vector<AttentionTask> attention_tasks(const AttentionProblem& problem, int num_threads, bool backward);
void attention_forward(const AttentionProblem& problem, int num_threads);
void attention_backward(const AttentionProblem& problem, int num_threads);
// as_forward: with the bits that attention_forward gives a sequence's last query, by its kernel; slower.
// In pages a sequence's keys are then its prefix's and its own; elsewhere it has to have no prefix.
void attention_decode(const DecodeProblem& problem, const DecodePages& pages, bool as_forward, int num_threads);

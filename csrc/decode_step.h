// New tokens of sequences through all layers of a decoder with RMSNorm, rotary positions, grouped queries and SwiGLU, to the logits of
// the next: one call, in which the threads meet at barriers. A token is a row. The first rows may be whole sequences; each of the
// others finds the keys before it in pages of a pool. All write their keys and values there. What an op rounds to bf16 is rounded here;
// products have fp32 sums.
//
// Sums of products are in the order of the depth, whatever rows there are, so what a row gets depends on the others only where it
// shares a prefix with them.
#pragma once
#include <cstdint>

#include "attention.h"

// Columns of a packed weight that lie together: (columns / 32, depth, 32), of bf16 on CPUs that multiply it
// (columns / 32, depth / 2, 32, 2). What is beyond columns and depth is 0.
constexpr int64_t PRODUCT_COLUMNS = 32;
constexpr int64_t product_depth(int64_t depth) { return (depth + 31) / 32 * 32; }
constexpr int64_t packed_elements(int64_t columns, int64_t depth) { return product_depth(columns) * product_depth(depth); }
constexpr int64_t PRODUCT_ROWS = 64;  // of a task
constexpr int64_t product_rows(int64_t rows) { return (rows + 15) / 16 * 16; }  // that are read

// Rows of a weight, which become columns of a packed one from `column` on; that is all 0 before.
struct PackProblem {
    int64_t columns, depth, column;
    int dtype;  // of what is packed
    const float* weight;  // (columns, depth)
    void* packed;
};

struct PackedProduct {
    int64_t rows, columns, depth;
    int dtype, out_dtype;
    const void* x;  // (product_rows(rows), product_depth(depth)), with numbers beyond depth
    int64_t x_stride;
    const void* packed;
    void* out;  // (rows, columns)
    int64_t out_stride;
};

struct DecodeLayer {  // addresses; the norms' weights are fp32, q_norm and k_norm null where there are none
    const float *input_norm, *q_norm, *k_norm, *post_norm;
    const void *qkv, *o, *gate_up, *down;  // packed
};

struct DecodeStep {
    int64_t rows, layers, hidden, inner, vocabulary;
    int dtype;
    float eps;
    const float* embedding;  // (vocabulary, hidden)
    const DecodeLayer* layer;
    const float* norm;
    const void* head;              // packed
    const float *cosines, *sines;  // (length, D / 2), as RopeProblem's
    const int64_t *tokens, *positions, *slots;  // (rows,); slot: page * size + offset, where key and value go
    int64_t sequences;
    const int32_t* cu_seqlens;  // (sequences + 1,): the first rows are these, whole
    DecodeProblem attention;  // of the other rows: heads, lengths (the token's own key included), prefixes, and the first layer's k and v
    DecodePages pages;
    int64_t k_layer, v_layer;  // elements from layer to layer
    int64_t wanted;
    const int64_t* last;  // (wanted,): the rows whose logits are wanted, or nullptr: all
    float* logits;        // (wanted, vocabulary)
};

void decode_pack(const PackProblem& problem, int num_threads);
void decode_step(const DecodeStep& problem, int num_threads);

// Rotary position embedding: the pair (x[i], x[i + D/2]) of each head turns by angle position * base^(-2i/D).
// x: (tokens, heads, D), fp32 or bf16, strides in elements; out: contiguous. The angles come as a table.
// Source: Su et al., arXiv 2104.09864, eq. 34, with the halves paired as in Hugging Face's Llama.
#pragma once
#include <cstdint>

struct RopeProblem {
    int64_t tokens, heads, half;  // half = D / 2
    int dtype;
    const void* x;
    int64_t token_stride, head_stride;
    const int64_t* positions;  // (tokens,), each below the table's length: checked by the caller
    const float *cosines, *sines;  // (length, half)
    bool inverse;  // turn back: the gradient, since a rotation's transpose is its inverse
    void* out;
};

void rope(const RopeProblem& problem, int num_threads);

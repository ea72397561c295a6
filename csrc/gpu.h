// What the kernels for NVIDIA GPUs offer to the bindings: functions that start them on a stream and return at once. They take the
// problems of the CPU kernels (softmax.h, ...) with addresses on the device. `workspace` is device memory of at least as many
// bytes as the function beside it says, which may hold anything, NaN included.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"

namespace gpu {

// Keys and values in pages of `size` tokens, a pool of `count` of them: DecodeProblem's k and v, whose batch strides are then the
// pages', and sequence b's are row b of `own`, (batch, own_width). Prefixes lie in the same pool: their pages, (prefixes,
// prefix_width), and lengths; an owner of -1 is none. own = nullptr: none of this.
struct DecodePages {
    const int32_t *own, *prefix, *prefix_lengths;
    int64_t own_width, prefix_width, size, count;
};
// capacity: the most keys of a sequence's own; prefix_tokens: of all prefixes together, or of the longest one in pages.
int64_t attention_decode_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity,
                                   int64_t prefixes, int64_t prefix_tokens);
void attention_decode(const DecodeProblem& problem, int64_t capacity, int64_t prefix_tokens, const DecodePages& pages,
                      void* workspace, cudaStream_t stream);

}  // namespace gpu

// Ragged attention on NVIDIA GPUs: what the dispatcher (attention.cu) and the kernels behind it share. attention_portable*.cu
// take bf16 from sm_80 on, attention_fp32*.cu take fp32, attention_sm90*.cu take bf16 on Hopper.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"

// One block's work for one head: `rows` queries of a sequence (or keys, in a map of keys). Query i of the sequence sees its keys
// up to i + keys - queries where the problem is causal: the last query sees all, also where there are fewer queries than keys.
struct alignas(16) AttentionTile {
    int32_t query, queries;  // the sequence's first row in q, out, lse, and how many it has
    int32_t key, keys;       // the same in k, v
    int32_t row;             // the tile's first query (key), counted from the sequence's first; -1: no work here or behind
    int32_t begin, end;      // keys (queries) that any row of the tile sees (is seen by), counted likewise
    int32_t poisoned;        // cu_seqlens are wrong: nothing to read (begin == end), every row of the tile gets NaN
};

// Made on the device, the tiles with most work first. Blocks of tiles that there are not find row = -1.
struct TileMap {
    AttentionTile* tiles;
    int64_t capacity;   // tiles that there may be
    int rows;           // of a tile: at least MIN_TILE_ROWS
    int32_t* used;      // how many there are; on the device
    int32_t* counters;  // 3 zeros for the kernel's own use (once: each call makes its maps afresh); on the device
};
constexpr int MIN_TILE_ROWS = 64;

// Rows of tiles that kernels want for a problem; 0: no such map.
struct TileRows {
    int forward, backward_queries, backward_keys;
};

// What the backward kernels need of each query, (heads, stride), stride > tokens + 127: so much may be read past a sequence.
struct QueryStats {
    const float *lse2, *lse2_low;  // the logarithm of the sum of exponentials, in base 2; fp32 only: what its rounding left out
    const float* delta;            // the sum over D of dout * out
    int64_t stride;
};

namespace gpu {

void attention_forward(const AttentionProblem& problem, int64_t tokens, void* workspace, cudaStream_t stream);
void attention_backward(const AttentionProblem& problem, int64_t tokens, void* workspace, cudaStream_t stream);
int64_t attention_workspace(int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int dtype);
int64_t attention_backward_workspace(int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, int dtype);

// "auto", "portable" or "sm90" (where they take the problem): which bf16 kernels run from now on; returns the one before. nullptr:
// only returns it.
const char* attention_variant(const char* name);

TileRows tile_rows_portable(int64_t head_dim);
void attention_forward_portable(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, cudaStream_t stream);
void attention_backward_portable(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, const TileMap& keys,
                                 const QueryStats& stats, cudaStream_t stream);

TileRows tile_rows_fp32(int64_t head_dim);
void attention_forward_fp32(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, cudaStream_t stream);
void attention_backward_fp32(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, const TileMap& keys,
                             const QueryStats& stats, cudaStream_t stream);

#ifdef NANORLHF_SM90
// Whether shape, dtype and alignment suit the Hopper kernels; for a backward problem (dout set) its gradients' too.
bool attention_sm90_takes(const AttentionProblem& problem);
TileRows tile_rows_sm90(const AttentionProblem& problem);
// Bytes beside maps and statistics that the backward kernels want at `workspace`, on a multiple of 256.
int64_t attention_backward_workspace_sm90(int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim);
void attention_forward_sm90(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, cudaStream_t stream);
void attention_backward_sm90(const AttentionProblem& problem, int64_t tokens, const TileMap& queries, const TileMap& keys,
                             const QueryStats& stats, void* workspace, cudaStream_t stream);
#endif

}  // namespace gpu

// What the kernels for NVIDIA GPUs offer to the bindings: functions that start them on a stream and return at once. They take the
// problems of the CPU kernels (softmax.h, ...) with addresses on the device. `workspace` is device memory of at least as many
// bytes as the function beside it says, which may hold anything, NaN included.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "attention.h"
#include "embedding.h"
#include "gae.h"
#include "loss.h"
#include "matmul.h"
#include "norm.h"
#include "optim.h"
#include "ppo_loss.h"
#include "rope.h"
#include "sample.h"
#include "softmax.h"
#include "swiglu.h"

namespace gpu {

// Rows (bind_cuda_rows.cpp). The workspace of softmax and loss may be null: long rows then take longer, and round otherwise.
int64_t softmax_workspace(int64_t rows, int64_t columns);
void softmax_forward(const SoftmaxProblem& problem, void* workspace, cudaStream_t stream);
void softmax_backward(const SoftmaxProblem& problem, cudaStream_t stream);
int64_t loss_workspace(int64_t rows, int64_t columns);
void loss_forward(const LossProblem& problem, void* workspace, cudaStream_t stream);  // a target out of range: NaN
void loss_backward(const LossProblem& problem, cudaStream_t stream);
int64_t norm_workspace(int64_t rows, int64_t columns);  // backward's
void norm_forward(const NormProblem& problem, cudaStream_t stream);
void norm_backward(const NormProblem& problem, void* workspace, cudaStream_t stream);
void swiglu_forward(const SwigluProblem& problem, cudaStream_t stream);
void swiglu_backward(const SwigluProblem& problem, cudaStream_t stream);
// In place of a table of cosines, `frequencies` are the (half,) angles of one position, fp64. A negative position: NaN.
int64_t rope_workspace(int64_t tokens, int64_t half);  // backward's, where there are weights
void rope_forward(const RopeProblem& problem, const double* frequencies, cudaStream_t stream);
void rope_backward(const RopeProblem& problem, const double* frequencies, void* workspace, cudaStream_t stream);
int64_t embedding_workspace(int64_t tokens, int64_t vocabulary);  // backward's
void embedding_forward(const EmbeddingProblem& problem, cudaStream_t stream);  // an id out of range: NaN
void embedding_backward(const EmbeddingProblem& problem, void* workspace, cudaStream_t stream);  // an id out of range: left out

// Scans, losses, samples, updates and products (bind_cuda_scans.cpp).
void gae(const GaeProblem& problem, int64_t tokens, cudaStream_t stream);  // tokens that `cu_seqlens` leaves out are NaN

int64_t ppo_loss_workspace(int64_t tokens);
void ppo_loss(PpoLossProblem problem, float* terms, void* workspace, cudaStream_t stream);

// The spans' table is on the device. The sum of squares of NORM, a double, is left at the start of the workspace.
int64_t optim_workspace();
void optim(const OptimProblem& problem, void* workspace, cudaStream_t stream);

int64_t sample_workspace(int64_t rows, int64_t columns);
void sample(const SampleProblem& problem, void* workspace, cudaStream_t stream);

void matmul(const MatmulProblem& problem, cudaStream_t stream);

// Decode (bind_cuda_decode.cpp).
// capacity: the most keys of a sequence's own; prefix_tokens: of all prefixes together, or of the longest one in pages.
int64_t attention_decode_workspace(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity,
                                   int64_t prefixes, int64_t prefix_tokens);
void attention_decode(const DecodeProblem& problem, int64_t capacity, int64_t prefix_tokens, const DecodePages& pages,
                      void* workspace, cudaStream_t stream);

}  // namespace gpu

// What the kernels for NVIDIA GPUs offer to the bindings: functions that start them on a stream and return at once. They take the
// problems of the CPU kernels (softmax.h, ...) with addresses on the device. `workspace` is device memory of at least as many
// bytes as the function beside it says, which may hold anything, NaN included.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "gae.h"
#include "matmul.h"
#include "optim.h"
#include "ppo_loss.h"
#include "sample.h"

namespace gpu {

void gae(const GaeProblem& problem, int64_t tokens, cudaStream_t stream);  // tokens that `cu_seqlens` leaves out are NaN

int64_t ppo_loss_workspace(int64_t tokens);
void ppo_loss(PpoLossProblem problem, float* terms, void* workspace, cudaStream_t stream);

// The spans' table is on the device. The sum of squares of NORM, a double, is left at the start of the workspace.
int64_t optim_workspace();
void optim(const OptimProblem& problem, void* workspace, cudaStream_t stream);

int64_t sample_workspace(int64_t rows, int64_t columns);
void sample(const SampleProblem& problem, void* workspace, cudaStream_t stream);

void matmul(const MatmulProblem& problem, cudaStream_t stream);

}  // namespace gpu

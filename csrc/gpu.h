// What the kernels for NVIDIA GPUs offer to the bindings: functions that start them on a stream and return at once. They take the
// problems of the CPU kernels (softmax.h, ...) with addresses on the device. `workspace` is device memory of at least as many
// bytes as the function beside it says, which may hold anything, NaN included.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

namespace gpu {

}  // namespace gpu

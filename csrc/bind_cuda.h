// What the bind_cuda*.cpp share. Functions have the names and arguments of nanorlhf._C's, with a Lane where those take the number
// of threads: nanorlhf/ops calls either module alike.
#pragma once
#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "bind_ops.h"

namespace py = pybind11;

// Where a call runs: device, stream, and memory there that it may use until it has run (address, bytes).
using Lane = std::tuple<int, uintptr_t, uintptr_t, int64_t>;
using release = py::call_guard<py::gil_scoped_release>;

inline cudaStream_t stream_of(const Lane& lane) { return at<CUstream_st>(std::get<1>(lane)); }

// The lane's workspace; throws if it is smaller than what the kernel needs.
inline void* workspace_of(const Lane& lane, int64_t bytes, const char* op) {
    if (std::get<3>(lane) < bytes)
        throw std::invalid_argument(std::string(op) + ": expected a workspace of " + std::to_string(bytes) + " bytes, got " +
                                    std::to_string(std::get<3>(lane)));
    return at<void>(std::get<2>(lane));
}

// The lane's device is the current one while this lives.
class OnDevice {
public:
    explicit OnDevice(const Lane& lane) {
        cudaGetDevice(&before_);
        if (before_ != std::get<0>(lane)) cudaSetDevice(std::get<0>(lane)), changed_ = true;
    }
    ~OnDevice() {
        if (changed_) cudaSetDevice(before_);
    }
    OnDevice(const OnDevice&) = delete;
    OnDevice& operator=(const OnDevice&) = delete;

private:
    int before_ = 0;
    bool changed_ = false;
};

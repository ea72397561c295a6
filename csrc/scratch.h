// Memory for the tasks of a parallel loop: one slice per thread, 64-byte aligned, not initialised.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>

class Scratch {
  public:
    Scratch(int slices, int64_t floats) : slice_((floats + 15) / 16 * 16) {
        void* memory = std::aligned_alloc(64, static_cast<size_t>(slices * slice_ + 16) * sizeof(float));
        if (!memory) throw std::bad_alloc();
        memory_.reset(static_cast<float*>(memory));
    }
    float* slice(int index) { return memory_.get() + index * slice_; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    int64_t slice_;
    std::unique_ptr<float, Free> memory_;
};

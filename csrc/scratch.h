// Memory for the tasks of a parallel loop: one slice per thread, 64-byte aligned, not initialised.
#pragma once
#include <cstdint>
#include <cstdlib>
#include <memory>
#include <new>
#include <utility>

class Scratch {
  public:
    Scratch(int slices, int64_t floats) : slice_((floats + 15) / 16 * 16) {
        const int64_t needed = slices * slice_ + 16;
        Block* best = nullptr;
        for (Block& block : kept().blocks)
            if (block.floats >= needed && (!best || block.floats < best->floats)) best = &block;
        if (best) {
            std::swap(block_, *best);
            return;
        }
        void* memory = std::aligned_alloc(64, static_cast<size_t>(needed) * sizeof(float));
        if (!memory) throw std::bad_alloc();
        block_.memory.reset(static_cast<float*>(memory));
        block_.floats = needed;
    }
    // Stays with the thread in place of its smallest block: fresh memory costs a page fault for every 4 KB.
    ~Scratch() {
        Block* least = kept().blocks;
        for (Block& block : kept().blocks)
            if (block.floats < least->floats) least = &block;
        if (block_.floats <= MOST_KEPT && block_.floats > least->floats) std::swap(block_, *least);
    }
    Scratch(const Scratch&) = delete;
    float* slice(int index) { return block_.memory.get() + index * slice_; }

  private:
    struct Free {
        void operator()(float* p) const { std::free(p); }
    };
    struct Block {
        std::unique_ptr<float, Free> memory;
        int64_t floats = 0;
    };
    struct Kept {
        Block blocks[4];
    };
    static constexpr int64_t MOST_KEPT = 4 << 20;  // 16 MB

    static Kept& kept() {
        static thread_local Kept mine;
        return mine;
    }

    int64_t slice_;
    Block block_;
};

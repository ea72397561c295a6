// A GPU of one block at a time, for kernels compiled by the host's compiler. Threads of a block are fibers: each runs until it has
// to wait, then another one goes on, in random order. What the machine does in the background (cp.async, TMA, wgmma) is done here
// at the latest moment that the rules allow or, where that may hide a mistake too, now and then at once. Shared memory starts as
// NaN. A block in which nobody can go on, a store past the end of shared memory, misaligned or uninitialised operands: an error
// of the launch that says so. Limits: no clusters, no waiting for another block, races within one stretch of a thread's work.
#pragma once
#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>
#include <vector>

namespace emulator {

struct Index {
    unsigned x, y, z;
};
constexpr int SHARED_LIMIT = 232448;

struct Copy {  // cp.async
    void* to;
    const void* from;
    bool valid;
};
struct Wgmma {
    float* d;
    int n;
    bool a_in_registers, a_transposed, b_transposed, accumulate;
    uint32_t a[4];
    uint64_t a_descriptor, b_descriptor;
};
using Action = std::function<void()>;  // of the copy engine
template <class T>
struct Groups {  // of work in the background: what is not yet committed, and the committed ones, oldest first
    std::vector<T> open;
    std::vector<std::vector<T>> committed;
    void commit() {
        committed.push_back(std::move(open));
        open.clear();
    }
};

struct Thread {
    Index thread{};
    int number = 0;  // in its block
    bool done = false;
    void* stack_pointer = nullptr;
    const char* waits_for = "";
    bool (*ready)(const void*, uint64_t) = nullptr;  // of the next two; null: it can go on
    const void* ready_object = nullptr;
    uint64_t ready_value = 0;
    Groups<Copy> copies;
    Groups<Action> bulk;
    Groups<Wgmma> products;
};

extern Thread* here;  // who runs
extern Index thread, block, block_size, grid_size;

unsigned char* shared_memory();
uint32_t shared_offset(const void* pointer);  // error unless it points there
[[noreturn]] void fail(const std::string& message);  // ends the launch with this error
void wait(const char* what, bool (*ready)(const void* object, uint64_t value), const void* object, uint64_t value = 0);
bool coin();  // from the seed

// All lanes of `mask` (that have not ended) come with an operand each; the last one computes for all.
void collective(uint32_t mask, const char* what, void* operand, void (*compute)(void** operands));
// The same for the four warps of a warpgroup.
void warpgroup(const char* what, void* operand, void (*compute)(void** operands));
void barrier(int id, int threads, bool waits);  // threads < 0: all that have not ended
void in_background(Action action);               // a TMA load: at once, or when nobody can go on without one
std::string run(Index grid, Index block, size_t shared, const Action& body);  // one launch; returns its error, or nothing
void seed(uint64_t value);

}  // namespace emulator

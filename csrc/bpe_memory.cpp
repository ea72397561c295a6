#include "bpe_memory.h"

#include <sys/mman.h>

#include <atomic>

namespace bpe {
namespace {

constexpr size_t kHuge = 2u << 20, kKept = 16, kMostKept = 64u << 20;  // bytes of a page; blocks and bytes that are kept

// Right before the memory that is given out, which begins where a large page does.
struct alignas(64) Block {
    void* base;  // of the mapping
    size_t size, room;  // bytes of the mapping, and those that are given out
    void* memory() { return this + 1; }
};

std::atomic<Block*> kept[kKept];
std::atomic<size_t> kept_bytes{0};

bool leave(Block* block) {
    if (kept_bytes + block->room > kMostKept) return false;
    for (auto& place : kept) {
        Block* none = nullptr;
        kept_bytes += block->room;
        if (place.compare_exchange_strong(none, block)) return true;
        kept_bytes -= block->room;
    }
    return false;
}

void drop(Block* block) {
    if (!leave(block)) munmap(block->base, block->size);
}

// A kept block with room for that many bytes and not much more, or null.
Block* take(size_t bytes) {
    for (auto& place : kept) {
        Block* block = place.exchange(nullptr);
        if (!block) continue;
        kept_bytes -= block->room;
        if (block->room >= bytes && block->room <= 2 * bytes) return block;
        drop(block);
    }
    return nullptr;
}

}  // namespace

void* take_pages(size_t bytes, size_t zeroed) {
    if (Block* block = take(bytes)) {
        std::memset(block->memory(), 0, zeroed);
        return block->memory();
    }
    const size_t room = (std::max<size_t>(bytes, 1) + kHuge - 1) & ~(kHuge - 1), size = room + kHuge + sizeof(Block);
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const uintptr_t begin = (reinterpret_cast<uintptr_t>(base) + sizeof(Block) + kHuge - 1) & ~(kHuge - 1);
    Block* block = new (reinterpret_cast<void*>(begin - sizeof(Block))) Block{base, size, room};
#ifdef MADV_HUGEPAGE
    madvise(block->memory(), room, MADV_HUGEPAGE);
#endif
    // Written before it is read, a large page is not first shown as a page of zeros.
    for (size_t i = 0; i < zeroed; i += kHuge) static_cast<volatile char*>(block->memory())[i] = 0;
    return block->memory();
}

void give_pages(void* memory) {
    if (memory) drop(static_cast<Block*>(memory) - 1);
}

}  // namespace bpe

#include "bpe_memory.h"

#include <sys/mman.h>

namespace bpe {

std::atomic<Pages::Block*>* Pages::kept() {
    static std::atomic<Block*> blocks[kKept];
    return blocks;
}

std::atomic<size_t>& Pages::kept_bytes() {
    static std::atomic<size_t> bytes{0};
    return bytes;
}

// A kept block with room for that many bytes and not much more, or null.
Pages::Block* Pages::take(size_t bytes) {
    for (size_t i = 0; i < kKept; i++) {
        Block* block = kept()[i].exchange(nullptr);
        if (!block) continue;
        kept_bytes() -= block->size;
        if (block->size - block->offset >= bytes && block->size <= 2 * bytes + 2 * kHuge) return block;
        if (!leave(block)) munmap(block, block->size);
    }
    return nullptr;
}

// False if no more is kept.
bool Pages::leave(Block* block) {
    if (kept_bytes() + block->size > kMostKept) return false;
    for (size_t i = 0; i < kKept; i++) {
        Block* none = nullptr;
        kept_bytes() += block->size;
        if (kept()[i].compare_exchange_strong(none, block)) return true;
        kept_bytes() -= block->size;
    }
    return false;
}

Pages::Pages(size_t bytes, size_t zeroed) : block_(take(bytes)) {
    if (block_) {
        std::memset(get(), 0, zeroed);
        return;
    }
    const size_t size = bytes + kHuge + sizeof(Block);
    void* base = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (base == MAP_FAILED) throw std::bad_alloc();
    const size_t room = sizeof(Block) + reinterpret_cast<uintptr_t>(base);
    block_ = new (base) Block{size, ((room + kHuge - 1) & ~(kHuge - 1)) - reinterpret_cast<uintptr_t>(base)};
#ifdef MADV_HUGEPAGE
    madvise(get(), bytes, MADV_HUGEPAGE);
#endif
    // Written before it is read, a large page is not first shown as a page of zeros.
    for (size_t i = 0; i < zeroed; i += kHuge) static_cast<volatile char*>(get())[i] = 0;
}

Pages::~Pages() {
    if (!leave(block_)) munmap(block_, block_->size);
}

}  // namespace bpe

// Memory for the tokenizer: arrays that grow without being cleared, and large tables that are read at random.
#pragma once
#include <algorithm>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>

namespace bpe {

// Large memory, in large pages where the system has them. The first `zeroed` bytes are zero.
//
// Fresh memory from the system is dear to touch, far more so on a virtual machine, so some of what is given back is kept for
// the next: a few blocks that are taken and left by atomic exchanges, which also is safe after fork.
class Pages {
public:
    explicit Pages(size_t bytes) : Pages(bytes, bytes) {}
    Pages(size_t bytes, size_t zeroed);
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages();
    void* get() const { return reinterpret_cast<char*>(block_) + block_->offset; }

private:
    static constexpr size_t kHuge = 2u << 20, kKept = 12, kMostKept = 64u << 20;  // blocks and bytes that are kept
    struct Block {
        size_t size, offset;  // of the mapping, which begins here; where its first large page begins
    };
    Block* block_;

    static std::atomic<Block*>* kept();
    static std::atomic<size_t>& kept_bytes();
    static Block* take(size_t bytes);
    static bool leave(Block* block);
};

// A growing array. Room is asked for before it is written to, and is not cleared. A large one is in such memory.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(capacity_, other.capacity_);
        std::swap(pages_, other.pages_);
        return *this;
    }
    ~Buffer() { drop(); }

    T* data() const { return data_; }
    size_t size() const { return size_; }
    T* end() const { return data_ + size_; }
    void clear() { size_ = 0; }
    void set_end(const T* end) { size_ = static_cast<size_t>(end - data_); }
    void push_back(T value) {
        room_for(1);
        data_[size_++] = value;
    }
    void append(const T* values, size_t n) {
        room_for(n);
        if (n) std::memcpy(data_ + size_, values, n * sizeof(T));
        size_ += n;
    }
    void room_for(size_t more) {
        if (size_ + more > capacity_) grow(size_ + more);
    }
    // Frees what is more than that many.
    void shrink(size_t most) {
        if (capacity_ > most) drop();
    }

private:
    static constexpr size_t kLarge = 1 << 20;  // bytes
    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
    std::unique_ptr<Pages> pages_;  // what data_ is in, if it is large

    void drop() {
        if (!pages_) std::free(data_);
        pages_.reset();
        data_ = nullptr;
        size_ = capacity_ = 0;
    }

    void grow(size_t least) {
        const size_t wanted = std::max<size_t>(least, capacity_ + capacity_ / 2 + 1024);
        if (wanted * sizeof(T) < kLarge) {
            void* moved = std::realloc(data_, wanted * sizeof(T));
            if (!moved) throw std::bad_alloc();
            data_ = static_cast<T*>(moved);
        } else {
            auto pages = std::make_unique<Pages>(wanted * sizeof(T), 0);
            if (size_) std::memcpy(pages->get(), data_, size_ * sizeof(T));
            if (!pages_) std::free(data_);
            data_ = static_cast<T*>(pages->get());
            pages_ = std::move(pages);
        }
        capacity_ = wanted;
    }
};

using Ids = Buffer<uint32_t>;
using Bytes = Buffer<char>;

// A fixed number of zeroed values in such memory.
template <class T>
class PagedArray {
public:
    explicit PagedArray(size_t n) : size_(n), pages_(n * sizeof(T)) {}
    size_t size() const { return size_; }
    T& operator[](size_t i) { return static_cast<T*>(pages_.get())[i]; }
    const T& operator[](size_t i) const { return static_cast<const T*>(pages_.get())[i]; }

private:
    size_t size_;
    Pages pages_;
};

}  // namespace bpe

// Memory for the tokenizer: arrays that grow without being cleared, and large tables that are read at random.
#pragma once
#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <utility>

namespace bpe {

// A growing array. Room is asked for before it is written to, and is not cleared.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept
        : data_(std::exchange(other.data_, nullptr)), size_(std::exchange(other.size_, 0)),
          capacity_(std::exchange(other.capacity_, 0)) {}
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(capacity_, other.capacity_);
        return *this;
    }
    ~Buffer() { std::free(data_); }

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
        if (capacity_ > most) std::free(std::exchange(data_, nullptr)), size_ = capacity_ = 0;
    }
    // Hands the memory over; free() it.
    T* release() {
        size_ = capacity_ = 0;
        return std::exchange(data_, nullptr);
    }

private:
    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;

    void grow(size_t least) {
        size_t wanted = std::max<size_t>(least, capacity_ + capacity_ / 2 + 1024);
        void* moved = std::realloc(data_, wanted * sizeof(T));
        if (!moved) throw std::bad_alloc();
        data_ = static_cast<T*>(moved);
        capacity_ = wanted;
    }
};

using Ids = Buffer<uint32_t>;
using Bytes = Buffer<char>;

// Zeroed memory that costs nothing until it is touched, in large pages where the system has them.
class Pages {
public:
    explicit Pages(size_t bytes) : size_(bytes + kHuge) {
        base_ = mmap(nullptr, size_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (base_ == MAP_FAILED) throw std::bad_alloc();
        aligned_ = reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(base_) + kHuge - 1) & ~(kHuge - 1));
#ifdef MADV_HUGEPAGE
        madvise(aligned_, bytes, MADV_HUGEPAGE);
#endif
    }
    Pages(const Pages&) = delete;
    Pages& operator=(const Pages&) = delete;
    ~Pages() { munmap(base_, size_); }
    void* get() const { return aligned_; }

private:
    static constexpr uintptr_t kHuge = 2u << 20;
    size_t size_;
    void* base_;
    void* aligned_;
};

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

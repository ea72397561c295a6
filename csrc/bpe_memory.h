// Memory for the tokenizer: arrays that grow without being cleared, and large tables that are read at random.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <utility>
#include <vector>

namespace bpe {

// Memory in large pages where the system has them; the first `zeroed` bytes are zero. Throws std::bad_alloc.
//
// Fresh memory from the system is dear to touch, far more so on a virtual machine, so some of what is given back is kept for
// the next: a few blocks that are taken and left by atomic exchanges, which also is safe after fork.
void* take_pages(size_t bytes, size_t zeroed);
void give_pages(void* memory);

struct GivePages {
    void operator()(void* memory) const { give_pages(memory); }
};

constexpr size_t kLarge = 1 << 20;  // bytes from which on memory is taken so

// For std::vector.
template <class T>
struct PageAllocator {
    using value_type = T;
    PageAllocator() = default;
    template <class U>
    PageAllocator(const PageAllocator<U>&) {}
    T* allocate(size_t n) {
        void* memory = n * sizeof(T) < kLarge ? std::malloc(n * sizeof(T)) : take_pages(n * sizeof(T), 0);
        if (!memory) throw std::bad_alloc();
        return static_cast<T*>(memory);
    }
    void deallocate(T* memory, size_t n) {
        if (n * sizeof(T) < kLarge) std::free(memory);
        else give_pages(memory);
    }
    bool operator==(const PageAllocator&) const { return true; }
    bool operator!=(const PageAllocator&) const { return false; }
};

template <class T>
using PagedVector = std::vector<T, PageAllocator<T>>;

// A growing array. Room is asked for before it is written to, and is not cleared. A large one is in large pages.
template <class T>
class Buffer {
public:
    Buffer() = default;
    Buffer(Buffer&& other) noexcept { *this = std::move(other); }
    Buffer& operator=(Buffer&& other) noexcept {
        std::swap(data_, other.data_), std::swap(size_, other.size_), std::swap(capacity_, other.capacity_);
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
    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;

    void drop() {
        if (data_) PageAllocator<T>().deallocate(data_, capacity_);
        data_ = nullptr;
        size_ = capacity_ = 0;
    }

    void grow(size_t least) {
        const size_t wanted = std::max<size_t>(least, capacity_ + capacity_ / 2 + 1024);
        T* moved = PageAllocator<T>().allocate(wanted);
        if (size_) std::memcpy(moved, data_, size_ * sizeof(T));
        if (data_) PageAllocator<T>().deallocate(data_, capacity_);
        data_ = moved;
        capacity_ = wanted;
    }
};

using Ids = Buffer<uint32_t>;
using Bytes = Buffer<char>;

// A fixed number of zeroed values in large pages.
template <class T>
class PagedArray {
public:
    explicit PagedArray(size_t n) : size_(n), memory_(take_pages(n * sizeof(T), n * sizeof(T))) {}
    size_t size() const { return size_; }
    T& operator[](size_t i) { return static_cast<T*>(memory_.get())[i]; }
    const T& operator[](size_t i) const { return static_cast<const T*>(memory_.get())[i]; }

private:
    size_t size_;
    std::unique_ptr<void, GivePages> memory_;
};

}  // namespace bpe

// The two hash functions and the one hash table of the tokenizer.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

namespace bpe {

inline uint64_t mix(uint64_t a, uint64_t b) {
    __uint128_t m = static_cast<__uint128_t>(a) * b;
    return static_cast<uint64_t>(m) ^ static_cast<uint64_t>(m >> 64);
}

inline uint64_t hash_key(uint64_t key) { return mix(key ^ 0x9E3779B97F4A7C15u, 0xD6E8FEB86659FD93u); }

inline uint64_t hash_bytes(const uint8_t* p, size_t n) {
    uint64_t h = 0x2D358DCCAA6C78A5u ^ n;
    for (; n >= 8; p += 8, n -= 8) {
        uint64_t w;
        std::memcpy(&w, p, 8);
        h = mix(h ^ w, 0x9E3779B97F4A7C15u);
    }
    uint64_t w = 0;
    std::memcpy(&w, p, n);
    return mix(h ^ w, 0xD6E8FEB86659FD93u);
}

// Open addressing from a pair of ids (left << 32 | right) to a value. A value of kNone means that the key is absent.
// Reading is thread-safe while nobody inserts.
class PairTable {
public:
    static constexpr uint64_t kNone = ~0ull;
    static uint64_t key(uint32_t left, uint32_t right) { return static_cast<uint64_t>(left) << 32 | right; }

    explicit PairTable(size_t expected = 0) { resize(expected); }

    uint64_t find(uint64_t key) const {
        for (size_t i = hash_key(key) & mask_;; i = (i + 1) & mask_)
            if (slots_[i].key == key || slots_[i].value == kNone) return slots_[i].value;
    }

    // The value of key, which becomes `fresh` if it was absent. The reference lasts until the next insertion.
    uint64_t& insert(uint64_t key, uint64_t fresh) {
        if (2 * (size_ + 1) > slots_.size()) grow();
        size_t i = hash_key(key) & mask_;
        while (slots_[i].value != kNone && slots_[i].key != key) i = (i + 1) & mask_;
        if (slots_[i].value == kNone) {
            slots_[i] = {key, fresh};
            size_++;
        }
        return slots_[i].value;
    }

private:
    struct Slot {
        uint64_t key, value;
    };
    std::vector<Slot> slots_;
    size_t size_ = 0, mask_ = 0;

    void resize(size_t expected) {
        size_t capacity = 16;
        while (capacity < 2 * expected + 2) capacity *= 2;
        slots_.assign(capacity, {0, kNone});
        mask_ = capacity - 1;
    }

    void grow() {
        std::vector<Slot> old = std::move(slots_);
        resize(old.size());
        size_ = 0;
        for (const Slot& s : old)
            if (s.value != kNone) insert(s.key, s.value);
    }
};

}  // namespace bpe

// The hash functions and hash tables of the tokenizer. Reading a table is thread-safe while nobody
// inserts.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bpe_memory.h"

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

// The smallest power of two that leaves a table of `expected` entries at most half full.
inline size_t table_size(size_t expected) {
    size_t capacity = 16;
    while (capacity < 2 * expected + 2) capacity *= 2;
    return capacity;
}

// Open addressing from a pair of ids (left << 32 | right) to a value. A value of kNone means that the key is absent.
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
        slots_.assign(table_size(expected), {0, kNone});
        mask_ = slots_.size() - 1;
    }

    void grow() {
        std::vector<Slot> old = std::move(slots_);
        resize(old.size());
        size_ = 0;
        for (const Slot& s : old)
            if (s.value != kNone) insert(s.key, s.value);
    }
};

// From a pair of ids to the rank at which it merges. Ids are below 2^21.
//
// A bucket of eight entries is one line of memory, and is compared as a whole: a look-up has no branch to guess wrong. The
// pair's 42 bits are stirred so that they can be told again from the number of the bucket and the rest, which is the tag.
class RankTable {
public:
    static constexpr int32_t kNone = 0x7FFFFFFF;
    static constexpr uint32_t kLimit = 1u << 21;

    explicit RankTable(size_t entries) : shift_(shift_for(entries)), buckets_(size_t{1} << (42 - shift_)) {}

    int32_t find(uint32_t left, uint32_t right) const {
        const uint32_t found = find_next(left, right);
        return found ? static_cast<int32_t>(found - 1) : kNone;
    }

    // The rank plus one; 0 for a pair that does not merge.
    [[gnu::always_inline]] uint32_t find_next(uint32_t left, uint32_t right) const {
        const uint64_t key = stirred(left, right);
        const uint32_t tag = static_cast<uint32_t>(key);
        const Bucket& b = buckets_[key >> shift_];
        const Four tags = Four{} + tag;
        const Four hit = ((b.tags[0] == tags) & b.ranks[0]) | ((b.tags[1] == tags) & b.ranks[1]);
        const Two halves = reinterpret_cast<const Two&>(hit);
        const uint64_t both = halves[0] | halves[1];
        const uint32_t found = static_cast<uint32_t>(both | both >> 32);  // the rank plus one, at one place at most
        if (__builtin_expect(b.ranks[1][3] && !found, 0)) return find_overflow(left, right);
        return found;
    }

    // A pair that is there already keeps its rank.
    void insert(uint32_t left, uint32_t right, uint32_t rank) {
        if (find(left, right) != kNone) return;
        const uint64_t key = stirred(left, right);
        Bucket& b = buckets_[key >> shift_];
        for (size_t k = 0; k < kWays; k++)
            if (!b.ranks[k / 4][k % 4]) {
                b.tags[k / 4][k % 4] = static_cast<uint32_t>(key);
                b.ranks[k / 4][k % 4] = rank + 1;
                return;
            }
        overflow_.insert(PairTable::key(left, right), rank);
    }

private:
    static constexpr size_t kWays = 8;
    typedef uint32_t Four __attribute__((vector_size(16)));
    typedef uint64_t Two __attribute__((vector_size(16), may_alias));
    struct alignas(64) Bucket {
        Four tags[2], ranks[2];  // a free entry has rank 0, and the others one more than theirs
    };
    unsigned shift_;  // of 42 bits, those that make the tag
    PagedArray<Bucket> buckets_;
    PairTable overflow_;  // of full buckets

    static unsigned shift_for(size_t entries) {
        unsigned shift = 32;
        while (shift > 12 && (kWays / 2) << (42 - shift) < entries) shift--;
        return shift;
    }

    uint32_t find_overflow(uint32_t left, uint32_t right) const {
        return static_cast<uint32_t>(overflow_.find(PairTable::key(left, right)) + 1);  // of kNone, 0
    }

    static uint64_t stirred(uint32_t left, uint32_t right) {
        constexpr uint64_t kBits42 = (1ull << 42) - 1;
        uint64_t x = static_cast<uint64_t>(left) << 21 | right;
        x = (x ^ x >> 21) * 0x9E3779B97F4A7C15u & kBits42;
        return (x ^ x >> 21) * 0xD6E8FEB86659FD93u & kBits42;
    }
};

// From the bytes of a token to its id. The bytes are the owner's: it says where those of an id are.
class TokenTable {
public:
    static constexpr uint32_t kNone = 0xFFFFFFFFu;

    explicit TokenTable(size_t entries) : slots_(table_size(entries)), mask_(slots_.size() - 1) {}

    // same(id): whether that token has the bytes that were hashed.
    template <class Same>
    uint32_t find(uint64_t hash, Same&& same) const {
        for (size_t i = hash & mask_; slots_[i]; i = (i + 1) & mask_)
            if ((slots_[i] ^ hash) >> 32 == 0) {
                const uint32_t id = static_cast<uint32_t>(slots_[i]) - 1;
                if (same(id)) return id;
            }
        return kNone;
    }

    void insert(uint64_t hash, uint32_t id) {
        size_t i = hash & mask_;
        while (slots_[i]) i = (i + 1) & mask_;
        slots_[i] = (hash & ~0xFFFFFFFFull) | (id + 1);
    }

private:
    PagedArray<uint64_t> slots_;  // high half of the hash, id + 1; 0 is empty
    size_t mask_;
};

}  // namespace bpe

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
    PagedVector<Slot> slots_;
    size_t size_ = 0, mask_ = 0;

    void resize(size_t expected) {
        slots_.assign(table_size(expected), {0, kNone});
        mask_ = slots_.size() - 1;
    }

    void grow() {
        const PagedVector<Slot> old = std::move(slots_);
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
    static constexpr size_t kWays = 8;
    struct alignas(64) Bucket {
        uint32_t tags[kWays], ranks[kWays];  // a free entry has rank 0, and the others one more than theirs
    };

    explicit RankTable(size_t entries) : shift_(shift_for(entries)), buckets_(size_t{1} << (64 - shift_)) {}

    // A pair's place: the bucket, and what tells it from the bucket's other pairs. The 42 bits that matter are the upper ones.
    [[gnu::always_inline]] static uint64_t stirred(uint32_t left, uint32_t right) {
        return (static_cast<uint64_t>(left) << 21 | right) * (0x9E3779B97F4A7C15u << 22);
    }
    [[gnu::always_inline]] static uint32_t tag(uint64_t key) { return static_cast<uint32_t>(key >> 22); }
    [[gnu::always_inline]] const Bucket& bucket(uint64_t key) const { return buckets_[key >> shift_]; }

    int32_t find(uint32_t left, uint32_t right) const {
        const uint64_t key = stirred(left, right);
        const Bucket& b = bucket(key);
        uint32_t found = 0;
        for (size_t k = 0; k < kWays; k++) found |= b.tags[k] == tag(key) ? b.ranks[k] : 0;
        if (!found && b.ranks[kWays - 1]) found = find_overflow(left, right);
        return found ? static_cast<int32_t>(found - 1) : kNone;
    }

    // The rank plus one of a pair whose bucket is full, or 0.
    uint32_t find_overflow(uint32_t left, uint32_t right) const {
        return static_cast<uint32_t>(overflow_.find(PairTable::key(left, right)) + 1);  // of kNone, 0
    }

    // A pair that is there already keeps its rank.
    void insert(uint32_t left, uint32_t right, uint32_t rank) {
        if (find(left, right) != kNone) return;
        const uint64_t key = stirred(left, right);
        Bucket& b = buckets_[key >> shift_];
        for (size_t k = 0; k < kWays; k++)
            if (!b.ranks[k]) {
                b.tags[k] = tag(key);
                b.ranks[k] = rank + 1;
                return;
            }
        overflow_.insert(PairTable::key(left, right), rank);
    }

private:
    unsigned shift_;  // what is above is the bucket's number, at least 10 bits so that 32 are enough for the tag
    PagedArray<Bucket> buckets_;
    PairTable overflow_;  // of full buckets

    static unsigned shift_for(size_t entries) {
        unsigned shift = 54;
        while (shift > 34 && (kWays / 2) << (64 - shift) < entries) shift--;
        return shift;
    }
};

// From the bytes of a token to its id. The bytes are the owner's: it says where those of an id are.
class TokenTable {
public:
    static constexpr uint32_t kNone = 0xFFFFFFFFu;

    explicit TokenTable(size_t entries) : slots_(table_size(entries)), mask_(slots_.size() - 1) {}

    [[gnu::always_inline]] void prefetch(uint64_t hash) const { __builtin_prefetch(&slots_[hash & mask_]); }

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

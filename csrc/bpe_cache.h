// What a thread remembers of the pieces that it has encoded. Of bounded size: new pieces push out old ones.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "bpe_hash.h"
#include "bpe_memory.h"

namespace bpe {

// Which bits of 16 bytes belong to a piece of n.
struct PieceMasks {
    uint64_t low[16], high[16];
    constexpr PieceMasks() : low(), high() {
        for (size_t n = 0; n <= 15; n++) {
            low[n] = n >= 8 ? ~0ull : (1ull << (8 * n)) - 1;
            high[n] = n <= 8 ? 0 : (1ull << (8 * (n - 8))) - 1;
        }
    }
};
inline constexpr PieceMasks kPieceMasks{};

class PieceCache {
public:
    static constexpr size_t kShort = 15;  // bytes of a piece that has a slot of its own

    // A piece of up to 15 bytes with its size in the last byte, and up to four ids with their number in the top bits of
    // the first. Of more ids, the slot says where they are: kElsewhere, their place and their number.
    struct Slot {
        uint64_t low, high;
        uint32_t ids[4];
    };
    static constexpr uint32_t kIdBits = (1u << 28) - 1, kElsewhere = 15;

    // The key of the piece of 1 to 15 bytes at p, where `readable` bytes may be read.
    static void key_of(const uint8_t* p, size_t n, size_t readable, uint64_t& low, uint64_t& high) {
        uint8_t padded[16];
        if (readable < 16) {
            std::memset(padded, 0, sizeof(padded));
            p = static_cast<const uint8_t*>(std::memcpy(padded, p, n));
        }
        std::memcpy(&low, p, 8);
        std::memcpy(&high, p + 8, 8);
        low &= kPieceMasks.low[n];
        high = (high & kPieceMasks.high[n]) | static_cast<uint64_t>(n) << 56;
    }
    static uint64_t hash_of(uint64_t low, uint64_t high) {
        return mix(low ^ 0x9E3779B97F4A7C15u, high ^ 0xD6E8FEB86659FD93u);
    }

    // The two slots that may hold a piece of that hash.
    Slot* bucket(uint64_t hash) const { return slots() + 2 * (hash & mask_); }

    // The slot of a piece, or null.
    const Slot* find(uint64_t low, uint64_t high, uint64_t hash) const {
        const Slot* slot = bucket(hash);
        slot += ((slot->low ^ low) | (slot->high ^ high)) != 0;
        return slot->low == low && slot->high == high ? slot : nullptr;
    }

    // The ids of a slot; of the first one only kIdBits count.
    const uint32_t* ids_of(const Slot& slot, size_t& n_ids) const {
        const uint32_t mark = slot.ids[0] >> 28;
        n_ids = mark == kElsewhere ? slot.ids[2] : mark;
        return mark == kElsewhere ? words_ + slot.ids[1] : slot.ids;
    }

    void keep(uint64_t low, uint64_t high, uint64_t hash, const uint32_t* ids, size_t n_ids) {
        Slot slot{low, high, {}};
        if (n_ids <= 4) {
            std::memcpy(slot.ids, ids, n_ids * sizeof(*ids));
            slot.ids[0] |= static_cast<uint32_t>(n_ids) << 28;
        } else {
            const size_t at = room_for(n_ids);
            std::memcpy(words_ + at, ids, n_ids * sizeof(*ids));
            slot.ids[0] = kElsewhere << 28;
            slot.ids[1] = static_cast<uint32_t>(at);
            slot.ids[2] = static_cast<uint32_t>(n_ids);
        }
        if (2 * kept_++ > mask_ && mask_ + 1 < kMostBuckets) grow();
        put(slot, hash);
    }

    // The same for pieces of more bytes; null if they are not there.
    const void* place_of_long(uint64_t hash) const { return longs_of(hash); }

    const uint32_t* find_long(const uint8_t* piece, size_t n, uint64_t hash, size_t& n_ids) const {
        const Long* entry = longs_of(hash);
        entry += entry->hash != hash;
        if (entry->hash != hash || entry->size != n) return nullptr;
        const uint32_t* held = words_ + entry->offset;
        if (std::memcmp(held, piece, n)) return nullptr;
        n_ids = entry->n_ids;
        return held + (n + 3) / 4;
    }

    void keep_long(const uint8_t* piece, size_t n, uint64_t hash, const uint32_t* ids, size_t n_ids) {
        if (n > kLongest) return;
        const size_t at = room_for((n + 3) / 4 + n_ids);
        Long* two = longs_of(hash);
        two[two->hash ? 1 : 0] = {hash, static_cast<uint32_t>(at), static_cast<uint16_t>(n), static_cast<uint16_t>(n_ids)};
        std::memcpy(words_ + at, piece, n);
        std::memcpy(words_ + at + (n + 3) / 4, ids, n_ids * sizeof(*ids));
    }

    Ids ids;      // what leaves in another form
    Bytes bytes;
    static constexpr size_t kKept = 1 << 24;  // the most that these keep between calls

private:
    static constexpr size_t kFewestBuckets = 1 << 13, kMostBuckets = 1 << 18;
    static constexpr size_t kLongs = 1 << 16, kWords = 1 << 21, kLongest = 1024;
    struct Long {
        uint64_t hash;
        uint32_t offset;  // in words_: the bytes, then the ids
        uint16_t size, n_ids;
    };

    size_t mask_ = kFewestBuckets - 1, kept_ = 0;
    std::unique_ptr<Pages> slots_ = std::make_unique<Pages>(2 * kFewestBuckets * sizeof(Slot));
    Pages pages_{2 * kLongs * sizeof(Long) + kWords * sizeof(uint32_t)};
    Long* longs_ = static_cast<Long*>(pages_.get());
    uint32_t* words_ = reinterpret_cast<uint32_t*>(longs_ + 2 * kLongs);
    size_t used_ = 1;  // word 0 is nobody's

    Slot* slots() const { return static_cast<Slot*>(slots_->get()); }
    Long* longs_of(uint64_t hash) const { return longs_ + 2 * (hash & (kLongs - 1)); }

    // The first comer keeps its place, since what is frequent comes early; the second place is for the latest.
    void put(const Slot& slot, uint64_t hash) {
        Slot* two = bucket(hash);
        two[two->high ? 1 : 0] = slot;
    }

    void grow() {
        const size_t before = 2 * (mask_ + 1);
        mask_ = std::min(4 * (mask_ + 1), kMostBuckets) - 1;
        auto old = std::exchange(slots_, std::make_unique<Pages>(2 * (mask_ + 1) * sizeof(Slot)));
        const Slot* slots = static_cast<const Slot*>(old->get());
        for (size_t i = 0; i < before; i++)
            if (slots[i].high) put(slots[i], hash_of(slots[i].low, slots[i].high));
    }

    // The place of that many words. When all are taken, everything is forgotten.
    size_t room_for(size_t words) {
        if (used_ + words > kWords) {
            std::memset(slots_->get(), 0, 2 * (mask_ + 1) * sizeof(Slot));
            std::memset(static_cast<void*>(longs_), 0, 2 * kLongs * sizeof(Long));
            used_ = 1;
        }
        used_ += words;
        return used_ - words;
    }
};

}  // namespace bpe

// What a thread remembers of the pieces that it has encoded. Of bounded size: new pieces push out old ones.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <utility>

#include "bpe_key.h"
#include "bpe_memory.h"

namespace bpe {

class PieceCache {
public:
    // A short piece's key, and up to four ids with their number in the top bits of the first. Of more ids, the slot says
    // where they are: kElsewhere, their place and their number.
    struct Slot {
        uint64_t low, high;
        uint32_t ids[4];
        bool is(const PieceKey& key) const { return ((low ^ key.low) | (high ^ key.high)) == 0; }
    };
    static constexpr uint32_t kIdBits = (1u << 28) - 1, kElsewhere = 15;

    // The two slots in which a piece of that hash is looked for first. They stay where they are until make_room.
    Slot* bucket(uint64_t hash) const { return places().bucket(hash); }

    static constexpr size_t kLongs = 1 << 16;  // of them, in two ways
    struct Long {
        uint64_t hash;
        uint32_t offset;  // in words_: the bytes, then the ids
        uint16_t size, n_ids;
    };

    // A copy of what says where pieces are, good until make_room.
    struct Places {
        Slot* slots;
        Long* longs;
        const uint32_t* words;
        size_t mask;
        Slot* bucket(uint64_t hash) const { return slots + 2 * (hash & mask); }
        Long* of_long(uint64_t hash) const { return longs + 2 * (hash & (kLongs - 1)); }
        // Of a long piece whose place is at hand, its bytes and ids.
        [[gnu::always_inline]] void fetch_long(uint64_t hash) const {
            const Long* entry = of_long(hash);
            entry += entry->hash != hash;
            __builtin_prefetch(words + entry->offset);
        }
    };
    Places places() const { return {slots(), longs_, words_, mask_}; }

    // The slot of a short piece, or null.
    const Slot* find(const PieceKey& key) const {
        const Slot* two = bucket(key.hash);
        if (two[0].is(key)) return two;
        if (two[1].is(key)) return two + 1;
        return two[1].high ? find_further(key) : nullptr;
    }

    // The same if its first two slots have other pieces.
    const Slot* find_further(const PieceKey& key) const {
        for (size_t probe = 1; probe < kProbes; probe++) {
            const Slot* two = bucket(key.hash + probe);
            if (two[0].is(key)) return two;
            if (two[1].is(key)) return two + 1;
            if (!two[1].high) break;
        }
        return nullptr;
    }

    // The ids of a slot; of the first one only kIdBits count.
    const uint32_t* ids_of(const Slot& slot, size_t& n_ids) const {
        const uint32_t mark = slot.ids[0] >> 28;
        n_ids = mark == kElsewhere ? slot.ids[2] : mark;
        return mark == kElsewhere ? words_ + slot.ids[1] : slot.ids;
    }

    // Sees to it that that many pieces can be kept without a slot that moves.
    void make_room(size_t pieces) {
        const size_t most = mask_ + 1 == kMostBuckets ? 7 : 4;  // tenths of the slots: a full table is slow to read
        if (10 * (kept_ + pieces) > most * 2 * (mask_ + 1)) grow();
    }

    void keep(const PieceKey& key, const uint32_t* ids, size_t n_ids) {
        Slot slot{key.low, key.high, {}};
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
        put(slot, key.hash);
    }

    // The same for pieces of more bytes; null if they are not there.
    const uint32_t* find_long(const uint8_t* piece, size_t n, const PieceKey& key, size_t& n_ids) const {
        const Long* entry = places().of_long(key.hash);
        entry += entry->hash != key.hash;
        if (entry->hash != key.hash || entry->size != n) return nullptr;
        const uint32_t* held = words_ + entry->offset;
        if (std::memcmp(held, piece, n)) return nullptr;
        n_ids = entry->n_ids;
        return held + (n + 3) / 4;
    }

    void keep_long(const uint8_t* piece, size_t n, const PieceKey& key, const uint32_t* ids, size_t n_ids) {
        if (n > kLongest) return;
        const size_t at = room_for((n + 3) / 4 + n_ids);
        Long* two = places().of_long(key.hash);
        two[two->hash ? 1 : 0] = {key.hash, static_cast<uint32_t>(at), static_cast<uint16_t>(n), static_cast<uint16_t>(n_ids)};
        std::memcpy(words_ + at, piece, n);
        std::memcpy(words_ + at + (n + 3) / 4, ids, n_ids * sizeof(*ids));
    }

    Ids ids;      // what leaves in another form
    Bytes bytes;
    static constexpr size_t kKept = 1 << 24;  // the most that these keep between calls

    size_t missed = 0;  // of the last pieces encoded with this cache, those that it did not have

private:
    static constexpr size_t kFewestBuckets = 1 << 15, kMostBuckets = 1 << 18;
    static constexpr size_t kWords = 1 << 21, kLongest = 1024, kProbes = 8;

    using Pages = std::unique_ptr<void, GivePages>;
    static Pages zeroed_slots(size_t buckets) {
        return Pages(take_pages(2 * buckets * sizeof(Slot), 2 * buckets * sizeof(Slot)));
    }

    size_t mask_ = kFewestBuckets - 1, kept_ = 0;
    Pages slots_ = zeroed_slots(kFewestBuckets);
    Pages pages_{take_pages(2 * kLongs * sizeof(Long) + kWords * sizeof(uint32_t), 2 * kLongs * sizeof(Long))};
    Long* longs_ = static_cast<Long*>(pages_.get());
    uint32_t* words_ = reinterpret_cast<uint32_t*>(longs_ + 2 * kLongs);
    size_t used_ = 1;  // word 0 is nobody's

    Slot* slots() const { return static_cast<Slot*>(slots_.get()); }

    // Behind a full bucket the next few are tried; the last slot of all gives way. A piece that is there already stays.
    void put(const Slot& slot, uint64_t hash) {
        for (size_t i = 0;; i++) {
            Slot* at = bucket(hash + i / 2) + i % 2;
            if (at->low == slot.low && at->high == slot.high) return;
            if (at->high && i < 2 * kProbes - 1) continue;
            *at = slot;
            kept_++;
            return;
        }
    }

    // Twice the slots, or at the most everything is forgotten.
    void grow() {
        if (mask_ + 1 == kMostBuckets) return forget();
        const size_t before = 2 * (mask_ + 1);
        const Pages old = std::exchange(slots_, zeroed_slots(before));  // where that fails, nothing has changed
        mask_ = before - 1;
        kept_ = 0;
        const Slot* slots = static_cast<const Slot*>(old.get());
        for (size_t i = 0; i < before; i++)
            if (slots[i].high) put(slots[i], PieceKey::hash_of(slots[i].low, slots[i].high));
    }

    void forget() {
        std::memset(slots_.get(), 0, 2 * (mask_ + 1) * sizeof(Slot));
        std::memset(static_cast<void*>(longs_), 0, 2 * kLongs * sizeof(Long));
        used_ = 1;
        kept_ = 0;
    }

    // The place of that many words. When all are taken, everything is forgotten.
    size_t room_for(size_t words) {
        if (used_ + words > kWords) forget();
        used_ += words;
        return used_ - words;
    }
};

}  // namespace bpe

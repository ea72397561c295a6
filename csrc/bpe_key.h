// What a piece of text is looked up by.
#pragma once
#include <cstddef>
#include <cstdint>
#include <cstring>

#include "bpe_hash.h"

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

struct PieceKey {
    static constexpr size_t kShort = 15;  // bytes of a piece that its key holds

    uint64_t low, high;  // up to 15 bytes and their number in the last byte; of a longer piece, 0 and the inverted number
    uint64_t hash;

    bool is_short() const { return high >> 56 <= kShort; }

    [[gnu::always_inline]] void make_short(const uint8_t* p, size_t n) {  // 16 bytes may be read
        std::memcpy(&low, p, 8);
        std::memcpy(&high, p + 8, 8);
        low &= kPieceMasks.low[n];
        high = (high & kPieceMasks.high[n]) | static_cast<uint64_t>(n) << 56;
        hash = hash_of(low, high);
    }

    void make_long(const uint8_t* p, size_t n) {
        low = 0;
        high = ~static_cast<uint64_t>(n);
        hash = hash_bytes(p, n);
    }

    static PieceKey of(const uint8_t* p, size_t n) {
        PieceKey key;
        if (n > kShort) {
            key.make_long(p, n);
        } else {
            uint8_t padded[16] = {};
            std::memcpy(padded, p, n);
            key.make_short(padded, n);
        }
        return key;
    }

    [[gnu::always_inline]] static uint64_t hash_of(uint64_t low, uint64_t high) {
        return mix(low ^ 0x9E3779B97F4A7C15u, high ^ 0xD6E8FEB86659FD93u);
    }
};

// Makes the keys of the pieces of a text that follow one another, one at a time: the first begins at `begin`.
class KeyMaker {
public:
    KeyMaker(const uint8_t* text, size_t size) : text_(text), size_(size) {}

    // Whether the piece is short.
    [[gnu::always_inline]] bool make(size_t end, PieceKey& key) {
        const uint8_t* p = text_ + begin_;
        const size_t n = end - begin_;
        const bool inside = begin_ + 16 <= size_;
        begin_ = end;
        if (__builtin_expect(n > PieceKey::kShort, 0)) {
            key.make_long(p, n);
            return false;
        }
        if (__builtin_expect(inside, 1)) key.make_short(p, n);
        else key = PieceKey::of(p, n);
        return true;
    }

private:
    const uint8_t* text_;
    size_t size_, begin_ = 0;
};

}  // namespace bpe

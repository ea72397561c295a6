// The merging of one piece of text: what merges into what, and up to 64 bytes that are being merged.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "bpe_hash.h"
#include "bpe_memory.h"

namespace bpe {

// A candidate for a merge: the rank of a token and its neighbour with the token's place in the low bits, so that the
// smallest one names the leftmost pair of the lowest rank.
constexpr int32_t kPlaceBits = 6, kNothing = 0x7FFFFFC0;  // and more, for a pair that does not merge
static_assert(RankTable::kLimit << kPlaceBits < kNothing);

// next_rank: the rank plus one, or 0.
[[gnu::always_inline]] inline int32_t candidate(uint32_t next_rank, size_t place) {
    return static_cast<int32_t>((next_rank - 1) << kPlaceBits & 0x7FFFFFFF) | static_cast<int32_t>(place);
}

struct Merges {
    explicit Merges(size_t entries) : pairs(entries), of_bytes(65536, kNothing), byte_id() {}

    RankTable pairs;
    std::vector<int32_t> of_bytes;        // (65536): the candidate of bytes a, b at place 0 is at a | b << 8
    std::vector<uint32_t> token_of_rank;  // empty if the rank is the token's id
    uint32_t byte_id[256];

    uint32_t token_of(uint32_t rank) const { return token_of_rank.empty() ? rank : token_of_rank[rank]; }

    void add_bytes(uint8_t a, uint8_t b, uint32_t rank) {
        int32_t& known = of_bytes[static_cast<size_t>(a | b << 8)];
        if (known == kNothing) known = candidate(rank + 1, 0);
    }
};

// A token stays where its first byte was; starts has a bit there. Before the first and behind the last is no token.
struct alignas(64) Window {
    static constexpr size_t kWidth = 64;
    static constexpr uint32_t kNoToken = RankTable::kLimit - 1;

    const uint8_t* bytes;
    size_t n;  // of bytes, 1 to kWidth
    uint64_t starts;
    alignas(64) int32_t padded_candidates[16 + kWidth];
    uint32_t padded_tokens[1 + kWidth + 15];

    uint32_t* tokens() { return padded_tokens + 1; }
    const uint32_t* tokens() const { return padded_tokens + 1; }
    int32_t* candidates() { return padded_candidates + 16; }
};

// Compiled once an instruction set, from merge.inc.
struct MergeFunctions {
    // The tokens of a piece of 1 to 64 bytes; room for as many must be there. Returns how many.
    size_t (*one)(const Merges& merges, const uint8_t* piece, size_t n, uint32_t* tokens);
    // Merges windows whose `bytes` and `n` are set, several at a time: while one waits for memory, another goes on.
    void (*several)(const Merges& merges, Window* windows, size_t count);
    // Writes the tokens of a window that start at these bits, and returns where they end. Room for 16 more must be there.
    uint32_t* (*put)(const Window& window, uint64_t starts, uint32_t* to);
};

extern const MergeFunctions merge_portable;
#if defined(__x86_64__)
extern const MergeFunctions merge_avx2, merge_avx512;
#endif
const MergeFunctions& merge_functions();

}  // namespace bpe

// Training a byte-level BPE: count the distinct pieces of the text, then merge the most frequent pair until the
// vocabulary is full. Token ids are 0 to 255 for the bytes, then one for each merge in order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "pretokenize.h"

namespace bpe {

// Which of several pairs of equal count is merged first.
//   hf     ascending (left, right) where bytes rank by the character that stands for them in the byte-level alphabet
//   raw    ascending (left, right) token ids
//   first  the pair that occurs first in the text as it now stands
enum class TieBreak { hf, raw, first };

// Distinct pieces with their counts, in the order of their first occurrence. Not thread-safe; add() uses threads.
class PieceCounter {
public:
    // Counts the pieces of each text. The bytes need to last only for the call.
    void add(pretokenize::Pattern pattern, const std::vector<std::string_view>& texts, int threads);
    // Counts pieces that somebody else has split.
    void add_pieces(const std::vector<std::string_view>& pieces);
    // Counts the pieces of each file, mapped into memory, a bounded amount at a time.
    // Throws std::invalid_argument for a file that is missing or empty.
    void add_files(pretokenize::Pattern pattern, const std::vector<std::string>& paths, int threads);

    size_t size() const { return entries_.size(); }
    std::string_view piece(size_t i) const { return {arena_.data() + entries_[i].offset, entries_[i].size}; }
    int64_t count(size_t i) const { return entries_[i].count; }

    void add_piece(const uint8_t* piece, size_t n, int64_t count);

private:
    struct Entry {
        uint64_t hash;
        size_t offset, size;
        int64_t count;
    };
    std::string arena_;
    std::vector<Entry> entries_;
    std::vector<uint32_t> slots_;  // index into entries_ plus one; 0 is free

    void grow();
};

struct TrainedPair {
    uint32_t left, right;
};

// At most n_merges merges, in order; fewer when every piece has become one token. Deterministic.
// Cost: O(T log T) in the total length T of the distinct pieces, since an occurrence is touched only when it merges.
// Throws std::length_error when the distinct pieces hold 2^32 bytes or more.
std::vector<TrainedPair> train(const PieceCounter& pieces, size_t n_merges, TieBreak tie_break);

}  // namespace bpe

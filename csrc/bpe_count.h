// Counting the distinct pieces of a text, the first half of training.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_key.h"
#include "pretokenize.h"

namespace bpe {

// Distinct pieces with their counts and where they occurred first. Memory grows with the distinct pieces alone.
class PieceTable {
public:
    struct Entry {
        uint64_t low, high;  // up to 15 bytes and their number, as in the encoder's cache; else place in arena, ~size
        int64_t count;
        uint64_t first;  // place of the first occurrence in all of the text
    };

    // Counts the pieces of text, which begins at that place in all of the text.
    void add(pretokenize::Pattern pattern, std::string_view text, uint64_t place);
    // Counts one piece; of several first places the lowest stays.
    void add_piece(std::string_view piece, int64_t count, uint64_t first);
    // Adds another table's counts.
    void add_table(const PieceTable& other);
    // Orders the entries by first occurrence. Nothing can be added any more.
    void finish();

    size_t size() const { return entries_.size(); }
    int64_t count(size_t i) const { return entries_[i].count; }
    std::string_view piece(size_t i) const;

private:
    PagedVector<Entry> entries_;
    PagedVector<uint64_t> slots_;  // high half of the hash, index into entries_ + 1; 0 is free
    std::string arena_;            // the bytes of pieces of more than 15

    void count_key(const PieceKey& key, std::string_view piece, int64_t count, uint64_t first);
    bool same(const Entry& entry, const PieceKey& key, std::string_view piece) const;
    void grow();
};

// One table a thread, so that nothing is shared while counting; joined at the end.
class PieceCounter {
public:
    explicit PieceCounter(int threads) : tables_(static_cast<size_t>(threads < 1 ? 1 : threads)) {}

    // Counts the pieces of each text. The bytes need to last only for the call.
    void add(pretokenize::Pattern pattern, const std::vector<std::string_view>& texts);
    // Counts pieces that somebody else has split.
    void add_pieces(const std::vector<std::string_view>& pieces);
    // All that was counted, in the order of first occurrence, whatever the number of threads. Call it once.
    PieceTable finish();

private:
    std::vector<PieceTable> tables_;
    uint64_t place_ = 0;
};

}  // namespace bpe

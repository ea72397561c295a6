// Encoding and decoding with a byte-level BPE.
//
// One table of pairs serves both meanings that such a vocabulary can have. A merge list (Hugging Face) ranks each listed
// pair by its place in the list. Ranks by bytes (tiktoken) give every split of a token into two tokens the token's own
// rank; and a piece that is a token as a whole is taken whole. Either way the leftmost pair of the lowest rank merges
// first.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <mutex>
#include <string>
#include <string_view>
#include <unordered_map>
#include <vector>

#include "bpe_hash.h"
#include "pretokenize.h"

namespace bpe {

struct Merge {
    uint32_t left, right, token, rank;
};

struct Special {
    std::string_view text;
    uint32_t id;
};

enum class Kind : uint8_t { absent, ordinary, special };

// Immutable after construction; all const members may be called from several threads at once.
class Model {
public:
    // bytes[id] and kinds[id] describe the vocabulary, which must hold all 256 single bytes as ordinary tokens.
    // Throws std::invalid_argument for a missing byte, or a merge whose tokens do not concatenate to its result.
    Model(std::vector<std::string> bytes, std::vector<Kind> kinds, const std::vector<Merge>& merges,
          bool whole_piece_first);
    ~Model();

    // Appends the ids of one piece.
    void encode_piece(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const;
    // Appends the ids of text, in which the given specials are parsed: the leftmost one, and of those the longest.
    void encode(pretokenize::Pattern pattern, std::string_view text, const std::vector<Special>& specials,
                std::vector<uint32_t>& out) const;

    // Many texts at once; ids of text i are at [offsets[i], offsets[i + 1]) of all parts laid end to end.
    struct Batch {
        std::vector<std::vector<uint32_t>> parts;
        std::vector<int64_t> offsets;
    };
    Batch encode_batch(pretokenize::Pattern pattern, const std::vector<std::string_view>& texts, int threads) const;

    // Throws std::out_of_range for an id outside the vocabulary.
    std::string decode(const int64_t* ids, size_t n) const;

    // Every split of an ordinary token into two ordinary tokens, in the order of the token's id, then of the split.
    static std::vector<Merge> all_splits(const std::vector<std::string>& bytes, const std::vector<Kind>& kinds);

private:
    struct Cache;
    struct Lease;

    std::vector<std::string> bytes_;
    std::vector<Kind> kinds_;
    bool whole_piece_first_;
    PairTable pairs_;  // -> rank << 32 | token
    std::unordered_map<std::string_view, uint32_t> whole_;
    uint32_t byte_id_[256];
    mutable std::mutex idle_lock_;
    mutable std::vector<std::unique_ptr<Cache>> idle_;

    void encode_text(pretokenize::Pattern pattern, std::string_view text, Cache& cache,
                     std::vector<uint32_t>& out) const;
    void merge_short(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const;
    void merge_long(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const;
};

}  // namespace bpe

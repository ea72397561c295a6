// Encoding and decoding with a byte-level BPE.
//
// Two meanings that such a vocabulary can have become one table of pairs. A merge list (Hugging Face) ranks each listed
// pair by its place in the list. Ranks by bytes (tiktoken) let any two tokens merge that make a token, at that token's
// rank. In both the leftmost pair of the lowest rank merges first, so what happens inside a stretch of text that ends up
// as one token does not depend on what is around it; in particular only one pair of tokens ever makes a given token by
// ranks, and the table holds that one.
#pragma once
#include <array>
#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "bpe_cache.h"
#include "bpe_hash.h"
#include "bpe_merge.h"
#include "pretokenize.h"

namespace bpe {

struct Merge {
    uint32_t left, right, token;
};

struct Special {
    std::string_view text;
    uint32_t id;
};

enum class Kind : uint8_t { absent, ordinary, special };

// Immutable after construction; all const members may be called from several threads at once.
class Model {
public:
    // tokens[id] and kinds[id] describe the vocabulary, which must hold all 256 single bytes as ordinary tokens. Merges
    // are in the order of their ranks; with by_bytes they come from the tokens. whole_piece_first: a piece that is a
    // token is taken whole, whatever the merges say. Throws std::invalid_argument for a missing byte, or a merge whose
    // tokens do not concatenate to its result.
    Model(const std::vector<std::string_view>& tokens, std::vector<Kind> kinds, const std::vector<Merge>& merges,
          bool by_bytes, bool whole_piece_first);
    ~Model();

    // Appends the ids of one piece.
    void encode_piece(const uint8_t* piece, size_t n, Ids& out) const;
    // Appends the ids of text, in which the given specials are parsed: the leftmost one, and of those the longest.
    void encode(pretokenize::Pattern pattern, std::string_view text, const std::vector<Special>& specials,
                PieceCache& cache, Ids& out) const;
    // Many texts at once, on at most `threads` threads; the ids of text i are at [offsets[i], offsets[i + 1]).
    Ids encode_batch(pretokenize::Pattern pattern, const std::vector<std::string_view>& texts, int threads,
                     std::vector<int64_t>& offsets) const;

    // Appends the bytes of ids. Throws std::out_of_range for an id that the vocabulary does not have.
    template <class Id>
    void decode(const Id* ids, size_t n, Bytes& out) const;

    size_t size() const { return spelled_.size(); }

    // A cache for the length of a call; it comes back with what it learnt.
    class Lease {
    public:
        explicit Lease(const Model& model);
        ~Lease();
        Lease(const Lease&) = delete;
        Lease& operator=(const Lease&) = delete;
        PieceCache& operator*() const { return *cache_; }
        PieceCache* operator->() const { return cache_; }

    private:
        const Model& model_;
        PieceCache* cache_;
    };

private:
    // A token's bytes if there are at most 15, padded with zeros, with their number, as in the cache's keys; else the
    // number is kLong, or kAbsent.
    struct Spelled {
        uint8_t bytes[15];
        uint8_t size;
    };
    static constexpr uint8_t kLong = 254, kAbsent = 255;

    std::string arena_;                 // the bytes of all tokens
    std::vector<uint32_t> offsets_;     // (V + 1): token id is arena_[offsets_[id], offsets_[id + 1])
    PagedArray<Spelled> spelled_;       // (V)
    TokenTable whole_;                  // ordinary tokens, if a whole piece is looked up first
    bool whole_piece_first_;
    Merges merges_;
    mutable std::array<std::atomic<PieceCache*>, 32> idle_{};  // caches that were given back; no lock that a fork could leave locked

    std::string_view token(uint32_t id) const {
        return {arena_.data() + offsets_[id], offsets_[id + 1] - offsets_[id]};
    }
    uint32_t find_whole(const uint8_t* piece, size_t n, const PieceKey& key) const;
    void add_merges(const std::vector<Merge>& merges);
    void find_merges(const std::vector<Kind>& kinds);
    void encode_uncached(const uint8_t* piece, size_t n, uint32_t whole, Ids& out) const;
    void encode_missed(const uint8_t* piece, size_t n, const PieceKey& key, const PieceCache::Slot* slot,
                       PieceCache& cache, Ids& out) const;
    static void keep(const uint8_t* piece, size_t n, const PieceKey& key, const uint32_t* ids, size_t n_ids, PieceCache& cache);
    size_t learn(const uint8_t* text, size_t begin, const size_t* ends, const PieceKey* keys, size_t count,
                 PieceCache& cache) const;
    void encode_text(pretokenize::Pattern pattern, std::string_view text, PieceCache& cache, Ids& out) const;
    class Windows;
    size_t merge_many(const uint8_t* piece, size_t n, uint32_t* tokens) const;
    size_t merge(const uint8_t* piece, size_t n, uint32_t* tokens) const;
    void merge_heap(const uint8_t* piece, size_t n, Ids& out) const;
};

}  // namespace bpe

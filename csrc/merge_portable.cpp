// Merging without any particular instruction set.
#include <algorithm>

#include "bpe_merge.h"

namespace bpe {
namespace {

template <size_t kLanes>
struct Lanes {
    int32_t candidates[kLanes];

    explicit Lanes(const int32_t* from) { std::copy(from, from + kLanes, candidates); }
    void set(int place, int32_t candidate) {
        if (place >= 0) candidates[place] = candidate;
    }
    int32_t lowest() const { return *std::min_element(candidates, candidates + kLanes); }
};

inline uint32_t match(const RankTable::Bucket& bucket, uint32_t tag) {
    uint32_t found = 0;
    for (size_t k = 0; k < RankTable::kWays; k++) found |= bucket.tags[k] == tag ? bucket.ranks[k] : 0;
    return found;
}

inline uint32_t* put_starts(const Window& window, uint64_t starts, uint32_t* to) {
    for (; starts; starts &= starts - 1) *to++ = window.tokens()[__builtin_ctzll(starts)];
    return to;
}

}  // namespace
}  // namespace bpe

#define MERGE_TABLE merge_portable
#include "merge.inc"

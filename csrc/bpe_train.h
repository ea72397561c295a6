// Training a byte-level BPE, the second half: of the distinct pieces, merge the most frequent pair until the
// vocabulary is full. Token ids are 0 to 255 for the bytes, then one for each merge in order.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "bpe_count.h"

namespace bpe {

// Which of several pairs of equal count is merged first.
//   hf     ascending (left, right) where bytes rank by the character that stands for them in the byte-level alphabet
//   raw    ascending (left, right) token ids
//   first  the pair that occurs first in the text as it now stands
enum class TieBreak { hf, raw, first };

struct TrainedPair {
    uint32_t left, right;
};

// Finds merges one after another. Deterministic. Cost: O(T log T) in the total length T of the distinct pieces, since an
// occurrence is touched only when it merges.
class Trainer {
public:
    // Throws std::length_error when the distinct pieces hold 2^32 bytes or more.
    Trainer(const PieceTable& pieces, TieBreak tie_break);
    ~Trainer();
    // The next merges, at most n; fewer only when every piece has become one token.
    std::vector<TrainedPair> next(size_t n);

private:
    class State;
    std::unique_ptr<State> state_;
};

}  // namespace bpe

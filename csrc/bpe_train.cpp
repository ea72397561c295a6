#include "bpe_train.h"

#include <queue>
#include <stdexcept>

#include "bpe_hash.h"

namespace bpe {

namespace {

// Where each byte's stand-in character sorts in the byte-level alphabet of GPT-2: printable Latin-1 bytes stand for
// themselves, the others, in order, for U+0100 and up.
std::vector<uint32_t> hf_byte_order() {
    auto printable = [](int b) { return (b >= 33 && b <= 126) || (b >= 161 && b <= 172) || b >= 174; };
    std::vector<uint32_t> order(256);
    uint32_t next = 0;
    for (int b = 0; b < 256; b++)
        if (printable(b)) order[b] = next++;
    for (int b = 0; b < 256; b++)
        if (!printable(b)) order[b] = next++;
    return order;
}

}  // namespace

// The distinct pieces laid end to end, one position a byte. A token lives at the position of its first byte; `next` and
// `prev` link the tokens of a piece, so a merge touches its two neighbours and nothing else.
class Trainer::State {
public:
    State(const PieceTable& pieces, TieBreak tie_break) : tie_(tie_break), rank_(hf_byte_order()) {
        size_t total = 0;
        for (size_t i = 0; i < pieces.size(); i++) total += pieces.piece(i).size();
        if (total >= kEnd) throw std::length_error("Tokenizer.train: the distinct pieces hold 4 GiB or more");
        token_.reserve(total), next_.reserve(total), prev_.reserve(total), piece_.reserve(total);
        for (size_t i = 0; i < pieces.size(); i++) lay(pieces.piece(i), static_cast<uint32_t>(i), pieces.count(i));
        for (uint32_t p = 0; p < pairs_.size(); p++) push(p);
    }

    std::vector<TrainedPair> next(size_t n) {
        std::vector<TrainedPair> merges;
        while (merges.size() < n && !heap_.empty()) {
            Candidate top = heap_.top();
            heap_.pop();
            bool moved = tie_ == TieBreak::first && top.key != first_position(top.pair);
            if (moved || top.count != pairs_[top.pair].count) {
                push(top.pair);  // what it knew is out of date; counts only fall and positions only rise
                continue;
            }
            merges.push_back({pairs_[top.pair].left, pairs_[top.pair].right});
            apply(top.pair, new_token_++);
        }
        return merges;
    }

private:
    static constexpr uint32_t kEnd = 0xFFFFFFFFu;

    struct Pair {
        uint32_t left, right;
        int64_t count = 0;
        size_t cursor = 0;                // positions before it no longer hold the pair
        std::vector<uint32_t> positions;  // ascending; some may no longer hold the pair
    };
    struct Candidate {
        int64_t count;
        uint64_t key;  // smaller first
        uint32_t pair;
        bool operator<(const Candidate& o) const { return count != o.count ? count < o.count : key > o.key; }
    };

    TieBreak tie_;
    std::vector<uint32_t> rank_;
    std::vector<uint32_t> token_, next_, prev_, piece_;
    std::vector<int64_t> count_;
    std::vector<Pair> pairs_;
    PairTable index_;
    std::priority_queue<Candidate> heap_;
    uint32_t new_token_ = 256;

    void lay(std::string_view piece, uint32_t id, int64_t count) {
        count_.push_back(count);
        uint32_t base = static_cast<uint32_t>(token_.size()), n = static_cast<uint32_t>(piece.size());
        for (uint32_t i = 0; i < n; i++) {
            token_.push_back(static_cast<uint8_t>(piece[i]));
            next_.push_back(i + 1 < n ? base + i + 1 : kEnd);
            prev_.push_back(i ? base + i - 1 : kEnd);
            piece_.push_back(id);
        }
        for (uint32_t i = 0; i + 1 < n; i++) gain(token_[base + i], token_[base + i + 1], base + i, count);
    }

    void gain(uint32_t left, uint32_t right, uint32_t position, int64_t count) {
        uint64_t p = index_.insert(PairTable::key(left, right), pairs_.size());
        if (p == pairs_.size()) {
            pairs_.emplace_back();
            pairs_.back().left = left;
            pairs_.back().right = right;
        }
        pairs_[p].count += count;
        pairs_[p].positions.push_back(position);
    }

    bool holds(const Pair& pair, uint32_t position) const {
        return token_[position] == pair.left && next_[position] != kEnd && token_[next_[position]] == pair.right;
    }

    uint64_t first_position(uint32_t p) {
        Pair& pair = pairs_[p];
        while (pair.cursor < pair.positions.size() && !holds(pair, pair.positions[pair.cursor])) pair.cursor++;
        return pair.cursor < pair.positions.size() ? pair.positions[pair.cursor] : kEnd;
    }

    uint32_t sort_key(uint32_t token) const { return token < 256 && tie_ == TieBreak::hf ? rank_[token] : token; }

    void push(uint32_t p) {
        const Pair& pair = pairs_[p];
        if (pair.count < 1) return;
        uint64_t key = tie_ == TieBreak::first ? first_position(p)
                                               : PairTable::key(sort_key(pair.left), sort_key(pair.right));
        heap_.push({pair.count, key, p});
    }

    // Replaces every occurrence by the new token, from left to right, and moves the counts of the neighbouring pairs.
    // Every pair that gains contains the new token, so it is new to the heap.
    void apply(uint32_t p, uint32_t token) {
        std::vector<uint32_t> positions = std::move(pairs_[p].positions);
        uint32_t left = pairs_[p].left, right = pairs_[p].right;
        size_t known = pairs_.size();
        for (uint32_t at : positions) {
            if (token_[at] != left || next_[at] == kEnd || token_[next_[at]] != right) continue;
            uint32_t second = next_[at], after = next_[second], before = prev_[at];
            int64_t count = count_[piece_[at]];
            token_[at] = token;
            token_[second] = kEnd;  // no token starts here any more
            next_[at] = after;
            if (before != kEnd) {
                lose(token_[before], left, count);
                gain(token_[before], token, before, count);
            }
            if (after != kEnd) {
                prev_[after] = at;
                lose(right, token_[after], count);
                gain(token, token_[after], at, count);
            }
        }
        pairs_[p].count = 0;
        for (size_t fresh = known; fresh < pairs_.size(); fresh++) push(static_cast<uint32_t>(fresh));
    }

    void lose(uint32_t left, uint32_t right, int64_t count) {
        pairs_[index_.find(PairTable::key(left, right))].count -= count;
    }
};

Trainer::Trainer(const PieceTable& pieces, TieBreak tie_break) : state_(new State(pieces, tie_break)) {}
Trainer::~Trainer() = default;
std::vector<TrainedPair> Trainer::next(size_t n) { return state_->next(n); }

}  // namespace bpe

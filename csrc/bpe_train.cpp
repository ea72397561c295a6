#include "bpe_train.h"

#include <cstdlib>
#include <cstring>
#include <new>
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

// Positions in the text of the pieces, the first few without memory of their own: most pairs are rare.
class Positions {
public:
    Positions() : inside_() {}
    Positions(Positions&& other) noexcept : size_(other.size_), capacity_(other.capacity_) {
        std::memcpy(inside_, other.inside_, sizeof(inside_));
        other.size_ = 0;
        other.capacity_ = kInside;
    }
    Positions(const Positions&) = delete;
    Positions& operator=(const Positions&) = delete;
    ~Positions() {
        if (capacity_ > kInside) std::free(outside_);
    }

    size_t size() const { return size_; }
    const uint32_t* begin() const { return capacity_ > kInside ? outside_ : inside_; }
    const uint32_t* end() const { return begin() + size_; }
    void push_back(uint32_t position) {
        if (size_ == capacity_) grow();
        (capacity_ > kInside ? outside_ : inside_)[size_++] = position;
    }

private:
    static constexpr uint32_t kInside = 2;
    uint32_t size_ = 0, capacity_ = kInside;
    union {
        uint32_t inside_[kInside];
        uint32_t* outside_;
    };

    void grow() {
        const uint32_t wanted = capacity_ < 1u << 30 ? 4 * capacity_ : 0xFFFFFFFFu;
        auto* moved = static_cast<uint32_t*>(std::realloc(capacity_ > kInside ? outside_ : nullptr, wanted * sizeof(uint32_t)));
        if (!moved) throw std::bad_alloc();
        if (capacity_ == kInside) std::memcpy(moved, inside_, sizeof(inside_));
        outside_ = moved;
        capacity_ = wanted;
    }
};

}  // namespace

// The distinct pieces laid end to end, one node a byte. A token lives in the node of its first byte; `next` and `prev`
// link the tokens of a piece, so a merge touches its two neighbours and nothing else.
class Trainer::State {
public:
    State(const PieceTable& pieces, TieBreak tie_break) : tie_(tie_break), rank_(hf_byte_order()) {
        size_t total = 0;
        for (size_t i = 0; i < pieces.size(); i++) total += pieces.piece(i).size();
        if (total >= kEnd) throw std::length_error("Tokenizer.train: the distinct pieces hold 4 GiB or more");
        nodes_.reserve(total);
        count_.reserve(pieces.size());
        for (size_t i = 0; i < pieces.size(); i++) lay(pieces.piece(i), static_cast<uint32_t>(i), pieces.count(i));
    }

    std::vector<TrainedPair> next(size_t n) {
        std::vector<TrainedPair> merges;
        while (merges.size() < n) {
            while (heap_.empty() && floor_ > 1) lower_floor();
            if (heap_.empty()) break;
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
        Positions positions;  // ascending; some may no longer hold the pair
        Pair(uint32_t l, uint32_t r) : left(l), right(r) {}
    };
    struct Node {
        uint32_t token, next, prev, piece;
    };
    struct Candidate {
        int64_t count;
        uint64_t key;  // smaller first
        uint32_t pair;
        bool operator<(const Candidate& o) const { return count != o.count ? count < o.count : key > o.key; }
    };

    TieBreak tie_;
    std::vector<uint32_t> rank_;
    PagedVector<Node> nodes_;
    std::vector<int64_t> count_;
    PagedVector<Pair> pairs_;
    std::vector<uint32_t> cursors_;      // of each pair: positions before it no longer hold it; only for `first`
    PagedVector<uint64_t> index_;        // where a pair is: high half of the hash, place in pairs_ + 1; 0 is free
    std::priority_queue<Candidate> heap_;  // every pair whose count is at least floor_, and some others
    int64_t floor_ = int64_t{1} << 62;
    uint32_t new_token_ = 256;

    void lay(std::string_view piece, uint32_t id, int64_t count) {
        count_.push_back(count);
        uint32_t base = static_cast<uint32_t>(nodes_.size()), n = static_cast<uint32_t>(piece.size());
        for (uint32_t i = 0; i < n; i++)
            nodes_.push_back({static_cast<uint8_t>(piece[i]), i + 1 < n ? base + i + 1 : kEnd, i ? base + i - 1 : kEnd, id});
        for (uint32_t i = 0; i + 1 < n; i++) gain(nodes_[base + i].token, nodes_[base + i + 1].token, base + i, count);
    }

    // The place of a pair in pairs_, to which it is added if it is new.
    uint32_t place_of(uint32_t left, uint32_t right) {
        if (2 * (pairs_.size() + 1) > index_.size()) grow();
        const uint64_t hash = hash_key(PairTable::key(left, right)), mask = index_.size() - 1;
        for (size_t i = hash & mask;; i = (i + 1) & mask) {
            if (!index_[i]) {
                if (pairs_.size() >= kEnd - 1) throw std::length_error("Tokenizer.train: 4 billion distinct pairs");
                pairs_.emplace_back(left, right);
                index_[i] = (hash & ~0xFFFFFFFFull) | pairs_.size();
                return static_cast<uint32_t>(pairs_.size() - 1);
            }
            if ((index_[i] ^ hash) >> 32) continue;
            const uint32_t p = static_cast<uint32_t>(index_[i]) - 1;
            if (pairs_[p].left == left && pairs_[p].right == right) return p;
        }
    }

    void grow() {
        index_ = PagedVector<uint64_t>();
        index_.resize(std::max<size_t>(4096, table_size(2 * pairs_.size())));
        const uint64_t mask = index_.size() - 1;
        for (size_t p = 0; p < pairs_.size(); p++) {
            const uint64_t hash = hash_key(PairTable::key(pairs_[p].left, pairs_[p].right));
            size_t i = hash & mask;
            while (index_[i]) i = (i + 1) & mask;
            index_[i] = (hash & ~0xFFFFFFFFull) | (p + 1);
        }
    }

    void gain(uint32_t left, uint32_t right, uint32_t position, int64_t count) {
        Pair& pair = pairs_[place_of(left, right)];
        pair.count += count;
        pair.positions.push_back(position);
    }

    bool holds(const Pair& pair, uint32_t position) const {
        const Node& node = nodes_[position];
        return node.token == pair.left && node.next != kEnd && nodes_[node.next].token == pair.right;
    }

    uint64_t first_position(uint32_t p) {
        if (cursors_.size() < pairs_.size()) cursors_.resize(pairs_.size());
        const Positions& positions = pairs_[p].positions;
        uint32_t& i = cursors_[p];
        while (i < positions.size() && !holds(pairs_[p], positions.begin()[i])) i++;
        return i < positions.size() ? positions.begin()[i] : kEnd;
    }

    uint32_t sort_key(uint32_t token) const { return token < 256 && tie_ == TieBreak::hf ? rank_[token] : token; }

    void push(uint32_t p) {
        const Pair& pair = pairs_[p];
        if (pair.count < floor_) return;
        uint64_t key = tie_ == TieBreak::first ? first_position(p)
                                               : PairTable::key(sort_key(pair.left), sort_key(pair.right));
        heap_.push({pair.count, key, p});
    }

    // Most pairs are rare and never merge: they wait outside the heap until there are no others.
    void lower_floor() {
        int64_t most = 0;
        for (const Pair& pair : pairs_) most = std::max(most, pair.count);
        floor_ = std::max<int64_t>(1, most / 16);
        for (uint32_t p = 0; p < pairs_.size(); p++) push(p);
    }

    // Replaces every occurrence by the new token, from left to right, and moves the counts of the neighbouring pairs.
    // Every pair that gains contains the new token, so it is new to the heap.
    void apply(uint32_t p, uint32_t token) {
        const Positions positions = std::move(pairs_[p].positions);
        const uint32_t left = pairs_[p].left, right = pairs_[p].right;
        const size_t known = pairs_.size();
        for (const uint32_t *i = positions.begin(), *end = positions.end(); i < end; i++) {
            if (end - i > 16) __builtin_prefetch(&nodes_[i[16]]);
            const uint32_t at = *i;
            Node& node = nodes_[at];
            if (node.token != left || node.next == kEnd || nodes_[node.next].token != right) continue;
            const uint32_t second = node.next, after = nodes_[second].next, before = node.prev;
            const int64_t count = count_[node.piece];
            node.token = token;
            nodes_[second].token = kEnd;  // no token starts here any more
            node.next = after;
            if (before != kEnd) {
                lose(nodes_[before].token, left, count);
                gain(nodes_[before].token, token, before, count);
            }
            if (after != kEnd) {
                nodes_[after].prev = at;
                lose(right, nodes_[after].token, count);
                gain(token, nodes_[after].token, at, count);
            }
        }
        pairs_[p].count = 0;
        for (size_t fresh = known; fresh < pairs_.size(); fresh++) push(static_cast<uint32_t>(fresh));
    }

    void lose(uint32_t left, uint32_t right, int64_t count) {
        pairs_[place_of(left, right)].count -= count;
    }
};

Trainer::Trainer(const PieceTable& pieces, TieBreak tie_break) : state_(new State(pieces, tie_break)) {}
Trainer::~Trainer() = default;
std::vector<TrainedPair> Trainer::next(size_t n) { return state_->next(n); }

}  // namespace bpe

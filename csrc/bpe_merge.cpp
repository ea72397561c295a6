// The merging of one piece: by looking through all pairs while there are few, in windows when there are many.
#include <algorithm>
#include <functional>
#include <stdexcept>

#include "bpe.h"
#include "isa.h"

namespace bpe {
namespace {

constexpr uint32_t kEnd = 0xFFFFFFFFu;
constexpr size_t kWidest = 1024;  // bytes that are merged without a heap
constexpr size_t kSimple = 64;    // bytes of a piece that is merged in one go

}  // namespace

// The merging of at most kLanes bytes, a merge at a time.
//
// A token stays where its first byte was. candidates[i] is the rank of token i and its neighbour, with i in the low bits,
// so that the smallest one names the leftmost pair of the lowest rank; all of them are looked through, always as many,
// which costs less than a branch that is guessed wrong.
template <size_t kLanes>
struct Model::Merging {
    static constexpr int32_t kBits = 6, kNothing = 0x7FFFFFC0;  // and more, for a pair that does not merge
    static_assert(kLanes <= 1 << kBits && RankTable::kLimit << kBits < kNothing);
    uint32_t token[kLanes];
    int32_t candidates[kLanes];
    uint8_t next[kLanes + 1], prev[kLanes + 1];
    size_t n;

    // next_rank: the rank plus one, or 0.
    [[gnu::always_inline]] static int32_t candidate(uint32_t next_rank, size_t i) {
        return static_cast<int32_t>((next_rank - 1) << kBits & 0x7FFFFFFF) | static_cast<int32_t>(i);
    }

    void start(const Model& model, const uint8_t* piece, size_t size) {
        if (size > kLanes) __builtin_unreachable();
        n = size;
        for (size_t i = 0; i < n; i++) {
            token[i] = model.byte_id_[piece[i]];
            next[i] = static_cast<uint8_t>(i + 1);
            prev[i] = static_cast<uint8_t>(i - 1);
        }
        for (size_t i = 0; i + 1 < n; i++)
            candidates[i] = candidate(static_cast<uint32_t>(model.rank_of_bytes_[piece[i] << 8 | piece[i + 1]]) + 1, i);
        for (size_t i = n - 1; i < kLanes; i++) candidates[i] = kNothing;
    }

    // Does the next merge; false if there is none.
    [[gnu::always_inline]] bool step(const Model& model) {
        int32_t lowest = kNothing;
        for (size_t i = 0; i < kLanes; i++) lowest = std::min(lowest, candidates[i]);
        if (lowest >= kNothing) return false;
        const size_t at = static_cast<size_t>(lowest) & ((1u << kBits) - 1), second = next[at], third = next[second];
        token[at] = model.token_of(lowest >> kBits);
        candidates[second] = kNothing;
        next[at] = static_cast<uint8_t>(third);
        prev[third] = static_cast<uint8_t>(at);
        candidates[at] = third < n ? candidate(model.ranks_.find_next(token[at], token[third]), at) : kNothing;
        if (at > 0) candidates[prev[at]] = candidate(model.ranks_.find_next(token[prev[at]], token[at]), prev[at]);
        return true;
    }

    // The ids, of which there are at most n. Returns how many.
    size_t finish(uint32_t* tokens) const {
        size_t count = 0;
        for (size_t i = 0; i < n; i = next[i]) tokens[count++] = token[i];
        return count;
    }
};

// Several at a time: while a step of one waits for memory, another goes on.
template <size_t kLanes>
[[gnu::always_inline]] inline void Model::step_all(Merging<kLanes>* all, size_t count) const {
    for (bool more = true; more;) {
        more = false;
        for (size_t i = 0; i < count; i++) more |= all[i].step(*this);
    }
}

#if defined(__x86_64__)
#define MERGE_AVX2(lanes)                                                                              \
    template <>                                                                                        \
    [[gnu::target("avx2,bmi,bmi2")]] void Model::merge_avx2(Merging<lanes>* all, size_t count) const { \
        step_all(all, count);                                                                          \
    }
MERGE_AVX2(16)
MERGE_AVX2(64)
#endif

template <size_t kLanes>
void Model::merge_all(Merging<kLanes>* all, size_t count) const {
#if defined(__x86_64__)
    static const bool wide = isa() != "portable";
    if (wide) return merge_avx2(all, count);
#endif
    step_all(all, count);
}

template <size_t kLanes>
size_t Model::merge_few(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    Merging<kLanes> merging;
    merging.start(*this, piece, n);
    merge_all(&merging, 1);
    return merging.finish(tokens);
}

template <size_t kLanes>
void Model::merge_group(const std::string_view* pieces, size_t count, uint32_t* tokens, size_t* n_tokens) const {
    Merging<kLanes> all[kGroup];
    for (size_t i = 0; i < count; i++)
        all[i].start(*this, reinterpret_cast<const uint8_t*>(pieces[i].data()), pieces[i].size());
    merge_all(all, count);
    for (size_t i = 0; i < count; i++) n_tokens[i] = all[i].finish(tokens + i * kGroupBytes);
}

// The ids of up to kGroup pieces of at most kGroupBytes each; those of piece i are at tokens + i * kGroupBytes.
void Model::merge_group(const std::string_view* pieces, size_t count, uint32_t* tokens, size_t* n_tokens) const {
    size_t longest = 0;
    for (size_t i = 0; i < count; i++) longest = std::max(longest, pieces[i].size());
    if (longest <= 16) merge_group<16>(pieces, count, tokens, n_tokens);
    else merge_group<64>(pieces, count, tokens, n_tokens);
}

// The same for at most kWidest bytes.
size_t Model::merge_many(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    int32_t ranks[kWidest];  // ranks[i]: of tokens i and i + 1
    for (size_t i = 0; i < n; i++) tokens[i] = byte_id_[piece[i]];
    for (size_t i = 0; i + 1 < n; i++) ranks[i] = rank_of_bytes_[piece[i] << 8 | piece[i + 1]];
    while (n > 1) {
        int32_t lowest = RankTable::kNone;
        for (size_t i = 0; i + 1 < n; i++) lowest = std::min(lowest, ranks[i]);
        if (lowest == RankTable::kNone) break;
        size_t at = 0;
        while (ranks[at] != lowest) at++;
        tokens[at] = token_of(lowest);
        n--;
        std::memmove(tokens + at + 1, tokens + at + 2, (n - at - 1) * sizeof(*tokens));
        std::memmove(ranks + at, ranks + at + 1, (n - at - 1) * sizeof(*ranks));
        if (at > 0) ranks[at - 1] = ranks_.find(tokens[at - 1], tokens[at]);
        if (at + 1 < n) ranks[at] = ranks_.find(tokens[at], tokens[at + 1]);
    }
    return n;
}

size_t Model::merge(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    if (n <= 16) return merge_few<16>(piece, n, tokens);
    if (n <= 64) return merge_few<64>(piece, n, tokens);
    return merge_many(piece, n, tokens);
}

// A list of tokens is the encoding of the text that it spells if every two neighbours are the encoding of what the two
// spell: a first merge across one of the list's boundaries would also happen in the text of the two tokens around it,
// since inside each token the same merges come in the same order. So a long piece is encoded in windows that overlap:
// where two windows agree on a token, the tokens of the first up to it and those of the second from it on belong
// together. Windows at fixed places can be merged several at a time, each step of one while another waits for memory.
class Model::Windows {
public:
    Windows(const Model& model, const uint8_t* piece, size_t n, Ids& out) : model_(model), piece_(piece), n_(n), out_(out) {}

    // False when windows of kWidest bytes agree on nothing; `out` then holds part of the piece.
    bool run() {
        place(0, kWidth);
        now_.swap(next_);
        while (now_.back().end < n_)
            if (!together(now_.back().end - (kWidth - kStride)) && !one_by_one(now_.back().end + kAhead)) return false;
        for (const Placed& p : now_) out_.push_back(p.id);
        return true;
    }

private:
    struct Placed {
        uint32_t id, start, end;  // in the piece, which is shorter than 4 GiB
        bool operator==(const Placed& o) const { return id == o.id && start == o.start && end == o.end; }
    };
    static constexpr size_t kWidth = 64, kStride = 54, kTogether = 4, kAhead = 256;

    const Model& model_;
    const uint8_t* piece_;
    size_t n_;
    Ids& out_;
    std::vector<Placed> now_, next_;  // the tokens that are next to be written, and those of the next window
    std::vector<uint32_t> ids_ = std::vector<uint32_t>(kWidest);

    static Placed placed(uint32_t id, size_t start, size_t end) {
        return {id, static_cast<uint32_t>(start), static_cast<uint32_t>(end)};
    }

    void place(size_t start, size_t width) {
        next_.resize(model_.merge(piece_ + start, std::min(width, n_ - start), ids_.data()));
        for (size_t i = 0; i < next_.size(); i++) {
            const size_t end = start + model_.token(ids_[i]).size();
            next_[i] = placed(ids_[i], start, end);
            start = end;
        }
    }

    void place(size_t start, const Merging<kWidth>& window) {
        next_.resize(window.n);
        size_t count = 0;
        for (size_t i = 0; i < window.n; i = window.next[i])
            next_[count++] = placed(window.token[i], start + i, start + window.next[i]);
        next_.resize(count);
    }

    // Writes what comes before the first token that both windows have, and goes on with the second window. Agreeing on the
    // last token of all says nothing new.
    bool join() {
        size_t i = 0, k = 0;
        while (i < now_.size() && k < next_.size() && !(now_[i] == next_[k])) {
            if (now_[i].end <= next_[k].end) i++;
            else k++;
        }
        if (i == now_.size() || k == next_.size() || next_.back().end <= now_.back().end) return false;
        for (size_t j = 0; j < i; j++) out_.push_back(now_[j].id);
        next_.erase(next_.begin(), next_.begin() + static_cast<ptrdiff_t>(k));
        now_.swap(next_);
        return true;
    }

    bool together(size_t first) {
        Merging<kWidth> windows[kTogether];
        size_t count = 0;
        for (; count < kTogether && first + count * kStride < n_; count++) {
            const size_t start = first + count * kStride;
            windows[count].start(model_, piece_ + start, std::min(kWidth, n_ - start));
        }
        model_.merge_all(windows, count);
        for (size_t w = 0; w < count && now_.back().end < n_; w++) {
            place(first + w * kStride, windows[w]);
            if (!join()) return false;
        }
        return true;
    }

    // Up to a place in the piece, each window starting at a boundary of the one before, wider ones where tokens are long.
    bool one_by_one(size_t until) {
        for (size_t width = kWidth; now_.back().end < std::min(until, n_);) {
            size_t from = now_.size();
            while (from > 0 && now_[from - 1].start + width / 3 > now_.back().end) from--;
            if (from > 1) {
                place(now_[from - 1].start, width);
                if (join()) continue;
            }
            width *= 2;
            if (width > kWidest) return false;
            const Placed front = now_.front();
            place(front.start, width);
            now_.swap(next_);
            if (front.start > 0 && !(now_.front() == front)) return false;  // it no longer joins what is written
        }
        return true;
    }
};

// Tokens in a linked list, candidates in a heap: O(n log n), and right for any piece.
void Model::merge_heap(const uint8_t* piece, size_t n, Ids& out) const {
    if (n >= kEnd) throw std::length_error("Tokenizer.encode: one piece of the text holds 4 GiB or more");
    std::vector<uint32_t> token(n), next(n), prev(n);
    std::vector<int32_t> ranks(n, RankTable::kNone);
    std::vector<uint64_t> heap;  // rank << 32 | position
    heap.reserve(n);
    for (size_t i = 0; i < n; i++) {
        token[i] = byte_id_[piece[i]];
        next[i] = i + 1 < n ? static_cast<uint32_t>(i + 1) : kEnd;
        prev[i] = i ? static_cast<uint32_t>(i - 1) : kEnd;
    }
    auto candidate = [&](uint32_t i) {
        ranks[i] = next[i] == kEnd ? RankTable::kNone : ranks_.find(token[i], token[next[i]]);
        if (ranks[i] != RankTable::kNone) heap.push_back(static_cast<uint64_t>(ranks[i]) << 32 | i);
        return ranks[i] != RankTable::kNone;
    };
    std::greater<uint64_t> later;
    for (uint32_t i = 0; i < n; i++) candidate(i);
    std::make_heap(heap.begin(), heap.end(), later);
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end(), later);
        const uint64_t top = heap.back();
        heap.pop_back();
        const uint32_t i = static_cast<uint32_t>(top);
        if (ranks[i] == RankTable::kNone || static_cast<uint64_t>(ranks[i]) != top >> 32) continue;  // merged since
        const uint32_t second = next[i];
        token[i] = token_of(ranks[i]);
        next[i] = next[second];
        if (next[i] != kEnd) prev[next[i]] = i;
        ranks[second] = RankTable::kNone;
        if (candidate(i)) std::push_heap(heap.begin(), heap.end(), later);
        if (prev[i] != kEnd && candidate(prev[i])) std::push_heap(heap.begin(), heap.end(), later);
    }
    for (uint32_t i = 0; i != kEnd; i = next[i]) out.push_back(token[i]);
}

void Model::encode_uncached(const uint8_t* piece, size_t n, uint32_t whole, Ids& out) const {
    if (whole != TokenTable::kNone) return out.push_back(whole);
    if (n <= kSimple) {
        out.room_for(n);
        out.set_end(out.end() + merge(piece, n, out.end()));
        return;
    }
    const size_t before = out.size();
    if (n < kEnd && Windows(*this, piece, n, out).run()) return;
    out.set_end(out.data() + before);
    merge_heap(piece, n, out);
}

void Model::encode_piece(const uint8_t* piece, size_t n, Ids& out) const {
    if (n) encode_uncached(piece, n, find_whole(piece, n), out);
}

}  // namespace bpe

// The merging of one piece: by looking through all pairs while there are few, in windows when there are many.
#include <algorithm>
#include <functional>
#include <stdexcept>

#include "bpe.h"

namespace bpe {
namespace {

constexpr uint32_t kEnd = 0xFFFFFFFFu;
constexpr size_t kWindow = 64, kWidest = 1024;  // bytes; a window doubles when its tokens are too long for it
constexpr size_t kSimple = 64;                  // up to here a piece is merged in one go

struct Placed {
    uint32_t id;
    size_t start, end;  // in the piece
    bool operator==(const Placed& o) const { return id == o.id && start == o.start && end == o.end; }
};

}  // namespace

// The ids of a piece of at most kLanes bytes; tokens has room for kLanes. Returns how many.
//
// A token stays where its first byte was. candidates[i] is the rank of token i and its neighbour, with i in the low bits,
// so that the smallest one names the leftmost pair of the lowest rank; all of them are looked through, always as many,
// which costs less than a branch that is guessed wrong.
template <size_t kLanes>
size_t Model::merge_few(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    constexpr int32_t kBits = 6, kNothing = 0x7FFFFFFF;
    static_assert(kLanes <= 1 << kBits && RankTable::kLimit << kBits <= 1u << 31);
    if (n > kLanes) __builtin_unreachable();
    uint32_t token[kLanes];
    int32_t candidates[kLanes];
    uint8_t next[kLanes + 1], prev[kLanes + 1];
    auto candidate = [](int32_t rank, size_t i) {
        return rank == RankTable::kNone ? kNothing : rank << kBits | static_cast<int32_t>(i);
    };
    for (size_t i = 0; i < n; i++) {
        token[i] = byte_id_[piece[i]];
        next[i] = static_cast<uint8_t>(i + 1);
        prev[i] = static_cast<uint8_t>(i - 1);
    }
    for (size_t i = 0; i + 1 < n; i++) candidates[i] = candidate(rank_of_bytes_[piece[i] << 8 | piece[i + 1]], i);
    for (size_t i = n - 1; i < kLanes; i++) candidates[i] = kNothing;
    for (;;) {
        int32_t lowest = kNothing;
        for (size_t i = 0; i < kLanes; i++) lowest = std::min(lowest, candidates[i]);
        if (lowest == kNothing) break;
        const size_t at = static_cast<size_t>(lowest) & ((1u << kBits) - 1), second = next[at], third = next[second];
        token[at] = token_of(lowest >> kBits);
        candidates[second] = kNothing;
        next[at] = static_cast<uint8_t>(third);
        prev[third] = static_cast<uint8_t>(at);
        candidates[at] = third < n ? candidate(ranks_.find(token[at], token[third]), at) : kNothing;
        if (at > 0) candidates[prev[at]] = candidate(ranks_.find(token[prev[at]], token[at]), prev[at]);
    }
    size_t count = 0;
    for (size_t i = 0; i < n; i = next[i]) tokens[count++] = token[i];
    return count;
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
    if (n <= 8) return merge_few<8>(piece, n, tokens);
    if (n <= 16) return merge_few<16>(piece, n, tokens);
    if (n <= 32) return merge_few<32>(piece, n, tokens);
    if (n <= 64) return merge_few<64>(piece, n, tokens);
    return merge_many(piece, n, tokens);
}

// A list of tokens is the encoding of the text that it spells if every two neighbours are the encoding of what the two
// spell: a first merge across one of the list's boundaries would also happen in the text of the two tokens around it,
// since inside each token the same merges come in the same order. So a long piece is encoded in windows that overlap:
// where two windows agree on a token, the tokens of the first up to it and those of the second from it on belong
// together. Returns false when windows of kWidest bytes agree on nothing; `out` then holds part of the piece.
bool Model::merge_windows(const uint8_t* piece, size_t n, Ids& out) const {
    std::vector<uint32_t> ids(kWidest);
    std::vector<Placed> now, next;
    auto place = [&](size_t start, size_t width, std::vector<Placed>& placed) {
        placed.clear();
        const size_t count = merge(piece + start, std::min(width, n - start), ids.data());
        for (size_t i = 0; i < count; i++) {
            const size_t end = start + (offsets_[ids[i] + 1] - offsets_[ids[i]]);
            placed.push_back({ids[i], start, end});
            start = end;
        }
    };
    size_t width = kWindow;
    place(0, width, now);
    while (now.back().end < n) {
        // The next window starts at the last boundary that leaves the two a third of the width in common.
        size_t from = now.size();
        while (from > 0 && now[from - 1].start + width / 3 > now.back().end) from--;
        size_t i = now.size(), k = 0;
        if (from > 1) {
            from--;
            place(now[from].start, width, next);
            i = from;
            while (i < now.size() && k < next.size() && !(now[i] == next[k])) {
                if (now[i].end <= next[k].end) i++;
                else k++;
            }
        }
        // Agreeing on the very last token says nothing new, and the windows must advance.
        if (i < now.size() && k < next.size() && next.back().end > now.back().end) {
            for (size_t j = 0; j < i; j++) out.push_back(now[j].id);
            now.assign(next.begin() + static_cast<ptrdiff_t>(k), next.end());
            continue;
        }
        width *= 2;
        if (width > kWidest) return false;
        const Placed first = now.front();
        place(first.start, width, now);
        if (first.start > 0 && !(now.front() == first)) return false;  // it no longer joins what is written
    }
    for (const Placed& p : now) out.push_back(p.id);
    return true;
}

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
    if (merge_windows(piece, n, out)) return;
    out.set_end(out.data() + before);
    merge_heap(piece, n, out);
}

void Model::encode_piece(const uint8_t* piece, size_t n, Ids& out) const {
    if (n) encode_uncached(piece, n, find_whole(piece, n), out);
}

}  // namespace bpe

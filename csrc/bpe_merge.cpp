// The merging of a piece of any size: up to 64 bytes in one go, more in windows, and what defies windows with a heap.
#include "bpe_merge.h"

#include <algorithm>
#include <functional>
#include <stdexcept>

#include "bpe.h"
#include "isa.h"

namespace bpe {
namespace {

constexpr uint32_t kEnd = 0xFFFFFFFFu;
constexpr size_t kWidest = 1024;  // bytes that are merged without a heap

}  // namespace

const MergeFunctions& merge_functions() {
#if defined(__x86_64__)
    static const MergeFunctions& chosen = isa() == "portable" ? merge_portable : isa() == "avx2" ? merge_avx2 : merge_avx512;
    return chosen;
#else
    return merge_portable;
#endif
}

// The tokens of at most kWidest bytes. Returns how many.
size_t Model::merge_many(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    int32_t ranks[kWidest];  // ranks[i]: of tokens i and i + 1
    for (size_t i = 0; i < n; i++) tokens[i] = merges_.byte_id[piece[i]];
    for (size_t i = 0; i + 1 < n; i++) ranks[i] = merges_.pairs.find(tokens[i], tokens[i + 1]);
    while (n > 1) {
        int32_t lowest = RankTable::kNone;
        for (size_t i = 0; i + 1 < n; i++) lowest = std::min(lowest, ranks[i]);
        if (lowest == RankTable::kNone) break;
        size_t at = 0;
        while (ranks[at] != lowest) at++;
        tokens[at] = merges_.token_of(static_cast<uint32_t>(lowest));
        n--;
        std::memmove(tokens + at + 1, tokens + at + 2, (n - at - 1) * sizeof(*tokens));
        std::memmove(ranks + at, ranks + at + 1, (n - at - 1) * sizeof(*ranks));
        if (at > 0) ranks[at - 1] = merges_.pairs.find(tokens[at - 1], tokens[at]);
        if (at + 1 < n) ranks[at] = merges_.pairs.find(tokens[at], tokens[at + 1]);
    }
    return n;
}

// A list of tokens is the encoding of the text that it spells if every two neighbours are the encoding of what the two
// spell: a first merge across one of the list's boundaries would also happen in the text of the two tokens around it,
// since inside each token the same merges come in the same order. So a long piece is encoded in windows that overlap:
// where two windows agree on a token, the tokens of the first up to it and those of the second from it on belong
// together. Windows at fixed places can be merged several at a time.
class Model::Windows {
public:
    Windows(const Model& model, const uint8_t* piece, size_t n, Ids& out)
        : model_(model), piece_(piece), n_(n), out_(out), before_(out.size()) {}

    // False when windows of kWidest bytes agree on nothing; `out` then holds part of the piece.
    bool run() {
        windows_[0].bytes = piece_;
        windows_[0].n = kWidth;
        functions_.several(model_.merges_, windows_, 1);
        append(0, windows_[0], 0);
        while (end_ < n_)
            if (!together() && !widened(end_ + kAhead)) return false;
        return true;
    }

private:
    static constexpr size_t kWidth = Window::kWidth, kOverlap = 10, kStride = kWidth - kOverlap, kTogether = 16, kAhead = 256;
    struct Placed {
        uint32_t id;
        size_t start, end;  // in the piece
    };

    const Model& model_;
    const MergeFunctions& functions_ = merge_functions();
    const uint8_t* piece_;
    size_t n_;
    Ids& out_;
    size_t before_, end_ = 0;  // what out_ held before, and up to where in the piece it goes
    Window windows_[kTogether];

    static uint64_t below(size_t i) { return i < 64 ? (1ull << i) - 1 : ~0ull; }

    // Puts the tokens of a window at `start` in place, those from byte `from` of it on.
    void append(size_t start, const Window& window, size_t from) {
        out_.room_for(kWidth + 16);
        out_.set_end(functions_.put(window, window.starts & ~below(from), out_.end()));
        end_ = start + window.n;
    }

    // Where the tokens in the last kOverlap bytes of what is written start, and their end.
    uint64_t last_starts() const {
        uint64_t found = 1ull << kOverlap;
        for (size_t i = out_.size(), at = kOverlap; i-- > before_;) {
            const size_t size = model_.token(out_.data()[i]).size();
            if (size > at) break;
            found |= 1ull << (at -= size);
        }
        return found;
    }

    // The first token that two lists of boundaries have in common, or kOverlap.
    static size_t common(uint64_t first, uint64_t second) {
        const uint64_t both = first & second, either = first | second;
        for (uint64_t rest = both; rest; rest &= rest - 1) {
            const uint64_t later = either & ~1ull << __builtin_ctzll(rest);
            if (both & (later & -later)) return static_cast<size_t>(__builtin_ctzll(rest));
        }
        return kOverlap;
    }

    // Goes on with windows at fixed places; false where one does not agree with what is written.
    bool together() {
        const size_t first = end_ - kOverlap;
        size_t count = 0;
        for (; count < kTogether && (count ? first + (count - 1) * kStride + kWidth < n_ : true); count++) {
            windows_[count].bytes = piece_ + first + count * kStride;
            windows_[count].n = std::min(kWidth, n_ - first - count * kStride);
        }
        functions_.several(model_.merges_, windows_, count);
        uint64_t written = last_starts();
        for (size_t w = 0; w < count; w++) {
            const Window& window = windows_[w];
            const size_t from = common(written, (window.starts | (below(window.n) + 1)) & below(kOverlap + 1));
            if (from == kOverlap) return false;
            const uint64_t replaced = written & ~below(from) & below(kOverlap);
            out_.set_end(out_.end() - __builtin_popcountll(replaced));
            append(first + w * kStride, window, from);
            written = window.starts >> kStride | 1ull << kOverlap;
        }
        return true;
    }

    // The same up to a place in the piece, each window starting where a token does, wider ones where tokens are long.
    bool widened(size_t until) {
        std::vector<uint32_t> ids(kWidest);
        std::vector<Placed> written, next;
        for (size_t width = kWidth; end_ < std::min(until, n_);) {
            written.clear();
            size_t start = end_;
            for (size_t i = out_.size(); i > before_ && start + width / 3 > end_;) {
                const uint32_t id = out_.data()[--i];
                const size_t size = model_.token(id).size();
                written.push_back({id, start - size, start});
                start -= size;
            }
            const size_t stop = std::min(n_, start + width), count = model_.merge(piece_ + start, stop - start, ids.data());
            next.clear();
            for (size_t i = 0, at = start; i < count; at = next[i++].end)
                next.push_back({ids[i], at, at + model_.token(ids[i]).size()});
            std::reverse(written.begin(), written.end());
            if (stop > end_ && join(written, next, start == 0)) continue;
            width *= 2;
            if (width > kWidest) return false;
        }
        return true;
    }

    // Replaces the written tokens from the first on that `next` has too; all of them where `next` begins the piece.
    bool join(const std::vector<Placed>& written, const std::vector<Placed>& next, bool all) {
        size_t i = 0, k = 0;
        while (!all && i < written.size() && k < next.size() && (written[i].start != next[k].start || written[i].end != next[k].end)) {
            if (written[i].end <= next[k].end) i++;
            else k++;
        }
        if (i == written.size() || k == next.size()) return false;
        out_.set_end(out_.end() - (written.size() - i));
        for (; k < next.size(); k++) out_.push_back(next[k].id);
        end_ = next.back().end;
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
        token[i] = merges_.byte_id[piece[i]];
        next[i] = i + 1 < n ? static_cast<uint32_t>(i + 1) : kEnd;
        prev[i] = i ? static_cast<uint32_t>(i - 1) : kEnd;
    }
    auto candidate = [&](uint32_t i) {
        ranks[i] = next[i] == kEnd ? RankTable::kNone : merges_.pairs.find(token[i], token[next[i]]);
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
        token[i] = merges_.token_of(static_cast<uint32_t>(ranks[i]));
        next[i] = next[second];
        if (next[i] != kEnd) prev[next[i]] = i;
        ranks[second] = RankTable::kNone;
        if (candidate(i)) std::push_heap(heap.begin(), heap.end(), later);
        if (prev[i] != kEnd && candidate(prev[i])) std::push_heap(heap.begin(), heap.end(), later);
    }
    for (uint32_t i = 0; i != kEnd; i = next[i]) out.push_back(token[i]);
}

size_t Model::merge(const uint8_t* piece, size_t n, uint32_t* tokens) const {
    return n <= Window::kWidth ? merge_functions().one(merges_, piece, n, tokens) : merge_many(piece, n, tokens);
}

void Model::encode_uncached(const uint8_t* piece, size_t n, uint32_t whole, Ids& out) const {
    if (whole != TokenTable::kNone) return out.push_back(whole);
    if (n <= Window::kWidth) {
        out.room_for(n);
        out.set_end(out.end() + merge(piece, n, out.end()));
        return;
    }
    const size_t before = out.size();
    if (Windows(*this, piece, n, out).run()) return;
    out.set_end(out.data() + before);
    merge_heap(piece, n, out);
}

void Model::encode_piece(const uint8_t* piece, size_t n, Ids& out) const {
    if (n) encode_uncached(piece, n, find_whole(piece, n, PieceKey::of(piece, n)), out);
}

}  // namespace bpe

#include "bpe_count.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <stdexcept>

#include "bpe_hash.h"
#include "workers.h"

namespace bpe {
namespace {

const uint8_t* data(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

}  // namespace

std::string_view PieceTable::piece(size_t i) const {
    const Entry& e = entries_[i];
    const size_t n = e.high >> 56;
    if (n <= PieceKey::kShort) return {reinterpret_cast<const char*>(&e), n};
    return {arena_.data() + e.low, static_cast<size_t>(~e.high)};
}

bool PieceTable::same(const Entry& e, const PieceKey& key, std::string_view piece) const {
    if (e.high != key.high) return false;
    return key.is_short() ? e.low == key.low : !std::memcmp(arena_.data() + e.low, piece.data(), piece.size());
}

void PieceTable::grow() {
    slots_.assign(std::max<size_t>(4096, slots_.size() * 2), 0);
    const size_t mask = slots_.size() - 1;
    for (size_t e = 0; e < entries_.size(); e++) {
        std::string_view p = piece(e);
        const uint64_t hash = PieceKey::of(data(p), p.size()).hash;
        size_t i = hash & mask;
        while (slots_[i]) i = (i + 1) & mask;
        slots_[i] = (hash & ~0xFFFFFFFFull) | (e + 1);
    }
}

void PieceTable::count_key(const PieceKey& key, std::string_view piece, int64_t count, uint64_t first) {
    if (2 * (entries_.size() + 1) > slots_.size()) grow();
    const size_t mask = slots_.size() - 1;
    for (size_t i = key.hash & mask;; i = (i + 1) & mask) {
        if (!slots_[i]) {
            if (entries_.size() >= 0xFFFFFFFEu) throw std::length_error("Tokenizer.train: 4 billion distinct pieces");
            entries_.push_back({key.is_short() ? key.low : arena_.size(), key.high, count, first});
            if (!key.is_short()) arena_.append(piece);
            slots_[i] = (key.hash & ~0xFFFFFFFFull) | entries_.size();
            return;
        }
        if ((slots_[i] ^ key.hash) >> 32) continue;
        Entry& e = entries_[static_cast<uint32_t>(slots_[i]) - 1];
        if (!same(e, key, piece)) continue;
        e.count += count;
        e.first = std::min(e.first, first);
        return;
    }
}

void PieceTable::add_piece(std::string_view piece, int64_t count, uint64_t first) {
    count_key(PieceKey::of(data(piece), piece.size()), piece, count, first);
}

// As in the encoder: first where each of the next pieces would be, then what is there.
void PieceTable::add(pretokenize::Pattern pattern, std::string_view text, uint64_t place) {
    constexpr size_t kRoom = pretokenize::Splitter::kRoom;
    pretokenize::Splitter splitter(pattern, text);
    size_t ends[kRoom], start = 0;
    PieceKey keys[kRoom];
    KeyMaker maker(data(text), text.size());
    while (size_t count = splitter.next(ends)) {
        if (2 * (entries_.size() + count) > slots_.size()) grow();
        const uint64_t* slots = slots_.data();
        const size_t mask = slots_.size() - 1;
        for (size_t i = 0; i < count; i++) {
            maker.make(ends[i], keys[i]);
            __builtin_prefetch(slots + (keys[i].hash & mask));
        }
        for (size_t i = 0; i < count; start = ends[i++])
            count_key(keys[i], text.substr(start, ends[i] - start), 1, place + start);
    }
}

void PieceTable::add_table(const PieceTable& other) {
    for (size_t i = 0; i < other.size(); i++) add_piece(other.piece(i), other.entries_[i].count, other.entries_[i].first);
}

void PieceTable::finish() {
    slots_ = {};
    std::sort(entries_.begin(), entries_.end(), [](const Entry& a, const Entry& b) { return a.first < b.first; });
}

// Every thread takes the next stretch of text when it is done with one.
void PieceCounter::add(pretokenize::Pattern pattern, const std::vector<std::string_view>& texts) {
    constexpr size_t kStretch = 1 << 18;
    const auto spans = pretokenize::cut_texts(texts, kStretch);
    std::vector<uint64_t> places;
    for (const auto& span : spans) {
        places.push_back(place_);
        place_ += span.text.size();
    }
    std::atomic<size_t> next{0};
    const size_t n_workers = std::min(tables_.size(), std::max<size_t>(spans.size(), 1));
    run_workers(n_workers, [&](size_t w) {
        for (size_t i; (i = next++) < spans.size();) tables_[w].add(pattern, spans[i].text, places[i]);
    });
}

void PieceCounter::add_pieces(const std::vector<std::string_view>& pieces) {
    for (std::string_view p : pieces) {
        tables_[0].add_piece(p, 1, place_);
        place_ += p.size();
    }
}

PieceTable PieceCounter::finish() {
    for (size_t i = 1; i < tables_.size(); i++) {
        tables_[0].add_table(tables_[i]);
        tables_[i] = PieceTable();
    }
    tables_[0].finish();
    return std::move(tables_[0]);
}

}  // namespace bpe

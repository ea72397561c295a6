#include "bpe.h"

#include <algorithm>
#include <numeric>
#include <stdexcept>

#include "workers.h"

namespace bpe {

using pretokenize::Pattern;

namespace {

const uint8_t* data(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

}  // namespace

// ---------------------------------------------------------------- caches

Model::Lease::Lease(const Model& model) : model_(model), cache_(nullptr) {
    for (auto& place : model.idle_)
        if ((cache_ = place.exchange(nullptr))) return;
    cache_ = new PieceCache;
}

Model::Lease::~Lease() {
    cache_->ids.shrink(PieceCache::kKept);
    cache_->bytes.shrink(4 * PieceCache::kKept);
    for (auto& place : model_.idle_) {
        PieceCache* none = nullptr;
        if (place.compare_exchange_strong(none, cache_)) return;
    }
    delete cache_;
}

// ---------------------------------------------------------------- the vocabulary

Model::Model(const std::vector<std::string_view>& tokens, std::vector<Kind> kinds, const std::vector<Merge>& merges,
             bool by_bytes, bool whole_piece_first)
    : spelled_(tokens.size()), whole_(tokens.size()), whole_piece_first_(whole_piece_first),
      merges_(by_bytes ? tokens.size() : merges.size()) {
    const size_t n = tokens.size();
    if (n >= RankTable::kLimit || merges.size() >= RankTable::kLimit)
        throw std::invalid_argument("Tokenizer: expected fewer than 2,097,152 tokens and merges, got " +
                                    std::to_string(std::max(n, merges.size())));
    size_t total = 0;
    for (std::string_view t : tokens) total += t.size();
    if (total >= 0xFFFFFFFFu) throw std::invalid_argument("Tokenizer: expected less than 4 GiB of tokens");
    arena_.reserve(total);
    std::fill(std::begin(merges_.byte_id), std::end(merges_.byte_id), TokenTable::kNone);
    for (uint32_t id = 0; id < n; id++) {
        std::string_view t = tokens[id];
        offsets_.push_back(static_cast<uint32_t>(arena_.size()));
        arena_.append(t);
        spelled_[id].size = kinds[id] == Kind::absent ? kAbsent : t.size() > 15 ? kLong : static_cast<uint8_t>(t.size());
        std::memcpy(spelled_[id].bytes, t.data(), std::min<size_t>(t.size(), 15));
        if (kinds[id] != Kind::ordinary) continue;
        if (t.size() == 1) merges_.byte_id[static_cast<uint8_t>(t[0])] = id;
        if (!whole_piece_first_ || t.empty()) continue;
        const PieceKey key = PieceKey::of(data(t), t.size());
        const uint32_t same = find_whole(data(t), t.size(), key);
        if (same != TokenTable::kNone)
            throw std::invalid_argument("Tokenizer: expected distinct tokens, got the same bytes for ids " + std::to_string(same) +
                                        " and " + std::to_string(id));
        whole_.insert(key.hash, id);
    }
    offsets_.push_back(static_cast<uint32_t>(arena_.size()));
    for (int b = 0; b < 256; b++)
        if (merges_.byte_id[b] == TokenTable::kNone)
            throw std::invalid_argument("Tokenizer: expected a token for every byte, got none for " + std::to_string(b));
    if (by_bytes) find_merges(kinds);
    else add_merges(merges);
}

Model::~Model() {
    for (auto& place : idle_) delete place.load();
}

void Model::add_merges(const std::vector<Merge>& merges) {
    bool rising = true;  // then the token's id itself can stand for the rank
    for (size_t i = 0; i < merges.size(); i++) {
        const Merge& m = merges[i];
        if (m.left >= size() || m.right >= size() || m.token >= size() ||
            std::string(token(m.left)).append(token(m.right)) != token(m.token))
            throw std::invalid_argument("Tokenizer: expected merges whose two tokens concatenate to a token, got ids " +
                                        std::to_string(m.left) + " and " + std::to_string(m.right));
        rising = rising && (i == 0 || merges[i - 1].token < m.token);
    }
    for (size_t i = 0; i < merges.size() && !rising; i++) merges_.token_of_rank.push_back(merges[i].token);
    for (size_t i = merges.size(); i-- > 0;) {  // of a pair listed twice the last place counts, as in Hugging Face's map
        const Merge& m = merges[i];
        const uint32_t rank = rising ? m.token : static_cast<uint32_t>(i);
        std::string_view left = token(m.left), right = token(m.right);
        if (left.size() == 1 && right.size() == 1 && merges_.byte_id[data(left)[0]] == m.left && merges_.byte_id[data(right)[0]] == m.right)
            merges_.add_bytes(data(left)[0], data(right)[0], rank);
        merges_.pairs.insert(m.left, m.right, rank);
    }
}

// Ranks by bytes: for each token, shorter ones first, the two tokens that its bytes come to before they become it.
void Model::find_merges(const std::vector<Kind>& kinds) {
    std::vector<std::vector<uint32_t>> by_size;
    for (uint32_t id = 0; id < size(); id++) {
        if (kinds[id] != Kind::ordinary) continue;
        if (token(id).size() >= by_size.size()) by_size.resize(token(id).size() + 1);
        by_size[token(id).size()].push_back(id);
    }
    auto add = [&](uint32_t id, const uint32_t* found, size_t count) {
        if (count != 2) return;  // merging never makes this token
        merges_.pairs.insert(found[0], found[1], id);
        std::string_view t = token(id);
        if (t.size() == 2) merges_.add_bytes(data(t)[0], data(t)[1], id);
    };
    constexpr size_t kGroup = 64;
    std::vector<Window> windows(kGroup);
    Ids parts;
    for (size_t n = 2; n < by_size.size(); n++) {
        const std::vector<uint32_t>& ids = by_size[n];
        for (size_t i = 0; i < ids.size() && n > Window::kWidth; i++) {
            parts.clear();
            encode_uncached(data(token(ids[i])), n, TokenTable::kNone, parts);
            add(ids[i], parts.data(), parts.size());
        }
        for (size_t i = 0; i < ids.size() && n <= Window::kWidth; i += kGroup) {
            const size_t count = std::min(kGroup, ids.size() - i);
            for (size_t k = 0; k < count; k++) windows[k].bytes = data(token(ids[i + k])), windows[k].n = n;
            merge_functions().several(merges_, windows.data(), count);
            for (size_t k = 0; k < count; k++) {
                uint32_t tokens[Window::kWidth + 16];
                add(ids[i + k], tokens, static_cast<size_t>(merge_functions().put(windows[k], windows[k].starts, tokens) - tokens));
            }
        }
    }
}

uint32_t Model::find_whole(const uint8_t* piece, size_t n, const PieceKey& key) const {
    if (!whole_piece_first_) return TokenTable::kNone;
    return whole_.find(key.hash, [&](uint32_t id) {
        uint64_t words[2];
        std::memcpy(words, &spelled_[id], sizeof(words));
        if (key.is_short()) return words[0] == key.low && words[1] == key.high;
        return offsets_[id + 1] - offsets_[id] == n && !std::memcmp(arena_.data() + offsets_[id], piece, n);
    });
}

// ---------------------------------------------------------------- texts

// A piece whose ids are not just to be copied from one of its first slots; `slot` is the second, or one that has it.
void Model::encode_missed(const uint8_t* piece, size_t n, const PieceKey& key, const PieceCache::Slot* slot,
                          PieceCache& cache, Ids& out) const {
    size_t n_ids = 0;
    if (key.is_short()) {
        if (!slot->is(key)) slot = slot->high ? cache.find_further(key) : nullptr;
        if (slot) {
            const uint32_t* ids = cache.ids_of(*slot, n_ids);
            out.append(ids, n_ids);
            out.data()[out.size() - n_ids] &= PieceCache::kIdBits;
            return;
        }
    }
    if (const uint32_t* known = key.is_short() ? nullptr : cache.find_long(piece, n, key, n_ids))
        return out.append(known, n_ids);
    const size_t before = out.size();
    encode_uncached(piece, n, find_whole(piece, n, key), out);
    keep(piece, n, key, out.data() + before, out.size() - before, cache);
    cache.missed++;
}

// Puts the pieces that the cache does not have there, several at a time, so that waiting for memory overlaps.
size_t Model::learn(const uint8_t* text, size_t begin, const size_t* ends, const PieceKey* keys, size_t count,
                    PieceCache& cache) const {
    struct Missing {
        const uint8_t* piece;
        size_t n;
        const PieceKey* key;
    };
    constexpr size_t kGroup = 8;
    Missing missing[pretokenize::Splitter::kRoom];
    Window windows[kGroup];
    size_t missed = 0, left = 0;
    for (size_t i = 0; i < count; begin = ends[i++]) {
        const size_t n = ends[i] - begin;
        size_t n_ids;
        if (keys[i].is_short() ? cache.find(keys[i]) != nullptr
                               : n > Window::kWidth || cache.find_long(text + begin, n, keys[i], n_ids) != nullptr)
            continue;
        missing[missed++] = {text + begin, n, &keys[i]};
        if (whole_piece_first_) whole_.prefetch(keys[i].hash);
    }
    for (size_t m = 0; m < missed; m++) {
        const Missing& piece = missing[m];
        const uint32_t whole = find_whole(piece.piece, piece.n, *piece.key);
        if (whole == TokenTable::kNone) missing[left++] = piece;
        else keep(piece.piece, piece.n, *piece.key, &whole, 1, cache);
    }
    std::partition(missing, missing + left, [](const Missing& piece) { return piece.n <= 16; });
    for (size_t first = 0; first < left; first += kGroup) {
        const size_t group = std::min(kGroup, left - first);
        for (size_t k = 0; k < group; k++) windows[k].bytes = missing[first + k].piece, windows[k].n = missing[first + k].n;
        merge_functions().several(merges_, windows, group);
        for (size_t k = 0; k < group; k++) {
            uint32_t ids[Window::kWidth + 16];
            const Missing& piece = missing[first + k];
            const uint32_t* end = merge_functions().put(windows[k], windows[k].starts, ids);
            keep(piece.piece, piece.n, *piece.key, ids, static_cast<size_t>(end - ids), cache);
        }
    }
    return missed;
}

void Model::keep(const uint8_t* piece, size_t n, const PieceKey& key, const uint32_t* ids, size_t n_ids, PieceCache& cache) {
    if (key.is_short()) cache.keep(key, ids, n_ids);
    else cache.keep_long(piece, n, key, ids, n_ids);
}

// The keys go some pieces ahead: where each is in the cache is fetched while others are read. Where many were missing
// lately, all keys of the next pieces are made at once and those that are missing are learnt first.
void Model::encode_text(Pattern pattern, std::string_view text, PieceCache& cache, Ids& out) const {
    constexpr size_t kRoom = pretokenize::Splitter::kRoom, kMany = 4, kAhead = 48, kSoon = 16;
    pretokenize::Splitter splitter(pattern, text);
    size_t ends[kRoom], start = 0;
    PieceKey keys[kRoom];
    const uint8_t* s = data(text);
    KeyMaker maker(s, text.size());
    while (size_t count = splitter.next(ends)) {
        cache.make_room(count);
        const PieceCache::Places places = cache.places();
        const bool cold = cache.missed >= kMany;
        size_t made = 0;
        auto make = [&]() __attribute__((always_inline)) {
            PieceKey& key = keys[made];
            if (maker.make(ends[made++], key)) __builtin_prefetch(places.bucket(key.hash));
            else __builtin_prefetch(places.of_long(key.hash));
        };
        while (made < (cold ? count : std::min(count, kAhead))) make();
        cache.missed = cold ? learn(s, start, ends, keys, count, cache) : 0;
        out.room_for(4 * count);
        uint32_t* to = out.end();
        for (size_t i = 0; i < count; start = ends[i++]) {
            if (made < count) make();
            if (i + kSoon < count && __builtin_expect(!keys[i + kSoon].is_short(), 0)) places.fetch_long(keys[i + kSoon].hash);
            const PieceKey& key = keys[i];
            const PieceCache::Slot* slot = places.bucket(key.hash);
            slot += !slot->is(key);
            const uint32_t first = slot->ids[0];
            if (__builtin_expect(slot->is(key) && first < PieceCache::kElsewhere << 28, 1)) {
                std::memcpy(to, slot->ids, sizeof(slot->ids));
                *to = first & PieceCache::kIdBits;
                to += first >> 28;
                continue;
            }
            out.set_end(to);
            encode_missed(s + start, ends[i] - start, key, slot, cache, out);
            out.room_for(4 * (count - i));
            to = out.end();
        }
        out.set_end(to);
    }
}

void Model::encode(Pattern pattern, std::string_view text, const std::vector<Special>& specials, PieceCache& cache,
                   Ids& out) const {
    std::vector<size_t> found(specials.size(), 0);  // where each special occurs next, at or after `start`
    for (size_t i = 0; i < specials.size(); i++) found[i] = text.find(specials[i].text);
    size_t start = 0;
    while (!specials.empty()) {
        size_t best = specials.size();
        for (size_t i = 0; i < specials.size(); i++) {
            if (found[i] < start) found[i] = text.find(specials[i].text, start);
            if (found[i] == std::string_view::npos) continue;
            if (best == specials.size() || found[i] < found[best] ||
                (found[i] == found[best] && specials[i].text.size() > specials[best].text.size()))
                best = i;
        }
        if (best == specials.size()) break;
        encode_text(pattern, text.substr(start, found[best] - start), cache, out);
        out.push_back(specials[best].id);
        start = found[best] + specials[best].text.size();
    }
    encode_text(pattern, text.substr(start), cache, out);
}

// Long texts are cut at safe places, short ones lie together: each job is about kJobBytes, and has ids of its own.
Ids Model::encode_batch(Pattern pattern, const std::vector<std::string_view>& texts, int threads,
                        std::vector<int64_t>& offsets) const {
    constexpr size_t kJobBytes = 1 << 18;
    offsets.assign(texts.size() + 1, 0);
    size_t total = 0;
    for (std::string_view t : texts) total += t.size();
    if (threads <= 1 || total < 2 * kJobBytes) {
        Lease cache(*this);
        Ids ids;
        ids.room_for(total / 3 + 4 * pretokenize::Splitter::kRoom);
        for (size_t i = 0; i < texts.size(); i++) {
            encode_text(pattern, texts[i], *cache, ids);
            offsets[i + 1] = static_cast<int64_t>(ids.size());
        }
        return ids;
    }
    std::vector<pretokenize::Span> spans = pretokenize::cut_texts(texts, kJobBytes);
    std::vector<int64_t> n_ids(spans.size());
    std::vector<size_t> jobs;  // the first span of each job, then the end
    size_t filled = kJobBytes;
    for (size_t s = 0; s < spans.size(); s++) {
        if (filled >= kJobBytes) {
            jobs.push_back(s);
            filled = 0;
        }
        filled += spans[s].text.size();
    }
    jobs.push_back(spans.size());

    std::vector<Ids> parts(jobs.size() - 1);
    std::atomic<size_t> next_job{0};
    const size_t n_workers = std::min<size_t>(static_cast<size_t>(threads), std::max<size_t>(parts.size(), 1));
    run_workers(n_workers, [&](size_t) {
        Lease cache(*this);
        for (size_t j; (j = next_job++) < parts.size();) {
            Ids& out = parts[j];
            for (size_t s = jobs[j]; s < jobs[j + 1]; s++) {
                size_t before = out.size();
                encode_text(pattern, spans[s].text, *cache, out);
                n_ids[s] = static_cast<int64_t>(out.size() - before);
            }
        }
    });

    for (size_t s = 0; s < spans.size(); s++) offsets[spans[s].owner + 1] += n_ids[s];
    std::partial_sum(offsets.begin(), offsets.end(), offsets.begin());
    Ids ids;
    ids.room_for(static_cast<size_t>(offsets.back()));
    for (const Ids& part : parts) ids.append(part.data(), part.size());
    return ids;
}

// Sixteen bytes are written for every short token; the next one writes over what was too much.
template <class Id>
void Model::decode(const Id* ids, size_t n, Bytes& out) const {
    constexpr size_t kBlock = 4096;
    for (size_t first = 0; first < n; first += kBlock) {
        out.room_for(16 * kBlock);
        char* to = out.end();
        for (size_t i = first; i < std::min(n, first + kBlock); i++) {
            const bool inside = ids[i] >= 0 && static_cast<uint64_t>(ids[i]) < spelled_.size();
            const Spelled* s = inside ? &spelled_[static_cast<size_t>(ids[i])] : nullptr;
            if (!s || s->size == kAbsent)
                throw std::out_of_range("Tokenizer.decode: expected ids of the vocabulary, got " + std::to_string(ids[i]));
            if (s->size != kLong) {
                std::memcpy(to, s, 16);
                to += s->size;
                continue;
            }
            std::string_view t = token(static_cast<uint32_t>(ids[i]));
            out.set_end(to);
            out.append(t.data(), t.size());
            out.room_for(16 * kBlock);
            to = out.end();
        }
        out.set_end(to);
    }
}

template void Model::decode(const int32_t*, size_t, Bytes&) const;
template void Model::decode(const int64_t*, size_t, Bytes&) const;

}  // namespace bpe

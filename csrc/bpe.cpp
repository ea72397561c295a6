#include "bpe.h"

#include <algorithm>
#include <atomic>
#include <exception>
#include <functional>
#include <stdexcept>
#include <thread>

namespace bpe {

using pretokenize::Pattern;

namespace {

constexpr uint32_t kEnd = 0xFFFFFFFFu;
constexpr size_t kShort = 48;  // up to here, looking for the lowest rank by a scan beats a heap

const uint8_t* data(std::string_view s) { return reinterpret_cast<const uint8_t*>(s.data()); }

}  // namespace

// A direct-mapped memory of pieces of up to 15 bytes: a new piece overwrites what its slot held, so the size is fixed.
struct Model::Cache {
    static constexpr size_t kSlots = 1 << 15, kIds = 11, kBytes = 15;
    struct Slot {
        uint64_t low = 0, high = 0;  // the piece, then its size in the last byte; no piece has size 0
        uint32_t n = 0;
        uint32_t ids[kIds];
    };
    std::vector<Slot> slots = std::vector<Slot>(kSlots);

    static void key_of(const uint8_t* piece, size_t n, uint64_t& low, uint64_t& high) {
        uint8_t key[16] = {};
        std::memcpy(key, piece, n);
        key[15] = static_cast<uint8_t>(n);
        std::memcpy(&low, key, 8);
        std::memcpy(&high, key + 8, 8);
    }
};

// Caches outlive the calls: each call borrows one and gives it back.
struct Model::Lease {
    const Model& model;
    std::unique_ptr<Cache> cache;

    explicit Lease(const Model& m) : model(m) {
        {
            std::lock_guard<std::mutex> hold(m.idle_lock_);
            if (!m.idle_.empty()) {
                cache = std::move(m.idle_.back());
                m.idle_.pop_back();
            }
        }
        if (!cache) cache = std::make_unique<Cache>();
    }
    ~Lease() {
        std::lock_guard<std::mutex> hold(model.idle_lock_);
        model.idle_.push_back(std::move(cache));
    }
};

Model::Model(std::vector<std::string> bytes, std::vector<Kind> kinds, const std::vector<Merge>& merges,
             bool whole_piece_first)
    : bytes_(std::move(bytes)), kinds_(std::move(kinds)), whole_piece_first_(whole_piece_first), pairs_(merges.size()) {
    std::fill(std::begin(byte_id_), std::end(byte_id_), kEnd);
    for (uint32_t id = 0; id < bytes_.size(); id++) {
        if (kinds_[id] != Kind::ordinary) continue;
        if (bytes_[id].size() == 1) byte_id_[static_cast<uint8_t>(bytes_[id][0])] = id;
        if (whole_piece_first_) whole_.emplace(bytes_[id], id);
    }
    for (int b = 0; b < 256; b++)
        if (byte_id_[b] == kEnd)
            throw std::invalid_argument("Tokenizer: expected a token for every byte, got none for " + std::to_string(b));
    for (const Merge& m : merges) {
        size_t n = bytes_.size();
        if (m.left >= n || m.right >= n || m.token >= n || bytes_[m.left] + bytes_[m.right] != bytes_[m.token])
            throw std::invalid_argument("Tokenizer: expected merges whose two tokens concatenate to a token, got ids " +
                                        std::to_string(m.left) + " and " + std::to_string(m.right));
        // A pair listed twice keeps its first rank.
        pairs_.insert(PairTable::key(m.left, m.right), static_cast<uint64_t>(m.rank) << 32 | m.token);
    }
}

Model::~Model() = default;

std::vector<Merge> Model::all_splits(const std::vector<std::string>& bytes, const std::vector<Kind>& kinds) {
    std::unordered_map<std::string_view, uint32_t> ids;
    for (uint32_t id = 0; id < bytes.size(); id++)
        if (kinds[id] == Kind::ordinary) ids.emplace(bytes[id], id);
    std::vector<Merge> merges;
    for (uint32_t id = 0; id < bytes.size(); id++) {
        if (kinds[id] != Kind::ordinary) continue;
        std::string_view token = bytes[id];
        for (size_t cut = 1; cut < token.size(); cut++) {
            auto left = ids.find(token.substr(0, cut)), right = ids.find(token.substr(cut));
            if (left != ids.end() && right != ids.end()) merges.push_back({left->second, right->second, id, id});
        }
    }
    return merges;
}

// ---------------------------------------------------------------- pieces

void Model::encode_piece(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const {
    if (n == 0) return;
    if (whole_piece_first_) {
        auto hit = whole_.find({reinterpret_cast<const char*>(piece), n});
        if (hit != whole_.end()) {
            out.push_back(hit->second);
            return;
        }
    }
    if (n == 1) out.push_back(byte_id_[piece[0]]);
    else if (n <= kShort) merge_short(piece, n, out);
    else merge_long(piece, n, out);
}

// pair[i] is what tokens i and i + 1 merge to (rank << 32 | token), all ones if nothing: its minimum is the next merge.
void Model::merge_short(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const {
    uint32_t token[kShort];
    uint64_t pair[kShort];
    auto look = [&](size_t i) { return pairs_.find(PairTable::key(token[i], token[i + 1])); };
    for (size_t i = 0; i < n; i++) token[i] = byte_id_[piece[i]];
    for (size_t i = 0; i + 1 < n; i++) pair[i] = look(i);
    while (n > 1) {
        size_t best = 0;
        for (size_t i = 1; i + 1 < n; i++)
            if (pair[i] >> 32 < pair[best] >> 32) best = i;
        if (pair[best] == PairTable::kNone) break;
        token[best] = static_cast<uint32_t>(pair[best]);
        n--;
        std::memmove(token + best + 1, token + best + 2, (n - best - 1) * sizeof(*token));
        std::memmove(pair + best, pair + best + 1, (n - best - 1) * sizeof(*pair));
        if (best > 0) pair[best - 1] = look(best - 1);
        if (best + 1 < n) pair[best] = look(best);
    }
    out.insert(out.end(), token, token + n);
}

// The same with the tokens in a linked list and the candidates in a heap: O(n log n) for a piece of n bytes.
void Model::merge_long(const uint8_t* piece, size_t n, std::vector<uint32_t>& out) const {
    if (n >= kEnd) throw std::length_error("Tokenizer.encode: one piece of the text holds 4 GiB or more");
    std::vector<uint32_t> token(n), next(n), prev(n);
    std::vector<uint64_t> pair(n, PairTable::kNone);
    std::vector<uint64_t> heap;  // rank << 32 | position
    heap.reserve(n);
    for (size_t i = 0; i < n; i++) {
        token[i] = byte_id_[piece[i]];
        next[i] = i + 1 < n ? static_cast<uint32_t>(i + 1) : kEnd;
        prev[i] = i ? static_cast<uint32_t>(i - 1) : kEnd;
    }
    auto candidate = [&](uint32_t i) {
        pair[i] = next[i] == kEnd ? PairTable::kNone : pairs_.find(PairTable::key(token[i], token[next[i]]));
        if (pair[i] != PairTable::kNone) heap.push_back((pair[i] >> 32) << 32 | i);
        return pair[i] != PairTable::kNone;
    };
    std::greater<uint64_t> later;
    for (uint32_t i = 0; i < n; i++) candidate(i);
    std::make_heap(heap.begin(), heap.end(), later);
    while (!heap.empty()) {
        std::pop_heap(heap.begin(), heap.end(), later);
        uint64_t top = heap.back();
        heap.pop_back();
        uint32_t i = static_cast<uint32_t>(top);
        if (pair[i] == PairTable::kNone || pair[i] >> 32 != top >> 32) continue;  // that pair has merged since
        uint32_t second = next[i];
        token[i] = static_cast<uint32_t>(pair[i]);
        next[i] = next[second];
        if (next[i] != kEnd) prev[next[i]] = i;
        pair[second] = PairTable::kNone;
        if (candidate(i)) std::push_heap(heap.begin(), heap.end(), later);
        if (prev[i] != kEnd && candidate(prev[i])) std::push_heap(heap.begin(), heap.end(), later);
    }
    for (uint32_t i = 0; i != kEnd; i = next[i]) out.push_back(token[i]);
}

// ---------------------------------------------------------------- texts

void Model::encode_text(Pattern pattern, std::string_view text, Cache& cache, std::vector<uint32_t>& out) const {
    pretokenize::for_each_piece(pattern, data(text), text.size(), [&](const uint8_t* piece, size_t n) {
        if (n > Cache::kBytes) return encode_piece(piece, n, out);
        uint64_t low, high;
        Cache::key_of(piece, n, low, high);
        Cache::Slot& slot = cache.slots[mix(low ^ 0x9E3779B97F4A7C15u, high ^ 0xD6E8FEB86659FD93u) % Cache::kSlots];
        if (slot.low != low || slot.high != high) {
            size_t before = out.size();
            encode_piece(piece, n, out);
            if (out.size() - before > Cache::kIds) return;
            slot.low = low, slot.high = high;
            slot.n = static_cast<uint32_t>(out.size() - before);
            std::copy(out.begin() + before, out.end(), slot.ids);
            return;
        }
        out.insert(out.end(), slot.ids, slot.ids + slot.n);
    });
}

void Model::encode(Pattern pattern, std::string_view text, const std::vector<Special>& specials,
                   std::vector<uint32_t>& out) const {
    Lease lease(*this);
    std::vector<size_t> found(specials.size(), 0);  // where each special occurs next, at or after `start`
    for (size_t i = 0; i < specials.size(); i++) found[i] = text.find(specials[i].text);
    size_t start = 0;
    for (;;) {
        size_t best = specials.size();
        for (size_t i = 0; i < specials.size(); i++) {
            if (found[i] < start) found[i] = text.find(specials[i].text, start);
            if (found[i] == std::string_view::npos) continue;
            if (best == specials.size() || found[i] < found[best] ||
                (found[i] == found[best] && specials[i].text.size() > specials[best].text.size()))
                best = i;
        }
        if (best == specials.size()) break;
        encode_text(pattern, text.substr(start, found[best] - start), *lease.cache, out);
        out.push_back(specials[best].id);
        start = found[best] + specials[best].text.size();
    }
    encode_text(pattern, text.substr(start), *lease.cache, out);
}

// Long texts are cut at safe places, short ones lie together: each job is about kJobBytes, and writes one part.
Model::Batch Model::encode_batch(Pattern pattern, const std::vector<std::string_view>& texts, int threads) const {
    constexpr size_t kJobBytes = 1 << 18;
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

    Batch batch;
    batch.parts.resize(jobs.size() - 1);
    std::atomic<size_t> next_job{0};
    int n_workers = static_cast<int>(std::min<size_t>(std::max(threads, 1), std::max<size_t>(batch.parts.size(), 1)));
    std::vector<std::exception_ptr> errors(n_workers);
    auto work = [&](int w) {
        try {
            Lease lease(*this);
            for (size_t j; (j = next_job++) < batch.parts.size();) {
                std::vector<uint32_t>& out = batch.parts[j];
                for (size_t s = jobs[j]; s < jobs[j + 1]; s++) {
                    size_t before = out.size();
                    encode_text(pattern, spans[s].text, *lease.cache, out);
                    n_ids[s] = static_cast<int64_t>(out.size() - before);
                }
            }
        } catch (...) {
            errors[w] = std::current_exception();
        }
    };
    std::vector<std::thread> workers;
    for (int w = 1; w < n_workers; w++) workers.emplace_back(work, w);
    work(0);
    for (auto& w : workers) w.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);

    batch.offsets.assign(texts.size() + 1, 0);
    for (size_t s = 0; s < spans.size(); s++) batch.offsets[spans[s].owner + 1] += n_ids[s];
    for (size_t t = 0; t < texts.size(); t++) batch.offsets[t + 1] += batch.offsets[t];
    return batch;
}

std::string Model::decode(const int64_t* ids, size_t n) const {
    std::string text;
    for (size_t i = 0; i < n; i++) {
        bool known = ids[i] >= 0 && static_cast<size_t>(ids[i]) < bytes_.size() && kinds_[ids[i]] != Kind::absent;
        if (!known)
            throw std::out_of_range("Tokenizer.decode: expected ids of the vocabulary, got " + std::to_string(ids[i]));
        text += bytes_[ids[i]];
    }
    return text;
}

}  // namespace bpe

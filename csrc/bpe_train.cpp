#include "bpe_train.h"

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <exception>
#include <queue>
#include <stdexcept>
#include <thread>

#include "bpe_hash.h"

namespace bpe {

using pretokenize::Pattern;

// ---------------------------------------------------------------- counting

void PieceCounter::grow() {
    slots_.assign(std::max<size_t>(1024, slots_.size() * 2), 0);
    size_t mask = slots_.size() - 1;
    for (size_t e = 0; e < entries_.size(); e++) {
        size_t i = entries_[e].hash & mask;
        while (slots_[i]) i = (i + 1) & mask;
        slots_[i] = static_cast<uint32_t>(e + 1);
    }
}

void PieceCounter::add_piece(const uint8_t* piece, size_t n, int64_t count) {
    if (2 * (entries_.size() + 1) > slots_.size()) grow();
    uint64_t hash = hash_bytes(piece, n);
    size_t mask = slots_.size() - 1;
    for (size_t i = hash & mask;; i = (i + 1) & mask) {
        if (!slots_[i]) {
            entries_.push_back({hash, arena_.size(), n, count});
            arena_.append(reinterpret_cast<const char*>(piece), n);
            slots_[i] = static_cast<uint32_t>(entries_.size());
            return;
        }
        Entry& e = entries_[slots_[i] - 1];
        if (e.hash == hash && e.size == n && !std::memcmp(arena_.data() + e.offset, piece, n)) {
            e.count += count;
            return;
        }
    }
}

void PieceCounter::add_pieces(const std::vector<std::string_view>& pieces) {
    for (std::string_view p : pieces) add_piece(reinterpret_cast<const uint8_t*>(p.data()), p.size(), 1);
}

// Every thread counts one stretch of the text; the tables are joined in text order, so the order of first occurrence
// does not depend on the number of threads.
void PieceCounter::add(Pattern pattern, const std::vector<std::string_view>& texts, int threads) {
    size_t total = 0;
    for (auto t : texts) total += t.size();
    auto spans = pretokenize::cut_texts(texts, std::max<size_t>(1 << 16, total / (8 * threads)));
    auto count_spans = [&](PieceCounter& table, size_t first, size_t last) {
        for (size_t i = first; i < last; i++)
            pretokenize::for_each_piece(pattern, reinterpret_cast<const uint8_t*>(spans[i].text.data()),
                                        spans[i].text.size(),
                                        [&](const uint8_t* p, size_t n) { table.add_piece(p, n, 1); });
    };
    if (threads <= 1 || total < (1u << 20)) return count_spans(*this, 0, spans.size());

    std::vector<PieceCounter> tables(threads);
    std::vector<std::exception_ptr> errors(threads);
    std::vector<std::thread> workers;
    size_t start = 0, seen = 0;
    for (int w = 0; w < threads; w++) {
        size_t end = start, share = total / threads * (w + 1);
        while (end < spans.size() && (w + 1 == threads || seen < share)) seen += spans[end++].text.size();
        workers.emplace_back([&, w, start, end] {
            try {
                count_spans(tables[w], start, end);
            } catch (...) {
                errors[w] = std::current_exception();
            }
        });
        start = end;
    }
    for (auto& w : workers) w.join();
    for (auto& e : errors)
        if (e) std::rethrow_exception(e);
    for (const PieceCounter& t : tables)
        for (size_t i = 0; i < t.size(); i++)
            add_piece(reinterpret_cast<const uint8_t*>(t.piece(i).data()), t.piece(i).size(), t.count(i));
}

namespace {

// A file mapped for reading. Its pages are the page cache's, so a corpus larger than memory can be read.
struct MappedFile {
    void* data = nullptr;
    size_t size = 0;

    explicit MappedFile(const std::string& path) {
        int fd = open(path.c_str(), O_RDONLY | O_CLOEXEC);
        struct stat info;
        if (fd < 0 || fstat(fd, &info) != 0 || !S_ISREG(info.st_mode)) {
            if (fd >= 0) close(fd);
            throw std::invalid_argument("Tokenizer.train: expected a readable file, got " + path);
        }
        size = static_cast<size_t>(info.st_size);
        if (size) data = mmap(nullptr, size, PROT_READ, MAP_PRIVATE, fd, 0);
        close(fd);
        if (!size) throw std::invalid_argument("Tokenizer.train: expected text in " + path + ", got an empty file");
        if (data == MAP_FAILED) {
            data = nullptr;
            throw std::invalid_argument("Tokenizer.train: expected a file that can be mapped, got " + path);
        }
        madvise(data, size, MADV_SEQUENTIAL);
    }
    MappedFile(MappedFile&& other) noexcept : data(other.data), size(other.size) { other.data = nullptr; }
    ~MappedFile() {
        if (data) munmap(data, size);
    }
};

}  // namespace

void PieceCounter::add_files(Pattern pattern, const std::vector<std::string>& paths, int threads) {
    constexpr size_t kGroupBytes = 64u << 20, kGroupFiles = 1024;
    std::vector<MappedFile> group;
    size_t bytes = 0;
    for (size_t i = 0; i < paths.size(); i++) {
        group.emplace_back(paths[i]);
        bytes += group.back().size;
        if (bytes < kGroupBytes && group.size() < kGroupFiles && i + 1 < paths.size()) continue;
        std::vector<std::string_view> texts;
        for (const MappedFile& f : group) texts.emplace_back(static_cast<const char*>(f.data), f.size);
        add(pattern, texts, threads);
        group.clear();
        bytes = 0;
    }
}

// ---------------------------------------------------------------- merging

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

// The distinct pieces laid end to end, one position a byte. A token lives at the position of its first byte; `next` and
// `prev` link the tokens of a piece, so a merge touches its two neighbours and nothing else.
class Trainer {
public:
    Trainer(const PieceCounter& pieces, TieBreak tie_break) : tie_(tie_break), rank_(hf_byte_order()) {
        size_t total = 0;
        for (size_t i = 0; i < pieces.size(); i++) total += pieces.piece(i).size();
        if (total >= kEnd) throw std::length_error("Tokenizer.train: the distinct pieces hold 4 GiB or more");
        token_.reserve(total), next_.reserve(total), prev_.reserve(total), piece_.reserve(total);
        for (size_t i = 0; i < pieces.size(); i++) lay(pieces.piece(i), static_cast<uint32_t>(i), pieces.count(i));
        for (uint32_t p = 0; p < pairs_.size(); p++) push(p);
    }

    std::vector<TrainedPair> run(size_t n_merges) {
        std::vector<TrainedPair> merges;
        while (merges.size() < n_merges && !heap_.empty()) {
            Candidate top = heap_.top();
            heap_.pop();
            bool moved = tie_ == TieBreak::first && top.key != first_position(top.pair);
            if (moved || top.count != pairs_[top.pair].count) {
                push(top.pair);  // what it knew is out of date; counts only fall and positions only rise
                continue;
            }
            merges.push_back({pairs_[top.pair].left, pairs_[top.pair].right});
            apply(top.pair, static_cast<uint32_t>(255 + merges.size()));
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

}  // namespace

std::vector<TrainedPair> train(const PieceCounter& pieces, size_t n_merges, TieBreak tie_break) {
    return Trainer(pieces, tie_break).run(n_merges);
}

}  // namespace bpe

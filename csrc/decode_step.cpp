#include "decode_step.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <functional>
#include <initializer_list>
#include <optional>
#include <thread>
#include <vector>

#include "attention_decode.h"
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace {

constexpr int64_t SERIAL_ROWS = 4;  // so few rows are normalised and turned by one thread, while the others wait
constexpr int64_t ROWS_TOGETHER = 8;
constexpr int64_t BLOCKS = 2;  // of PRODUCT_ROWS rows a thread, from which on each has blocks of its own

// The threads of one call. Each calls the same functions in the same order; `next` and the barrier are shared.
struct Meeting {
    alignas(64) std::atomic<int64_t> next{0};
    alignas(64) std::atomic<int> arrived{0};
    alignas(64) std::atomic<unsigned> turn{0};
};

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Member {
  public:
    Member(Meeting& meeting, int threads, int index) : threads(threads), index(index), meeting_(meeting) {}

    // work(i) for each i below count, by whoever is free; then, by the last, after(); all wait for it.
    template <class Work, class After>
    void each(int64_t count, Work&& work, After&& after) {
        if (threads == 1) {
            for (int64_t i = 0; i < count; ++i) work(i);
            return after();
        }
        for (int64_t i; (i = take()) < count;) work(i);
        meet(after);
    }
    template <class Work>
    void each(int64_t count, Work&& work) {
        each(count, work, [] {});
    }
    // work(i, next), where next is what this thread will work on then, if that is below count.
    template <class Work>
    void each_ahead(int64_t count, Work&& work) {
        if (threads == 1) {
            for (int64_t i = 0; i < count; ++i) work(i, i + 1);
            return;
        }
        for (int64_t i = take(), next; i < count; i = next) next = take(), work(i, next);
        meet([] {});
    }

    const int threads, index;

  private:
    int64_t take() { return meeting_.next.fetch_add(1, std::memory_order_relaxed); }
    // after(), by the last to come; all wait for it.
    template <class After>
    void meet(After&& after) {
        const unsigned turn = meeting_.turn.load(std::memory_order_relaxed);
        if (meeting_.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 == threads) {
            after();
            meeting_.next.store(0, std::memory_order_relaxed);
            meeting_.arrived.store(0, std::memory_order_relaxed);
            meeting_.turn.store(turn + 1, std::memory_order_release);
            return;
        }
        // Where there are more threads than cores the last one may be waiting for this core.
        for (int spins = 0; meeting_.turn.load(std::memory_order_acquire) == turn; ++spins) spins < 2000 ? pause() : std::this_thread::yield();
    }
    Meeting& meeting_;
};

// A row-major array of the step's dtype, with room for what products read.
struct Plane {
    char* data;
    int64_t stride, size;

    char* row(int64_t r) const { return data + r * stride * size; }
    char* at(int64_t r, int64_t column) const { return row(r) + column * size; }
};

class Step {
  public:
    Step(const DecodeStep& given, int threads)
        : p(given), whole_(p.sequences ? p.cu_seqlens[p.sequences] : 0), by_blocks_(p.rows >= BLOCKS * PRODUCT_ROWS * threads),
          plan_(p.attention, p.pages, false), table_(kernels()), memory_(1, floats()) {
        scales_ = memory_.slice(0);
        char* next = reinterpret_cast<char*>(scales_ + product_rows(p.rows));
        for (int i = 0; i < PLANES; ++i) {
            planes_[i] = {next, product_depth(width(i)), size()};
            next += height(i) * planes_[i].stride * planes_[i].size;
            if (planes_[i].stride != width(i)) std::memset(planes_[i].data, 0, next - planes_[i].data);
        }
        const DecodeProblem& a = p.attention;
        plan_.problem.q = heads_of(TURNED, whole_, 0), plan_.problem.out = heads_of(ATTENDED, whole_, 0);
        lse_.resize(whole_ * a.heads);
        within_ = {p.cu_seqlens, p.sequences, a.heads, a.kv_heads, a.head_dim, true, a.scale, p.dtype, false, heads_of(TURNED, 0, 0),
                   heads_of(QKV, 0, a.heads), heads_of(QKV, 0, a.heads + a.kv_heads), heads_of(ATTENDED, 0, 0), lse_.data(), {}, {}, {}, {}, nullptr};
        if (whole_) tasks_ = attention_tasks(within_, threads, false);
        tasks_.insert(tasks_.end(), plan_.tasks.begin(), plan_.tasks.end());
        int64_t longest = 0, width = (a.head_dim + 15) / 16 * 16;
        for (int64_t i = 0; i < p.sequences; ++i) longest = std::max<int64_t>(longest, p.cu_seqlens[i + 1] - p.cu_seqlens[i]);
        scratch_.emplace(threads, std::max({plan_.prefix_scratch, plan_.own_scratch, attention_forward_scratch((longest + 15) / 16 * 16, width)}));
    }

    void run(int threads, int index) {
        Member team(meeting_, threads, index);
        rows(team, [&](int64_t b) {
            embed(b);
            norm(b, STREAM, p.layer[0].input_norm, false);
        }, true);
        const auto first = [&](int64_t l) { return stage(NORMED, p.layer[l].qkv, width(QKV), p.hidden, QKV, [this, l](int64_t b) { turn(b, l); }); };
        through(team, {first(0)}, [&] { point(0); });
        for (int64_t l = 0; l < p.layers; ++l) {
            attend(team);
            const DecodeLayer& w = p.layer[l];
            const bool last = l + 1 == p.layers;
            const Stage o = stage(ATTENDED, w.o, p.hidden, width(ATTENDED), BRANCH, [&](int64_t b) { norm(b, BRANCH, w.post_norm, true); });
            const Stage up = stage(NORMED, w.gate_up, 2 * p.inner, p.hidden, GATE_UP, [this](int64_t b) { gate(b); });
            const float* next = last ? p.norm : p.layer[l + 1].input_norm;
            const Stage down = stage(GATED, w.down, p.hidden, p.inner, BRANCH, [this, next](int64_t b) { norm(b, BRANCH, next, true); });
            if (last) through(team, {o, up, down}, [&] { gather_last(); });
            else through(team, {o, up, down, first(l + 1)}, [&] { point(l + 1); });
        }
        const Plane& from = planes_[p.last ? BRANCH : NORMED];
        product(team, {p.wanted, p.vocabulary, p.hidden, p.dtype, FLOAT32, from.data, from.stride, p.head, p.logits, p.vocabulary}, [] {});
    }

  private:
    enum { STREAM, NORMED, QKV, TURNED, ATTENDED, BRANCH, GATE_UP, GATED, PLANES };

    // A product, and what each of its rows then goes through.
    struct Stage {
        PackedProduct product;
        std::function<void(int64_t)> row;
    };

    int64_t size() const { return p.dtype == FLOAT32 ? 4 : 2; }
    int64_t width(int plane) const {
        const DecodeProblem& a = p.attention;
        switch (plane) {
            case QKV: return (a.heads + 2 * a.kv_heads) * a.head_dim;
            case TURNED: case ATTENDED: return a.heads * a.head_dim;
            case GATE_UP: return 2 * p.inner;
            case GATED: return p.inner;
            default: return p.hidden;
        }
    }
    // More logits may be wanted than there are rows: of a prompt, for each of its samples.
    int64_t height(int plane) const { return product_rows(plane == BRANCH && p.last ? std::max(p.rows, p.wanted) : p.rows); }
    int64_t floats() const {
        int64_t total = product_rows(p.rows);
        for (int i = 0; i < PLANES; ++i) total += height(i) * product_depth(width(i)) * size() / 4;
        return total;
    }
    Rows heads_of(int plane, int64_t row, int64_t head) const {
        const int64_t D = p.attention.head_dim;
        return {planes_[plane].at(row, head * D), planes_[plane].stride, D};
    }

    template <class Row>
    void rows(Member& team, Row&& row, bool always = false) {
        if (p.rows <= SERIAL_ROWS && !always) return;
        team.each((p.rows + ROWS_TOGETHER - 1) / ROWS_TOGETHER, [&](int64_t i) {
            for (int64_t b = i * ROWS_TOGETHER; b < std::min((i + 1) * ROWS_TOGETHER, p.rows); ++b) row(b);
        });
    }

    template <class After>
    void product(Member& team, const PackedProduct& problem, After&& after) {
        constexpr int64_t TASKS = 4;  // a thread
        const int64_t blocks = (problem.columns + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, chunks = (problem.rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
        const int64_t run = std::max<int64_t>(1, blocks / (TASKS * team.threads)), runs = (blocks + run - 1) / run;
        team.each(runs * chunks, [&](int64_t i) {
            const int64_t row = i / runs * PRODUCT_ROWS, column = i % runs * run * PRODUCT_COLUMNS;
            table_.decode_product(problem, row, std::min(row + PRODUCT_ROWS, problem.rows), column,
                                  std::min(column + run * PRODUCT_COLUMNS, problem.columns));
        }, after);
    }

    template <class Row>
    Stage stage(int from, const void* weight, int64_t columns, int64_t depth, int to, Row&& row) const {
        return {{p.rows, columns, depth, p.dtype, p.dtype, planes_[from].data, planes_[from].stride, weight, planes_[to].data, planes_[to].stride}, row};
    }

    // All rows through these stages, then after(), once. With many rows a thread takes a block of them through all, whose numbers stay
    // in its cache; with few the threads share each product.
    template <class After>
    void through(Member& team, std::initializer_list<Stage> stages, After&& after) {
        if (by_blocks_) {
            team.each((p.rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS, [&](int64_t i) {
                const int64_t begin = i * PRODUCT_ROWS, end = std::min(begin + PRODUCT_ROWS, p.rows);
                for (const Stage& s : stages) {
                    table_.decode_product(s.product, begin, end, 0, s.product.columns);
                    for (int64_t b = begin; b < end; ++b) s.row(b);
                }
            }, after);
            return;
        }
        for (const Stage& s : stages) {
            product(team, s.product, [&] {
                for (int64_t b = 0; p.rows <= SERIAL_ROWS && b < p.rows; ++b) s.row(b);
            });
            rows(team, s.row);
        }
        team.each(0, [](int64_t) {}, after);
    }

    void embed(int64_t b) {
        table_.embedding_forward({1, p.vocabulary, p.hidden, p.tokens + b, p.embedding, FLOAT32, planes_[STREAM].row(b), p.dtype, nullptr,
                                  nullptr}, 0, 1);
    }

    // The row's norm, of the stream or, `adds`, of its sum with a branch, which becomes the stream.
    void norm(int64_t b, int from, const float* weight, bool adds) {
        void* stream = planes_[STREAM].row(b);
        table_.norm_forward({1, p.hidden, p.dtype, planes_[from].row(b), adds ? stream : nullptr, weight, p.eps, planes_[NORMED].row(b),
                             stream, scales_ + b, nullptr, nullptr, nullptr, nullptr, false}, 0, 1);
    }

    void* key_of(int64_t layer, int64_t b) const { return slot_of(p.attention.k, layer * p.k_layer, p.attention.k_batch, p.attention.k_token, b); }
    void* value_of(int64_t layer, int64_t b) const { return slot_of(p.attention.v, layer * p.v_layer, p.attention.v_batch, p.attention.v_token, b); }
    void* slot_of(const void* first, int64_t layer, int64_t page, int64_t token, int64_t b) const {
        const int64_t slot = p.slots[b], element = layer + slot / p.pages.size * page + slot % p.pages.size * token;
        return static_cast<char*>(const_cast<void*>(first)) + element * size();
    }
    void point(int64_t layer) {
        const auto moved = [&](const void* x, int64_t elements) { return static_cast<const char*>(x) + elements * size(); };
        plan_.turn_to(moved(p.attention.k, layer * p.k_layer), moved(p.attention.v, layer * p.v_layer));
    }

    // Whole sequences and prefixes, then what is left. The heads of a row lie together, so that one core that has them all finds some in
    // the lines beside another's.
    void attend(Member& team) {
        constexpr int64_t ENOUGH = 4;  // rows a thread
        if (!tasks_.empty())
            team.each(static_cast<int64_t>(tasks_.size()), [&](int64_t i) {
                const bool whole = tasks_[i].problem == &within_;
                (whole ? table_.attention_forward : table_.attention_prefix)(tasks_[i], scratch_->slice(team.index));
            });
        const int64_t rows = p.attention.batch, heads = p.attention.kv_heads, turn = rows >= ENOUGH * team.threads ? heads : 1;
        const int64_t count = rows * heads / turn;
        if (count)
            team.each_ahead(count, [&](int64_t i, int64_t next) {
                table_.attention_decode(plan_.problem, i * turn, (i + 1) * turn, next < count ? next * turn : -1, scratch_->slice(team.index));
            });
    }

    // Queries to where attention takes them, the key and value to their slot; the key of a whole sequence also to where it came from.
    void turn(int64_t b, int64_t layer) {
        const DecodeProblem& a = p.attention;
        const int64_t D = a.head_dim, keys = a.heads * D, values = keys + a.kv_heads * D;
        const RopeHeads q{a.heads, {planes_[QKV].row(b), 0, D}, {planes_[TURNED].row(b), 0, D}, {}, p.layer[layer].q_norm};
        const RopeHeads k{a.kv_heads, {planes_[QKV].at(b, keys), 0, D}, {key_of(layer, b), 0, a.k_head}, {}, p.layer[layer].k_norm};
        table_.rope_forward({1, D / 2, p.dtype, p.positions + b, p.cosines, p.sines, p.eps, q, k, nullptr}, 0, 1);
        for (int64_t h = 0; h < a.kv_heads; ++h)
            std::memcpy(static_cast<char*>(value_of(layer, b)) + h * a.v_head * size(), planes_[QKV].at(b, values + h * D), D * size());
        if (b >= whole_) return plan_.gather(b - whole_);
        for (int64_t h = 0; h < a.kv_heads; ++h)
            std::memcpy(planes_[QKV].at(b, keys + h * D), static_cast<char*>(key_of(layer, b)) + h * a.k_head * size(), D * size());
    }

    void gate(int64_t b) {
        table_.swiglu_forward({1, p.inner, p.dtype, planes_[GATE_UP].row(b), planes_[GATE_UP].at(b, p.inner), 0, 0, nullptr,
                               planes_[GATED].row(b), nullptr, nullptr, 0, false}, 0, 1);
    }

    // The rows that the output matrix is for, one after another.
    void gather_last() {
        for (int64_t i = 0; p.last && i < p.wanted; ++i) std::memcpy(planes_[BRANCH].row(i), planes_[NORMED].row(p.last[i]), p.hidden * size());
    }

    const DecodeStep& p;
    const int64_t whole_;
    const bool by_blocks_;
    DecodePlan plan_;
    const Kernels& table_;
    Meeting meeting_;
    Scratch memory_;
    std::optional<Scratch> scratch_;  // of each thread
    float* scales_;
    Plane planes_[PLANES];
    AttentionProblem within_;  // whole sequences
    std::vector<double> lse_;  // not wanted
    std::vector<AttentionTask> tasks_;
};

}  // namespace

void decode_pack(const PackProblem& problem, int num_threads) {
    const auto kernel = kernels().decode_pack;
    const int64_t runs = (problem.columns + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS;
    parallel_rows(runs, PRODUCT_COLUMNS * problem.depth, num_threads, [&](int64_t begin, int64_t end) {
        kernel(problem, begin * PRODUCT_COLUMNS, std::min(end * PRODUCT_COLUMNS, problem.columns));
    });
}

void decode_step(const DecodeStep& p, int num_threads) {
    if (!p.rows) return;
    const int threads = std::max(num_threads, 1);
    Step step(p, threads);
#pragma omp parallel num_threads(threads) if (threads > 1)
    step.run(omp_get_num_threads(), omp_get_thread_num());
}

#include "decode_step.h"

#include <omp.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <thread>
#include <vector>

#include "attention_decode.h"
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace {

constexpr int64_t SERIAL_ROWS = 4;  // so few rows are normalised and turned by one thread, while the others wait
constexpr int64_t ROWS_TOGETHER = 8;

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
        for (int64_t i; (i = meeting_.next.fetch_add(1, std::memory_order_relaxed)) < count;) work(i);
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
    template <class Work>
    void each(int64_t count, Work&& work) {
        each(count, work, [] {});
    }

    const int threads, index;

  private:
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
    Step(const DecodeStep& given, DecodePlan& plan, Meeting& meeting, Scratch& scratch, float* memory)
        : p(given), plan_(plan), table_(kernels()), meeting_(meeting), scratch_(scratch), scales_(memory) {
        char* next = reinterpret_cast<char*>(memory + product_rows(p.rows));
        for (int i = 0; i < PLANES; ++i) {
            planes_[i] = {next, product_depth(width(p, i)), size(p)};
            next += product_rows(p.rows) * planes_[i].stride * planes_[i].size;
            if (planes_[i].stride != width(p, i)) std::memset(planes_[i].data, 0, next - planes_[i].data);
        }
        const int64_t D = p.attention.head_dim;
        plan_.problem.q = {planes_[TURNED].data, planes_[TURNED].stride, D};
        plan_.problem.out = {planes_[ATTENDED].data, planes_[ATTENDED].stride, D};
    }

    static int64_t floats(const DecodeStep& p) {
        int64_t total = product_rows(p.rows);
        for (int i = 0; i < PLANES; ++i) total += product_rows(p.rows) * product_depth(width(p, i)) * size(p) / 4;
        return total;
    }

    void run(int threads, int index) {
        Member team(meeting_, threads, index);
        rows(team, [&](int64_t b) {
            embed(b);
            norm(b, STREAM, p.layer[0].input_norm, false);
        }, true);
        for (int64_t l = 0; l < p.layers; ++l) {
            const DecodeLayer& w = p.layer[l];
            product(team, NORMED, w.qkv, width(p, QKV), p.hidden, QKV, [&](int64_t b) { turn(b, l); }, [&] { point(l); });
            if (!plan_.tasks.empty())
                team.each(static_cast<int64_t>(plan_.tasks.size()),
                          [&](int64_t i) { table_.attention_prefix(plan_.tasks[i], scratch_.slice(team.index)); });
            team.each(p.rows * p.attention.kv_heads, [&](int64_t i) {
                table_.attention_decode(plan_.problem, i / p.attention.kv_heads, i % p.attention.kv_heads, scratch_.slice(team.index));
            });
            product(team, ATTENDED, w.o, p.hidden, width(p, ATTENDED), BRANCH, [&](int64_t b) { norm(b, BRANCH, w.post_norm, true); });
            product(team, NORMED, w.gate_up, 2 * p.inner, p.hidden, GATE_UP, [&](int64_t b) { gate(b); });
            const float* next = l + 1 < p.layers ? p.layer[l + 1].input_norm : p.norm;
            product(team, GATED, w.down, p.hidden, p.inner, BRANCH, [&](int64_t b) { norm(b, BRANCH, next, true); });
        }
        product(team, {p.rows, p.vocabulary, p.hidden, p.dtype, FLOAT32, planes_[NORMED].data, planes_[NORMED].stride, p.head,
                       p.logits, p.vocabulary}, [] {});
    }

  private:
    enum { STREAM, NORMED, QKV, TURNED, ATTENDED, BRANCH, GATE_UP, GATED, PLANES };

    static int64_t size(const DecodeStep& p) { return p.dtype == FLOAT32 ? 4 : 2; }
    static int64_t width(const DecodeStep& p, int plane) {
        const DecodeProblem& a = p.attention;
        switch (plane) {
            case QKV: return (a.heads + 2 * a.kv_heads) * a.head_dim;
            case TURNED: case ATTENDED: return a.heads * a.head_dim;
            case GATE_UP: return 2 * p.inner;
            case GATED: return p.inner;
            default: return p.hidden;
        }
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
        const int64_t blocks = (problem.columns + PRODUCT_COLUMNS - 1) / PRODUCT_COLUMNS, chunks = (p.rows + PRODUCT_ROWS - 1) / PRODUCT_ROWS;
        const int64_t run = std::max<int64_t>(1, blocks / (TASKS * team.threads)), runs = (blocks + run - 1) / run;
        team.each(runs * chunks, [&](int64_t i) {
            const int64_t row = i / runs * PRODUCT_ROWS, column = i % runs * run * PRODUCT_COLUMNS;
            table_.decode_product(problem, row, std::min(row + PRODUCT_ROWS, p.rows), column,
                                  std::min(column + run * PRODUCT_COLUMNS, problem.columns));
        }, after);
    }
    // Then row(b) for each, after ready().
    template <class Row, class Ready>
    void product(Member& team, int from, const void* weight, int64_t columns, int64_t depth, int to, Row&& row, Ready&& ready) {
        product(team, {p.rows, columns, depth, p.dtype, p.dtype, planes_[from].data, planes_[from].stride, weight, planes_[to].data,
                       planes_[to].stride}, [&] {
            ready();
            for (int64_t b = 0; p.rows <= SERIAL_ROWS && b < p.rows; ++b) row(b);
        });
        rows(team, row);
    }
    template <class Row>
    void product(Member& team, int from, const void* weight, int64_t columns, int64_t depth, int to, Row&& row) {
        product(team, from, weight, columns, depth, to, row, [] {});
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
        return static_cast<char*>(const_cast<void*>(first)) + element * size(p);
    }
    void point(int64_t layer) {
        const auto moved = [&](const void* x, int64_t elements) { return static_cast<const char*>(x) + elements * size(p); };
        plan_.turn_to(moved(p.attention.k, layer * p.k_layer), moved(p.attention.v, layer * p.v_layer));
    }

    // Queries to where attention takes them, the key and value to their slot.
    void turn(int64_t b, int64_t layer) {
        const DecodeProblem& a = p.attention;
        const int64_t D = a.head_dim, keys = a.heads * D, values = keys + a.kv_heads * D;
        const RopeHeads q{a.heads, {planes_[QKV].row(b), 0, D}, {planes_[TURNED].row(b), 0, D}, {}, p.layer[layer].q_norm};
        const RopeHeads k{a.kv_heads, {planes_[QKV].at(b, keys), 0, D}, {key_of(layer, b), 0, a.k_head}, {}, p.layer[layer].k_norm};
        table_.rope_forward({1, D / 2, p.dtype, p.positions + b, p.cosines, p.sines, p.eps, q, k, nullptr}, 0, 1);
        for (int64_t h = 0; h < a.kv_heads; ++h)
            std::memcpy(static_cast<char*>(value_of(layer, b)) + h * a.v_head * size(p), planes_[QKV].at(b, values + h * D), D * size(p));
        plan_.gather(b);
    }

    void gate(int64_t b) {
        table_.swiglu_forward({1, p.inner, p.dtype, planes_[GATE_UP].row(b), planes_[GATE_UP].at(b, p.inner), 0, 0, nullptr,
                               planes_[GATED].row(b), nullptr, nullptr, 0, false}, 0, 1);
    }

    const DecodeStep& p;
    DecodePlan& plan_;
    const Kernels& table_;
    Meeting& meeting_;
    Scratch& scratch_;
    float* scales_;
    Plane planes_[PLANES];
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
    DecodePlan plan(p.attention, p.pages, false);
    Scratch scratch(threads, std::max(plan.prefix_scratch, plan.own_scratch)), planes(1, Step::floats(p));
    Meeting meeting;
    Step step(p, plan, meeting, scratch, planes.slice(0));
#pragma omp parallel num_threads(threads) if (threads > 1)
    step.run(omp_get_num_threads(), omp_get_thread_num());
}

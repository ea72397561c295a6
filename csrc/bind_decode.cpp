// The CPU kernels that decode, for Python: see bind_ops.cpp.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <vector>

#include "bind_ops.h"
#include "decode_run.h"
#include "kernels.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

// what: "op: expected name in [low, bound = ".
void check_range(const int32_t* x, int64_t count, int64_t low, int64_t high, const std::string& what) {
    for (int64_t i = 0; i < count; ++i)
        if (x[i] < low || x[i] > high) throw std::invalid_argument(what + std::to_string(high) + "], got " + std::to_string(x[i]));
}

void decode(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, uintptr_t lengths, float scale,
            int dtype, Strided q, Strided out, Cache k, Cache v, int64_t prefixes, uintptr_t prefix_bounds, int64_t tokens,
            uintptr_t owner, Strided prefix_k, Strided prefix_v, bool as_forward, int num_threads) {
    DecodeProblem p = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, q, out, k, v, prefixes, owner);
    p.prefix_bounds = at<const int32_t>(prefix_bounds), p.prefix_k = rows(prefix_k), p.prefix_v = rows(prefix_v);
    check_range(p.lengths, batch, 0, capacity, "attention_decode: expected lengths in [0, Tmax = ");
    if (owner) {
        check_cu_seqlens(p.prefix_bounds, prefixes, tokens, "attention_decode");
        check_range(p.owner, batch, 0, prefixes - 1, "attention_decode: expected owner in [0, P - 1 = ");
    }
    attention_decode(p, {}, as_forward, num_threads);
}

void check_pages(const DecodeProblem& p, const DecodePages& in, const std::string& op) {
    const auto check = [&](const int32_t* table, const int32_t* filled, int64_t count, int64_t columns, const char* name) {
        for (int64_t i = 0; i < count; ++i)
            check_range(table + i * columns, (filled[i] + in.size - 1) / in.size, 0, in.count - 1, op + ": expected " + name + " in [0, P - 1 = ");
    };
    check_range(p.lengths, p.batch, 0, in.own_width * in.size, op + ": expected lengths in [0, Pmax * page_size = ");
    check(in.own, p.lengths, p.batch, in.own_width, "pages");
    if (!p.owner) return;
    check_range(in.prefix_lengths, p.prefixes, 0, in.prefix_width * in.size, op + ": expected prefix lengths in [0, Pg * page_size = ");
    check(in.prefix, in.prefix_lengths, p.prefixes, in.prefix_width, "prefix pages");
    check_range(p.owner, p.batch, -1, p.prefixes - 1, op + ": expected owner in [-1, G - 1 = ");
}

void paged(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t page_size, int64_t page_count, int64_t width,
           uintptr_t pages, uintptr_t lengths, float scale, int dtype, Strided q, Strided out, Cache k, Cache v, int64_t prefixes,
           int64_t prefix_width, uintptr_t prefix_pages, uintptr_t prefix_lengths, uintptr_t owner, bool as_forward, int num_threads) {
    const DecodeProblem p = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, q, out, k, v, prefixes, owner);
    const DecodePages in{at<const int32_t>(pages), at<const int32_t>(prefix_pages), at<const int32_t>(prefix_lengths), width,
                         prefix_width, page_size, page_count};
    check_pages(p, in, "attention_paged");
    attention_decode(p, in, as_forward, num_threads);
}

void pack(int64_t columns, int64_t depth, int64_t column, int dtype, uintptr_t weight, uintptr_t packed, int num_threads) {
    decode_pack({columns, depth, column, dtype, at<const float>(weight), at<void>(packed)}, num_threads);
}

// Asks for large pages where whole ones fit: what is read far apart then misses the tables of addresses less often.
void prefer_large_pages(uintptr_t address, uint64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr uintptr_t PAGE = 2 << 20;
    const uintptr_t begin = (address + PAGE - 1) / PAGE * PAGE, end = (address + bytes) / PAGE * PAGE;
    if (begin < end) madvise(at<void>(begin), end - begin, MADV_HUGEPAGE);  // a wish: where it is not heard nothing is lost
#else
    (void)address, (void)bytes;
#endif
}

void check_range(const int64_t* x, int64_t count, int64_t bound, const char* name) {
    for (int64_t i = 0; i < count; ++i)
        if (x[i] < 0 || x[i] >= bound)
            throw std::invalid_argument(std::string("decode_step: expected ") + name + " in [0, " + std::to_string(bound) + "), got " + std::to_string(x[i]));
}

using Shape = std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>;  // layers, hidden, inner, vocabulary, heads, kv_heads, head_dim
using Weights = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // embedding, table of layers, norm, head, cosines, sines
using Decoder = std::tuple<Shape, int, float, float, Weights, int64_t>;  // dtype, eps, scale; context
using Pool = std::tuple<Cache, Cache, int64_t, int64_t, int64_t, int64_t>;  // k, v, their elements from layer to layer, page_size, pages
// Rows, width, pages, lengths; prefixes, their width, pages, lengths, and owner.
using Tables = std::tuple<int64_t, int64_t, uintptr_t, uintptr_t, int64_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;

DecodeStep step_of(const Decoder& decoder, int64_t row_count, uintptr_t tokens, uintptr_t positions, const Pool& pool, const Tables& tables) {
    const auto& [shape, dtype, eps, scale, weights, context] = decoder;
    const auto& [layers, hidden, inner, vocabulary, heads, kv_heads, head_dim] = shape;
    const auto& [embedding, table, norm, head, cosines, sines] = weights;
    const auto& [k, v, k_layer, v_layer, page_size, page_count] = pool;
    const auto& [batch, width, pages, lengths, prefixes, prefix_width, prefix_pages, prefix_lengths, owner] = tables;
    DecodeStep s{};
    s.rows = row_count, s.layers = layers, s.hidden = hidden, s.inner = inner, s.vocabulary = vocabulary, s.dtype = dtype, s.eps = eps;
    s.embedding = at<const float>(embedding), s.layer = at<const DecodeLayer>(table), s.norm = at<const float>(norm);
    s.head = at<const void>(head), s.cosines = at<const float>(cosines), s.sines = at<const float>(sines);
    s.tokens = at<const int64_t>(tokens), s.positions = at<const int64_t>(positions), s.wanted = row_count;
    s.attention = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, {}, {}, k, v, prefixes, owner);
    s.pages = {at<const int32_t>(pages), at<const int32_t>(prefix_pages), at<const int32_t>(prefix_lengths), width, prefix_width, page_size,
               page_count};
    s.k_layer = k_layer, s.v_layer = v_layer;
    check_range(s.tokens, row_count, vocabulary, "tokens");
    check_range(s.positions, row_count, context, "positions");
    return s;
}

void step(const Decoder& decoder, int64_t row_count, uintptr_t tokens, uintptr_t positions, uintptr_t slots, int64_t sequences,
          uintptr_t cu_seqlens, const Pool& pool, const Tables& tables, int64_t wanted, uintptr_t last, uintptr_t logits, int num_threads) {
    DecodeStep s = step_of(decoder, row_count, tokens, positions, pool, tables);
    s.slots = at<const int64_t>(slots), s.sequences = sequences, s.cu_seqlens = at<const int32_t>(cu_seqlens);
    s.wanted = wanted, s.last = at<const int64_t>(last), s.logits = at<float>(logits);
    if (sequences) check_cu_seqlens(s.cu_seqlens, sequences, row_count - s.attention.batch, "decode_step");
    check_range(s.slots, row_count, s.pages.count * s.pages.size, "slots");
    if (last) check_range(s.last, wanted, row_count, "last");
    check_pages(s.attention, s.pages, "decode_step");
    decode_step(s, num_threads);
}

using Own = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // of each row: seed, temperature, top_k, top_p, min_p
using Drawn = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t>;           // tokens, logprob, unfiltered, kept

SampleProblem sample_problem(int64_t row_count, int64_t columns, uintptr_t requests, uintptr_t steps, int64_t seed, double temperature,
                             int64_t top_k, double top_p, double min_p, const Own& own, const Drawn& drawn) {
    SampleProblem s{};
    s.rows = row_count, s.columns = s.stride = columns, s.dtype = FLOAT32;
    s.requests = at<const int64_t>(requests), s.steps = at<const int64_t>(steps);
    s.common = {static_cast<uint64_t>(seed), temperature, top_k, top_p, min_p};
    s.own_seed = at<const int64_t>(std::get<0>(own)), s.own_temperature = at<const double>(std::get<1>(own));
    s.own_top_k = at<const int64_t>(std::get<2>(own)), s.own_top_p = at<const double>(std::get<3>(own));
    s.own_min_p = at<const double>(std::get<4>(own));
    s.tokens = at<int64_t>(std::get<0>(drawn)), s.logprob = at<float>(std::get<1>(drawn));
    s.unfiltered = at<float>(std::get<2>(drawn)), s.kept = at<float>(std::get<3>(drawn));
    return s;
}

using Constraints = std::tuple<std::vector<token_mask::Masks*>, std::vector<int32_t>>;  // of each row, or none: its masks, or null, and node

// Returns how many steps were made, and the nodes then. Masks are made while the GIL is held, as their automata may be other threads' too.
std::tuple<int64_t, std::vector<int32_t>> decode_tokens(const Decoder& decoder, int64_t row_count, uintptr_t tokens, uintptr_t positions, const Pool& pool, const Tables& tables,
               int64_t most, uintptr_t stops, uintptr_t stop_of, uintptr_t requests, uintptr_t steps, int64_t seed, double temperature,
               int64_t top_k, double top_p, double min_p, const Own& own, const Drawn& drawn, const Constraints& constraints, int num_threads) {
    std::optional<py::gil_scoped_release> free;
    DecodeRun run{};
    std::tie(run.masks, run.nodes) = constraints;
    if (run.masks.empty()) free.emplace();
    for (size_t b = 0; b < run.masks.size(); ++b) {
        const token_mask::Masks* masks = run.masks[b];
        if (masks && masks->words() != static_cast<size_t>(std::get<3>(std::get<0>(decoder)) + 31) / 32)
            throw std::invalid_argument("decode_run: expected constraints over the decoder's vocabulary");
        if (masks && !masks->has(run.nodes[b]))
            throw std::invalid_argument("decode_run: expected nodes that the constraints have given out, got " + std::to_string(run.nodes[b]));
    }
    run.first = step_of(decoder, row_count, tokens, positions, pool, tables), run.most = most;
    run.stops = at<const uint8_t>(stops), run.stop_of = at<const int64_t>(stop_of);
    run.draws = sample_problem(row_count, run.first.vocabulary, requests, steps, seed, temperature, top_k, top_p, min_p, own, drawn);
    std::vector<int32_t> lengths(run.first.attention.lengths, run.first.attention.lengths + row_count);
    for (int64_t b = 0; b < row_count; ++b) {
        if (lengths[b] < 1) throw std::invalid_argument("decode_run: expected lengths of 1 or more, got " + std::to_string(lengths[b]));
        lengths[b] += static_cast<int32_t>(most) - 1;
    }
    DecodeProblem last = run.first.attention;
    last.lengths = lengths.data();
    check_pages(last, run.first.pages, "decode_run");
    std::vector<int64_t> positions_then(run.first.positions, run.first.positions + row_count);
    for (int64_t& position : positions_then) position += most - 1;
    check_range(positions_then.data(), row_count, std::get<5>(decoder), "positions");
    const int64_t made = decode_run(run, num_threads);
    return {made, run.nodes};
}

void draw(int64_t row_count, int64_t columns, int64_t stride, int dtype, uintptr_t logits, int64_t seed, uintptr_t requests,
          uintptr_t steps, double temperature, int64_t top_k, double top_p, double min_p, const Own& own, uintptr_t mask,
          int64_t mask_stride, uintptr_t tokens, uintptr_t logprob, uintptr_t unfiltered, uintptr_t kept, int num_threads) {
    SampleProblem s = sample_problem(row_count, columns, requests, steps, seed, temperature, top_k, top_p, min_p, own,
                                     {tokens, logprob, unfiltered, kept});
    s.stride = stride, s.dtype = dtype, s.logits = at<const void>(logits), s.mask = at<const uint32_t>(mask), s.mask_stride = mask_stride;
    sample(s, num_threads);
}

}  // namespace

void bind_decode(py::module_& m) {
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("attention_decode", &decode, release(), "One query per sequence against a cache: fills out.");
    m.def("attention_paged", &paged, release(), "The same against pages of a pool.");
    m.def("packed_elements", &packed_elements, "Of a packed weight: columns, depth.");
    m.def("prefer_large_pages", &prefer_large_pages, "Of memory that nobody has written to yet: address, bytes.");
    m.def("decode_pack", &pack, release(), "Rows of a weight to columns of a packed one.");
    m.def("decode_run", &decode_tokens, "Steps of every row with a token drawn after each: fills what is drawn, and returns how many steps.");
    m.def("decode_step", &step, release(), "A token of every row through a whole decoder: fills logits, and a slot of every layer's keys and values.");
    m.def("sample", &draw, release(), "A token a row: fills tokens, its two log-probabilities and the mask's share.");
}

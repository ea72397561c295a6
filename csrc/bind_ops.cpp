// The CPU kernels for Python. Arrays come as addresses with sizes and strides in elements: nanorlhf/ops allocates and
// validates shapes; here are checked the values that Python cannot check cheaply.
#include <pybind11/pybind11.h>

#include <stdexcept>
#include <string>
#include <tuple>

#include "isa.h"
#include "kernels.h"
#include "parallel.h"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace py = pybind11;

namespace {

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, token stride, head stride

template <class T>
T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
Rows rows(const Strided& s) { return {at<void>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

void check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, const std::string& op = "attention") {
    bool ok = cu_seqlens[0] == 0 && cu_seqlens[batch] == tokens;
    for (int64_t b = 0; b < batch; ++b) ok = ok && cu_seqlens[b] <= cu_seqlens[b + 1];
    if (!ok)
        throw std::invalid_argument(op + ": expected cu_seqlens to rise from 0 to N = " + std::to_string(tokens));
}

AttentionProblem attention_problem(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, int64_t heads,
                                   int64_t kv_heads, int64_t head_dim, bool causal, float scale, int dtype) {
    check_cu_seqlens(at<const int32_t>(cu_seqlens), batch, tokens);
    AttentionProblem p{};
    p.cu_seqlens = at<const int32_t>(cu_seqlens);
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
    p.causal = causal, p.scale = scale, p.dtype = dtype;
    return p;
}

void forward(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim,
             bool causal, float scale, int dtype, Strided q, Strided k, Strided v, Strided out, uintptr_t lse,
             int num_threads) {
    AttentionProblem p =
        attention_problem(cu_seqlens, batch, tokens, heads, kv_heads, head_dim, causal, scale, dtype);
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.lse = at<double>(lse);
    attention_forward(p, num_threads);
}

void backward(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads,
              int64_t head_dim, bool causal, float scale, int dtype, Strided q, Strided k, Strided v, Strided out,
              uintptr_t lse, Strided dout, Strided dq, Strided dk, Strided dv, int num_threads) {
    AttentionProblem p =
        attention_problem(cu_seqlens, batch, tokens, heads, kv_heads, head_dim, causal, scale, dtype);
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.lse = at<double>(lse);
    p.dout = rows(dout), p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    attention_backward(p, num_threads);
}

using Cache = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, batch, token and head stride

DecodeProblem decode_problem(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, uintptr_t lengths, float scale,
                             int dtype, Strided q, Strided out, Cache k, Cache v, int64_t prefixes, uintptr_t owner) {
    DecodeProblem p{};
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
    p.lengths = at<const int32_t>(lengths), p.scale = scale, p.dtype = dtype, p.q = rows(q), p.out = rows(out);
    p.k = at<const void>(std::get<0>(k)), p.v = at<const void>(std::get<0>(v));
    std::tie(std::ignore, p.k_batch, p.k_token, p.k_head) = k;
    std::tie(std::ignore, p.v_batch, p.v_token, p.v_head) = v;
    p.prefixes = prefixes, p.owner = at<const int32_t>(owner);
    return p;
}

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

// shape: layers, hidden, inner, vocabulary, heads, kv_heads, head_dim; weights: embedding, table of layers, norm, head, cosines, sines.
void step(const std::tuple<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, int64_t>& shape, int dtype, float eps, float scale,
          const std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>& weights, int64_t context, int64_t row_count,
          uintptr_t tokens, uintptr_t positions, uintptr_t slots, int64_t sequences, uintptr_t cu_seqlens, int64_t batch, const Cache& k, const Cache& v, int64_t k_layer, int64_t v_layer,
          int64_t page_size, int64_t page_count, int64_t width, uintptr_t pages, uintptr_t lengths, int64_t prefixes, int64_t prefix_width,
          uintptr_t prefix_pages, uintptr_t prefix_lengths, uintptr_t owner, int64_t wanted, uintptr_t last, uintptr_t logits, int num_threads) {
    const auto& [layers, hidden, inner, vocabulary, heads, kv_heads, head_dim] = shape;
    const auto& [embedding, table, norm, head, cosines, sines] = weights;
    DecodeStep s{};
    s.rows = row_count, s.layers = layers, s.hidden = hidden, s.inner = inner, s.vocabulary = vocabulary, s.dtype = dtype, s.eps = eps;
    s.embedding = at<const float>(embedding), s.layer = at<const DecodeLayer>(table), s.norm = at<const float>(norm);
    s.head = at<const void>(head), s.cosines = at<const float>(cosines), s.sines = at<const float>(sines);
    s.tokens = at<const int64_t>(tokens), s.positions = at<const int64_t>(positions), s.slots = at<const int64_t>(slots);
    s.attention = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, {}, {}, k, v, prefixes, owner);
    s.pages = {at<const int32_t>(pages), at<const int32_t>(prefix_pages), at<const int32_t>(prefix_lengths), width, prefix_width, page_size,
               page_count};
    s.k_layer = k_layer, s.v_layer = v_layer, s.sequences = sequences, s.cu_seqlens = at<const int32_t>(cu_seqlens);
    s.wanted = wanted, s.last = at<const int64_t>(last), s.logits = at<float>(logits);
    if (sequences) check_cu_seqlens(s.cu_seqlens, sequences, row_count - batch, "decode_step");
    check_range(s.tokens, row_count, vocabulary, "tokens");
    check_range(s.positions, row_count, context, "positions");
    check_range(s.slots, row_count, page_count * page_size, "slots");
    if (last) check_range(s.last, wanted, row_count, "last");
    check_pages(s.attention, s.pages, "decode_step");
    decode_step(s, num_threads);
}

void softmax(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t x, uintptr_t dy,
             uintptr_t out, int num_threads) {
    const SoftmaxProblem p{row_count, columns, dtype, at<const void>(x), at<const void>(dy), at<void>(out),
                           streams(row_count, columns, dtype, {{out, columns}})};
    (is_backward ? softmax_backward : softmax_forward)(p, num_threads);
}

void check_targets(const int64_t* targets, int64_t row_count, int64_t columns) {
    for (int64_t r = 0; r < row_count; ++r)
        if (targets[r] < 0 || targets[r] >= columns)
            throw std::invalid_argument("token_logprobs: expected targets in [0, V = " + std::to_string(columns) +
                                        "), got " + std::to_string(targets[r]));
}

void loss(bool is_backward, int64_t row_count, int64_t columns, int64_t stride, int dtype, uintptr_t logits,
          uintptr_t targets, float temperature, uintptr_t logprob, uintptr_t entropy, uintptr_t lse,
          uintptr_t logprob_grad, uintptr_t entropy_grad, uintptr_t lse_grad, int num_threads) {
    const LossProblem p{row_count, columns, stride, dtype, at<void>(logits), at<const int64_t>(targets), temperature,
                        at<float>(logprob), at<float>(entropy), at<double>(lse), at<const float>(logprob_grad),
                        at<const float>(entropy_grad), at<const float>(lse_grad)};
    check_targets(p.targets, row_count, columns);
    (is_backward ? loss_backward : loss_forward)(p, num_threads);
}

void head(bool is_backward, int64_t row_count, int64_t vocabulary, int64_t dim, uintptr_t hidden, uintptr_t weight,
          uintptr_t targets, float temperature, uintptr_t logprob, uintptr_t entropy, uintptr_t lse, uintptr_t logprob_grad,
          uintptr_t entropy_grad, uintptr_t lse_grad, uintptr_t dhidden, uintptr_t dweight, int num_threads) {
    const HeadProblem p{row_count, vocabulary, dim, at<const uint16_t>(hidden), at<const uint16_t>(weight),
                        at<const int64_t>(targets), temperature, at<float>(logprob), at<float>(entropy), at<double>(lse),
                        at<const float>(logprob_grad), at<const float>(entropy_grad), at<const float>(lse_grad), at<float>(dhidden), at<float>(dweight)};
    check_targets(p.targets, row_count, vocabulary);
    (is_backward ? head_backward : head_forward)(p, num_threads);
}

using HeadModel = std::tuple<int64_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;  // dim, hidden, weight, logprob, entropy, lse

void head_both(int64_t row_count, int64_t vocabulary, uintptr_t targets, float temperature, const HeadModel& policy, const HeadModel& reference,
               uintptr_t kl, int num_threads) {
    const auto problem = [&](const HeadModel& m) {
        HeadProblem p{};
        p.rows = row_count, p.vocabulary = vocabulary, p.dim = std::get<0>(m), p.hidden = at<const uint16_t>(std::get<1>(m));
        p.weight = at<const uint16_t>(std::get<2>(m)), p.targets = at<const int64_t>(targets), p.temperature = temperature;
        p.logprob = at<float>(std::get<3>(m)), p.entropy = at<float>(std::get<4>(m)), p.lse = at<double>(std::get<5>(m));
        return p;
    };
    check_targets(at<const int64_t>(targets), row_count, vocabulary);
    head_divergence(problem(policy), problem(reference), at<float>(kl), num_threads);
}

void diverge(int64_t row_count, int64_t columns, uintptr_t logits, uintptr_t ref, float temperature, uintptr_t lse, uintptr_t ref_lse,
             uintptr_t kl, int num_threads) {
    divergence({row_count, columns, at<const float>(logits), at<const float>(ref), temperature, at<const double>(lse),
                at<const double>(ref_lse), at<float>(kl)}, num_threads);
}

void outer_product(int64_t row_count, int64_t height, int64_t width, uintptr_t x, int64_t x_stride, uintptr_t y, int64_t y_stride,
                   uintptr_t out, int num_threads) {
    outer({row_count, height, width, at<const uint16_t>(x), at<const uint16_t>(y), x_stride, y_stride, at<float>(out)}, num_threads);
}

void product(int64_t row_count, int64_t columns, int64_t depth, int dtype, int out_dtype, uintptr_t x, uintptr_t weight,
             uintptr_t bias, uintptr_t out, int num_threads) {
    matmul({row_count, columns, depth, dtype, out_dtype, at<const void>(x), at<const void>(weight), at<const float>(bias),
            at<void>(out)}, num_threads);
}

void norm(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t x, uintptr_t residual, uintptr_t weight,
          float eps, uintptr_t y, uintptr_t total, uintptr_t scale, uintptr_t dy, uintptr_t dtotal, uintptr_t dx,
          uintptr_t dweight, int num_threads) {
    const NormProblem p{row_count, columns, dtype, at<const void>(x), at<const void>(residual), at<const float>(weight), eps,
                        at<void>(y), at<void>(total), at<float>(scale), at<const void>(dy), at<const void>(dtotal),
                        at<void>(dx), at<float>(dweight), streams(row_count, columns, dtype, {{is_backward ? dx : y, columns}})};
    (is_backward ? norm_backward : norm_forward)(p, num_threads);
}

void scan(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, double gamma, double lambda, uintptr_t rewards,
          uintptr_t values, uintptr_t advantages, uintptr_t returns, int num_threads) {
    check_cu_seqlens(at<const int32_t>(cu_seqlens), batch, tokens, "gae");
    gae({at<const int32_t>(cu_seqlens), batch, gamma, gamma * lambda, at<const float>(rewards), at<const float>(values),
         at<float>(advantages), at<float>(returns)}, num_threads);
}

void ppo(bool value, int64_t tokens, double clip, uintptr_t x, uintptr_t old, uintptr_t target, uintptr_t ref, uintptr_t grad,
         uintptr_t terms, int num_threads) {
    ppo_loss({tokens, value, clip, at<const float>(x), at<const float>(old), at<const float>(target), at<const float>(ref),
              at<float>(grad), nullptr}, at<float>(terms), num_threads);
}

void embedding(bool is_backward, int64_t tokens, int64_t vocabulary, int64_t columns, uintptr_t ids, uintptr_t from,
               int from_dtype, uintptr_t to, int to_dtype, int num_threads) {
    const EmbeddingProblem p{tokens, vocabulary, columns, at<const int64_t>(ids), at<const void>(from), from_dtype,
                             at<void>(to), to_dtype, nullptr, nullptr};
    for (int64_t n = 0; n < tokens; ++n)
        if (p.ids[n] < 0 || p.ids[n] >= vocabulary)
            throw std::invalid_argument("embedding: expected ids in [0, V = " + std::to_string(vocabulary) + "), got " +
                                        std::to_string(p.ids[n]));
    (is_backward ? embedding_backward : embedding_forward)(p, num_threads);
}

double update(int kind, int dtype, uintptr_t spans, int64_t count, double scale, double keep, double rate, double beta1,
              double beta2, double root, double eps, int num_threads) {
    const auto f = [](double x) { return static_cast<float>(x); };
    return optim({kind, dtype, at<const OptimSpan>(spans), count, f(scale), f(keep), f(rate), f(beta1), f(beta2), f(1 - beta1),
                  f(1 - beta2), f(root), f(eps)}, num_threads);
}

using Heads = std::tuple<int64_t, Strided, Strided, Strided, uintptr_t>;  // heads, x, out, dout, weight

RopeHeads rope_heads(const Heads& h) {
    return {std::get<0>(h), rows(std::get<1>(h)), rows(std::get<2>(h)), rows(std::get<3>(h)), at<const float>(std::get<4>(h))};
}

void rotate(bool is_backward, int64_t tokens, int64_t half, int dtype, uintptr_t positions, uintptr_t cosines,
            uintptr_t sines, int64_t length, float eps, const Heads& q, const Heads& k, uintptr_t dweight, int num_threads) {
    const RopeProblem p{tokens, half, dtype, at<const int64_t>(positions), at<const float>(cosines), at<const float>(sines),
                        eps, rope_heads(q), rope_heads(k), at<float>(dweight)};
    for (int64_t n = 0; n < tokens; ++n)
        if (p.positions[n] < 0 || p.positions[n] >= length)
            throw std::invalid_argument("rope: expected positions of at least 0, got " +
                                        std::to_string(p.positions[n]));
    (is_backward ? rope_backward : rope_forward)(p, num_threads);
}

void swiglu(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t gate, int64_t gate_stride,
            uintptr_t up, int64_t up_stride, uintptr_t dout, uintptr_t out, uintptr_t dgate, uintptr_t dup,
            int64_t gradient_stride, int num_threads) {
    const bool past = is_backward ? streams(row_count, columns, dtype, {{dgate, gradient_stride}, {dup, gradient_stride}})
                                  : streams(row_count, columns, dtype, {{out, columns}});
    const SwigluProblem p{row_count, columns, dtype, at<const void>(gate), at<const void>(up), gate_stride, up_stride,
                          at<const void>(dout), at<void>(out), at<void>(dgate), at<void>(dup), gradient_stride, past};
    (is_backward ? swiglu_backward : swiglu_forward)(p, num_threads);
}

// own: what rows have of their own of seed, temperature, top_k, top_p and min_p, addresses or 0.
using Own = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

void draw(int64_t row_count, int64_t columns, int64_t stride, int dtype, uintptr_t logits, int64_t seed, uintptr_t requests,
          uintptr_t steps, double temperature, int64_t top_k, double top_p, double min_p, const Own& own, uintptr_t mask,
          int64_t mask_stride, uintptr_t tokens, uintptr_t logprob, uintptr_t unfiltered, uintptr_t kept, int num_threads) {
    sample({row_count, columns, stride, dtype, at<const void>(logits), at<const int64_t>(requests), at<const int64_t>(steps),
            {static_cast<uint64_t>(seed), temperature, top_k, top_p, min_p}, at<const int64_t>(std::get<0>(own)),
            at<const int64_t>(std::get<2>(own)), at<const double>(std::get<1>(own)), at<const double>(std::get<3>(own)),
            at<const double>(std::get<4>(own)), at<const uint32_t>(mask), mask_stride, at<int64_t>(tokens), at<float>(logprob),
            at<float>(unfiltered), at<float>(kept)}, num_threads);
}

}  // namespace

void bind_ops(py::module_& m) {
    survive_forks();
    using release = py::call_guard<py::gil_scoped_release>;
    m.def("isa", &isa, "The instruction set that the CPU kernels run on.");
    m.def("cpu_features", [] {
        py::dict features;
        for (const auto& [name, has] : cpu_features()) features[py::str(name)] = has;
        return features;
    }, "CPU feature -> whether this CPU has it.");
    m.def("attention_forward", &forward, release(), "Fills out and lse.");
    m.def("attention_backward", &backward, release(), "Fills dq, dk and dv.");
    m.def("attention_decode", &decode, release(), "One query per sequence against a cache: fills out.");
    m.def("attention_paged", &paged, release(), "The same against pages of a pool.");
    m.def("packed_elements", &packed_elements, "Of a packed weight: columns, depth.");
    m.def("prefer_large_pages", &prefer_large_pages, "Of memory that nobody has written to yet: address, bytes.");
    m.def("decode_pack", &pack, release(), "Rows of a weight to columns of a packed one.");
    m.def("decode_step", &step, release(), "A token of every row through a whole decoder: fills logits, and a slot of every layer's keys and values.");
    m.def("softmax", &softmax, release(), "Row softmax (out = y) or its gradient (x = y, out = dx).");
    m.def("loss", &loss, release(), "Fills logprob, entropy and lse, or overwrites logits with their gradient.");
    m.def("has_head", &has_head, "Whether this CPU has `head`.");
    m.def("head", &head, release(), "The loss from hidden states and weight in bf16, or both gradients in fp32.");
    m.def("head_divergence", &head_both, release(), "`head` of policy and reference in one pass, and their KL.");
    m.def("divergence", &diverge, release(), "KL of two rows of fp32 logits whose log-sum-exps are known: fills kl.");
    m.def("has_outer", &has_outer, "Whether this CPU has `outer`.");
    m.def("outer", &outer_product, release(), "x^T y of bf16 in fp32: fills out.");
    m.def("norm", &norm, release(), "RMSNorm: fills y, scale and, with a residual, total; or dx and dweight.");
    m.def("matmul", &product, release(), "x w^T + bias with one order of summation: fills out.");
    m.def("gae", &scan, release(), "Fills advantages and returns.");
    m.def("ppo_loss", &ppo, release(), "One half of the PPO loss: fills terms and grad.");
    m.def("embedding", &embedding, release(), "Rows by id, or the fp32 sum of their gradients.");
    m.def("optim", &update, release(), "One pass over a table of parameters: see OptimKind. Returns a sum of squares, or 0.");
    m.def("sample", &draw, release(), "A token a row: fills tokens, its two log-probabilities and the mask's share.");
    m.def("rope", &rotate, release(), "Turns pairs of q and k, normalised where they have a weight, by their position's angles; or the gradients.");
    m.def("swiglu", &swiglu, release(), "silu(gate) * up, or dgate and dup.");
}

// The CPU kernels for Python. Arrays come as addresses with sizes and strides in elements: nanorlhf/ops allocates and
// validates shapes; here are checked the values that Python cannot check cheaply.
#include <pybind11/pybind11.h>

#include <string>
#include <tuple>

#include "bind_ops.h"
#include "isa.h"
#include "kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace {

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
    m.def("rope", &rotate, release(), "Turns pairs of q and k, normalised where they have a weight, by their position's angles; or the gradients.");
    m.def("swiglu", &swiglu, release(), "silu(gate) * up, or dgate and dup.");
}

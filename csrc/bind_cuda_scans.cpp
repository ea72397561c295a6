// Advantages, the PPO loss, sampling, the optimiser's passes and products in one order: what nanorlhf._C has of them, on the device.
#include "bind_cuda.h"
#include "gpu.h"

namespace {

void scan(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, double gamma, double lambda, uintptr_t rewards, uintptr_t values,
         uintptr_t advantages, uintptr_t returns, const Lane& lane) {
    const OnDevice on(lane);
    gpu::gae({at<const int32_t>(cu_seqlens), batch, gamma, gamma * lambda, at<const float>(rewards), at<const float>(values),
              at<float>(advantages), at<float>(returns)}, tokens, stream_of(lane));
}

void ppo(bool value, int64_t tokens, double clip, uintptr_t x, uintptr_t old, uintptr_t target, uintptr_t ref, uintptr_t grad,
              uintptr_t terms, const Lane& lane) {
    const OnDevice on(lane);
    gpu::ppo_loss({tokens, value, clip, at<const float>(x), at<const float>(old), at<const float>(target), at<const float>(ref),
                   at<float>(grad), nullptr}, at<float>(terms), workspace_of(lane, gpu::ppo_loss_workspace(tokens), "ppo_loss"),
                  stream_of(lane));
}

double update(int kind, int dtype, uintptr_t spans, int64_t count, double scale, double keep, double rate, double beta1, double beta2,
             double root, double eps, const Lane& lane) {
    const OnDevice on(lane);
    const auto f = [](double x) { return static_cast<float>(x); };
    void* const workspace = kind == OPTIM_NORM ? workspace_of(lane, gpu::optim_workspace(), "optim") : nullptr;
    gpu::optim({kind, dtype, at<const OptimSpan>(spans), count, f(scale), f(keep), f(rate), f(beta1), f(beta2), f(1 - beta1),
                f(1 - beta2), f(root), f(eps)}, workspace, stream_of(lane));
    return 0;
}

// own: what rows have of their own of seed, temperature, top_k, top_p and min_p, addresses or 0.
using Own = std::tuple<uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;

void draw(int64_t row_count, int64_t columns, int64_t stride, int dtype, uintptr_t logits, int64_t seed, uintptr_t requests,
          uintptr_t steps, double temperature, int64_t top_k, double top_p, double min_p, const Own& own, uintptr_t mask,
          int64_t mask_stride, uintptr_t tokens, uintptr_t logprob, uintptr_t unfiltered, uintptr_t kept, const Lane& lane) {
    const OnDevice on(lane);
    gpu::sample({row_count, columns, stride, dtype, at<const void>(logits), at<const int64_t>(requests), at<const int64_t>(steps),
                 {static_cast<uint64_t>(seed), temperature, top_k, top_p, min_p}, at<const int64_t>(std::get<0>(own)),
                 at<const int64_t>(std::get<2>(own)), at<const double>(std::get<1>(own)), at<const double>(std::get<3>(own)),
                 at<const double>(std::get<4>(own)), at<const uint32_t>(mask), mask_stride, at<int64_t>(tokens), at<float>(logprob),
                 at<float>(unfiltered), at<float>(kept)},
                workspace_of(lane, gpu::sample_workspace(row_count, columns), "sample"), stream_of(lane));
}

void product(int64_t row_count, int64_t columns, int64_t depth, int dtype, int out_dtype, uintptr_t x, uintptr_t weight, uintptr_t bias,
            uintptr_t out, const Lane& lane) {
    const OnDevice on(lane);
    gpu::matmul({row_count, columns, depth, dtype, out_dtype, at<const void>(x), at<const void>(weight), at<const float>(bias),
                 at<void>(out)}, stream_of(lane));
}

}  // namespace

void bind_cuda_scans(py::module_& m) {
    m.def("gae", &scan, release(), "Fills advantages and returns.");
    m.def("ppo_loss", &ppo, release(), "One half of the PPO loss: fills terms and grad.");
    m.def("ppo_loss_workspace", &gpu::ppo_loss_workspace, "tokens -> bytes");
    m.def("optim", &update, release(), "One pass over a table on the device; a sum of squares is left at the start of the workspace.");
    m.def("optim_workspace", [](int64_t) { return gpu::optim_workspace(); }, "number of spans -> bytes");
    m.def("sample", &draw, release(), "A token a row, -1 where there is nothing to draw: fills tokens, its two log-probabilities, the mask's share.");
    m.def("sample_workspace", &gpu::sample_workspace, "rows, columns -> bytes");
    m.def("matmul", &product, release(), "x w^T + bias with one order of summation: fills out.");
}

// The kernels of rows for Python: the functions of bind_ops.cpp on the device. Values that only the device can see (targets, ids,
// positions) are not checked: out of range they give NaN there.
#include "bind_cuda.h"
#include "gpu.h"

namespace {

// The lane's workspace where it has one of this size: it only saves time.
void* workspace_if(const Lane& lane, int64_t bytes) { return bytes && std::get<3>(lane) >= bytes ? at<void>(std::get<2>(lane)) : nullptr; }

void softmax(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t x, uintptr_t dy, uintptr_t out, const Lane& lane) {
    OnDevice on(lane);
    const SoftmaxProblem p{row_count, columns, dtype, at<const void>(x), at<const void>(dy), at<void>(out), false};
    if (is_backward) return gpu::softmax_backward(p, stream_of(lane));
    gpu::softmax_forward(p, workspace_if(lane, gpu::softmax_workspace(row_count, columns)), stream_of(lane));
}

void loss(bool is_backward, int64_t row_count, int64_t columns, int64_t stride, int dtype, uintptr_t logits, uintptr_t targets,
          float temperature, uintptr_t logprob, uintptr_t entropy, uintptr_t lse, uintptr_t logprob_grad, uintptr_t entropy_grad,
          uintptr_t lse_grad, const Lane& lane) {
    OnDevice on(lane);
    const LossProblem p{row_count, columns, stride, dtype, at<void>(logits), at<const int64_t>(targets), temperature,
                        at<float>(logprob), at<float>(entropy), at<double>(lse), at<const float>(logprob_grad),
                        at<const float>(entropy_grad), at<const float>(lse_grad)};
    if (is_backward) return gpu::loss_backward(p, stream_of(lane));
    gpu::loss_forward(p, workspace_if(lane, gpu::loss_workspace(row_count, columns)), stream_of(lane));
}

void norm(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t x, uintptr_t residual, uintptr_t weight, float eps,
          uintptr_t y, uintptr_t total, uintptr_t scale, uintptr_t dy, uintptr_t dtotal, uintptr_t dx, uintptr_t dweight,
          const Lane& lane) {
    OnDevice on(lane);
    const NormProblem p{row_count, columns, dtype, at<const void>(x), at<const void>(residual), at<const float>(weight), eps,
                        at<void>(y), at<void>(total), at<float>(scale), at<const void>(dy), at<const void>(dtotal), at<void>(dx),
                        at<float>(dweight), false};
    if (!is_backward) return gpu::norm_forward(p, stream_of(lane));
    gpu::norm_backward(p, workspace_of(lane, gpu::norm_workspace(row_count, columns), "rms_norm"), stream_of(lane));
}

void swiglu(bool is_backward, int64_t row_count, int64_t columns, int dtype, uintptr_t gate, int64_t gate_stride, uintptr_t up,
            int64_t up_stride, uintptr_t dout, uintptr_t out, uintptr_t dgate, uintptr_t dup, int64_t gradient_stride, const Lane& lane) {
    OnDevice on(lane);
    const SwigluProblem p{row_count, columns, dtype, at<const void>(gate), at<const void>(up), gate_stride, up_stride,
                          at<const void>(dout), at<void>(out), at<void>(dgate), at<void>(dup), gradient_stride, false};
    (is_backward ? gpu::swiglu_backward : gpu::swiglu_forward)(p, stream_of(lane));
}

using Heads = std::tuple<int64_t, Strided, Strided, Strided, uintptr_t>;  // heads, x, out, dout, weight

RopeHeads rope_heads(const Heads& h) {
    return {std::get<0>(h), rows(std::get<1>(h)), rows(std::get<2>(h)), rows(std::get<3>(h)), at<const float>(std::get<4>(h))};
}

// In the place of the table of cosines come the fp64 angles of one position; `sines` and `length` say nothing.
void rotate(bool is_backward, int64_t tokens, int64_t half, int dtype, uintptr_t positions, uintptr_t frequencies, uintptr_t, int64_t,
            float eps, const Heads& q, const Heads& k, uintptr_t dweight, const Lane& lane) {
    OnDevice on(lane);
    const RopeProblem p{tokens, half, dtype, at<const int64_t>(positions), nullptr, nullptr, eps, rope_heads(q), rope_heads(k),
                        at<float>(dweight)};
    if (!is_backward) return gpu::rope_forward(p, at<const double>(frequencies), stream_of(lane));
    void* workspace = dweight ? workspace_of(lane, gpu::rope_workspace(tokens, half), "rope") : nullptr;
    gpu::rope_backward(p, at<const double>(frequencies), workspace, stream_of(lane));
}

void embedding(bool is_backward, int64_t tokens, int64_t vocabulary, int64_t columns, uintptr_t ids, uintptr_t from, int from_dtype,
               uintptr_t to, int to_dtype, const Lane& lane) {
    OnDevice on(lane);
    const EmbeddingProblem p{tokens, vocabulary, columns, at<const int64_t>(ids), at<const void>(from), from_dtype, at<void>(to), to_dtype,
                             nullptr, nullptr};
    if (!is_backward) return gpu::embedding_forward(p, stream_of(lane));
    gpu::embedding_backward(p, workspace_of(lane, gpu::embedding_workspace(tokens, vocabulary), "embedding"), stream_of(lane));
}

}  // namespace

void bind_cuda_rows(py::module_& m) {
    m.def("softmax", &softmax, release(), "Row softmax (out = y) or its gradient (x = y, out = dx).");
    m.def("loss", &loss, release(), "Fills logprob, entropy and lse, or overwrites logits with their gradient.");
    m.def("norm", &norm, release(), "RMSNorm: fills y, scale and, with a residual, total; or dx and dweight.");
    m.def("swiglu", &swiglu, release(), "silu(gate) * up, or dgate and dup.");
    m.def("rope", &rotate, release(), "Turns pairs of q and k, normalised where they have a weight, by their position's angles; or the "
          "gradients.");
    m.def("embedding", &embedding, release(), "Rows by id, or the fp32 sum of their gradients.");
    m.def("softmax_workspace", &gpu::softmax_workspace, "Bytes with which a few long rows are faster, or 0.");
    m.def("loss_workspace", &gpu::loss_workspace, "Bytes with which long rows are faster, or 0; forward's.");
    m.def("norm_workspace", &gpu::norm_workspace, "Bytes that the gradient needs.");
    m.def("rope_workspace", &gpu::rope_workspace, "Bytes that the gradient needs where heads are normalised.");
    m.def("embedding_workspace", &gpu::embedding_workspace, "Bytes that the gradient needs.");
}

#include "attention_gpu.h"
#include "bind_cuda.h"

namespace {

AttentionProblem problem_of(uintptr_t cu_seqlens, int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal,
                            float scale, int dtype) {
    AttentionProblem p{};
    p.cu_seqlens = at<const int32_t>(cu_seqlens);
    p.batch = batch, p.heads = heads, p.kv_heads = kv_heads, p.head_dim = head_dim;
    p.causal = causal, p.scale = scale, p.dtype = dtype;
    return p;
}

void forward(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal,
             float scale, int dtype, Strided q, Strided k, Strided v, Strided out, uintptr_t lse, const Lane& lane) {
    const OnDevice on(lane);
    AttentionProblem p = problem_of(cu_seqlens, batch, heads, kv_heads, head_dim, causal, scale, dtype);
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.lse = at<double>(lse);
    void* workspace = workspace_of(lane, gpu::attention_workspace(batch, tokens, heads, kv_heads, head_dim, dtype), "attention");
    gpu::attention_forward(p, tokens, workspace, stream_of(lane));
}

void backward(uintptr_t cu_seqlens, int64_t batch, int64_t tokens, int64_t heads, int64_t kv_heads, int64_t head_dim, bool causal,
              float scale, int dtype, Strided q, Strided k, Strided v, Strided out, uintptr_t lse, Strided dout, Strided dq,
              Strided dk, Strided dv, const Lane& lane) {
    const OnDevice on(lane);
    AttentionProblem p = problem_of(cu_seqlens, batch, heads, kv_heads, head_dim, causal, scale, dtype);
    p.q = rows(q), p.k = rows(k), p.v = rows(v), p.out = rows(out), p.lse = at<double>(lse);
    p.dout = rows(dout), p.dq = rows(dq), p.dk = rows(dk), p.dv = rows(dv);
    void* workspace =
        workspace_of(lane, gpu::attention_backward_workspace(batch, tokens, heads, kv_heads, head_dim, dtype), "attention_backward");
    gpu::attention_backward(p, tokens, workspace, stream_of(lane));
}

std::vector<std::string> variants() {
#ifdef NANORLHF_SM90
    return {"portable", "sm90"};
#else
    return {"portable"};
#endif
}

}  // namespace

void bind_cuda_attention(py::module_& m) {
    m.def("attention_forward", &forward, release(), "Fills out and lse.");
    m.def("attention_backward", &backward, release(), "Fills dq, dk and dv.");
    m.def("attention_workspace", &gpu::attention_workspace, "Bytes that attention_forward wants.");
    m.def("attention_backward_workspace", &gpu::attention_backward_workspace, "Bytes that attention_backward wants.");
    m.def("attention_variant", [](const std::string& name) { return gpu::attention_variant(name.c_str()); },
          "Which bf16 kernels run from now on: auto, or one of attention_variants. Returns the one before.");
    m.def("attention_variants", &variants, "The bf16 kernels that are compiled in.");
}

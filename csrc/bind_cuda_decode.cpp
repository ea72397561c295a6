// Decode attention for Python.
#include "bind_cuda.h"
#include "gpu.h"

namespace {

void run(const DecodeProblem& p, int64_t capacity, int64_t tokens, const DecodePages& pages, const Lane& lane) {
    OnDevice on(lane);
    const int64_t bytes = gpu::attention_decode_workspace(p.batch, p.heads, p.kv_heads, p.head_dim, capacity, p.prefixes, tokens);
    gpu::attention_decode(p, capacity, tokens, pages, workspace_of(lane, bytes, "attention_decode"), stream_of(lane));
}

void refuse(bool as_forward) {
    if (as_forward)
        throw std::invalid_argument("attention_decode: the CUDA kernels cannot give the bits of attention, which deterministic asks for");
}

void decode(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t capacity, uintptr_t lengths, float scale,
            int dtype, Strided q, Strided out, Cache k, Cache v, int64_t prefixes, uintptr_t prefix_bounds, int64_t tokens, uintptr_t owner,
            Strided prefix_k, Strided prefix_v, bool as_forward, const Lane& lane) {
    refuse(as_forward);
    DecodeProblem p = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, q, out, k, v, prefixes, owner);
    p.prefix_bounds = at<const int32_t>(prefix_bounds), p.prefix_k = rows(prefix_k), p.prefix_v = rows(prefix_v);
    run(p, capacity, tokens, {}, lane);
}

void paged(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, int64_t page_size, int64_t page_count, int64_t width,
           uintptr_t pages, uintptr_t lengths, float scale, int dtype, Strided q, Strided out, Cache k, Cache v, int64_t prefixes,
           int64_t prefix_width, uintptr_t prefix_pages, uintptr_t prefix_lengths, uintptr_t owner, bool as_forward, const Lane& lane) {
    refuse(as_forward);
    const DecodeProblem p = decode_problem(batch, heads, kv_heads, head_dim, lengths, scale, dtype, q, out, k, v, prefixes, owner);
    const DecodePages in_pages{at<const int32_t>(pages), at<const int32_t>(prefix_pages), at<const int32_t>(prefix_lengths),
                                    width, prefix_width, page_size, page_count};
    run(p, width * page_size, prefix_width * page_size, in_pages, lane);
}

}  // namespace

void bind_cuda_decode(py::module_& m) {
    m.def("attention_decode", &decode, release(), "One query per sequence against a cache: fills out.");
    m.def("attention_paged", &paged, release(), "The same against pages of a pool.");
    m.def("attention_decode_workspace", &gpu::attention_decode_workspace, "Bytes of workspace of either.");
}

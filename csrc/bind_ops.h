// What the bindings of the kernels share, on CPU and GPU: arrays come as addresses with sizes and strides in elements.
#pragma once
#include <cstdint>
#include <stdexcept>
#include <string>
#include <tuple>

#include "attention.h"

using Strided = std::tuple<uintptr_t, int64_t, int64_t>;  // address, token stride, head stride

template <class T>
inline T* at(uintptr_t address) {
    return reinterpret_cast<T*>(address);
}
inline Rows rows(const Strided& s) { return {at<void>(std::get<0>(s)), std::get<1>(s), std::get<2>(s)}; }

inline void check_cu_seqlens(const int32_t* cu_seqlens, int64_t batch, int64_t tokens, const std::string& op = "attention") {
    bool ok = cu_seqlens[0] == 0 && cu_seqlens[batch] == tokens;
    for (int64_t b = 0; b < batch; ++b) ok = ok && cu_seqlens[b] <= cu_seqlens[b + 1];
    if (!ok)
        throw std::invalid_argument(op + ": expected cu_seqlens to rise from 0 to N = " + std::to_string(tokens));
}

using Cache = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;  // address, batch (or page), token and head stride

inline DecodeProblem decode_problem(int64_t batch, int64_t heads, int64_t kv_heads, int64_t head_dim, uintptr_t lengths, float scale,
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

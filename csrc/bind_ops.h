// What the bindings of the CPU kernels share: arrays come as addresses with sizes and strides in elements.
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

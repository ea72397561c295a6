// Splitting text with AVX-512. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>
#include <cstring>

#include "split.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt")

namespace pretokenize {
namespace {

struct Block {
    __m512i x;
    explicit Block(const uint8_t* p) : x(_mm512_loadu_si512(p)) {}
    explicit Block(__m512i bytes) : x(bytes) {}
    uint64_t is(int c) const { return _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8(static_cast<char>(c))); }
    uint64_t in(int first, int count) const {
        const __m512i moved = _mm512_sub_epi8(x, _mm512_set1_epi8(static_cast<char>(first)));
        return _mm512_cmplt_epu8_mask(moved, _mm512_set1_epi8(static_cast<char>(count)));
    }
    uint64_t high() const { return _mm512_movepi8_mask(x); }
    Block folded() const { return Block(_mm512_or_si512(x, _mm512_set1_epi8(0x20))); }
};

}  // namespace
}  // namespace pretokenize

#define SCAN_FUNCTION scan_avx512
#include "scan.inc"
#endif

// Splitting text with AVX-512. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>
#include <cstring>

#include "split.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt")
#define SCAN_FUNCTION scan_avx512

#include "scan.inc"

namespace pretokenize {
namespace {

// Where 0 <= x - first < count, on unsigned bytes.
inline uint64_t in(__m512i x, char first, char count) {
    return _mm512_cmplt_epu8_mask(_mm512_sub_epi8(x, _mm512_set1_epi8(first)), _mm512_set1_epi8(count));
}

inline uint64_t is(__m512i x, char c) { return _mm512_cmpeq_epi8_mask(x, _mm512_set1_epi8(c)); }

template <Pattern P>
inline uint64_t ascii_masks(const uint8_t* p, Window& w) {
    const __m512i x = _mm512_loadu_si512(p);
    w.letter = in(_mm512_or_si512(x, _mm512_set1_epi8(0x20)), 'a', 26);
    w.number = in(x, '0', 10);
    w.blank = is(x, ' ');
    w.space = in(x, '\t', 5) | w.blank;
    w.newline = is(x, '\n') | is(x, '\r');
    w.quote = is(x, '\'');
    if (P == Pattern::o200k) {
        w.upper = in(x, 'A', 26);
        w.lower = w.letter & ~w.upper;
        w.slash = is(x, '/');
    }
    return _mm512_movepi8_mask(x);
}

}  // namespace
}  // namespace pretokenize
#endif

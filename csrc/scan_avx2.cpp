// Splitting text with AVX2. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>
#include <cstring>

#include "split.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")
#define SCAN_FUNCTION scan_avx2

#include "scan.inc"

namespace pretokenize {
namespace {

// One bit a byte of two registers.
inline uint64_t bits(__m256i low, __m256i high) {
    return static_cast<uint32_t>(_mm256_movemask_epi8(low)) |
           static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(high))) << 32;
}

// Where 0 <= x - first < count, on unsigned bytes.
inline __m256i within(__m256i x, char first, char count) {
    const __m256i moved = _mm256_sub_epi8(x, _mm256_set1_epi8(first));
    return _mm256_cmpeq_epi8(_mm256_min_epu8(moved, _mm256_set1_epi8(static_cast<char>(count - 1))), moved);
}

inline uint64_t in(__m256i low, __m256i high, char first, char count) {
    return bits(within(low, first, count), within(high, first, count));
}

inline uint64_t is(__m256i low, __m256i high, char c) {
    return bits(_mm256_cmpeq_epi8(low, _mm256_set1_epi8(c)), _mm256_cmpeq_epi8(high, _mm256_set1_epi8(c)));
}

template <Pattern P>
inline uint64_t ascii_masks(const uint8_t* p, Window& w) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + 32));
    const __m256i fold = _mm256_set1_epi8(0x20);
    w.letter = in(_mm256_or_si256(low, fold), _mm256_or_si256(high, fold), 'a', 26);
    w.number = in(low, high, '0', 10);
    w.blank = is(low, high, ' ');
    w.space = in(low, high, '\t', 5) | w.blank;
    w.newline = is(low, high, '\n') | is(low, high, '\r');
    w.quote = is(low, high, '\'');
    if (P == Pattern::o200k) {
        w.upper = in(low, high, 'A', 26);
        w.lower = w.letter & ~w.upper;
        w.slash = is(low, high, '/');
    }
    return bits(low, high);
}

}  // namespace
}  // namespace pretokenize
#endif

// Splitting text with AVX2. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>
#include <cstring>

#include "split.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")

namespace pretokenize {
namespace {

struct Block {
    __m256i low, high_half;
    explicit Block(const uint8_t* p) : Block(load(p), load(p + 32)) {}
    Block(__m256i a, __m256i b) : low(a), high_half(b) {}
    static __m256i load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }

    // One bit a byte of two registers.
    static uint64_t bits(__m256i a, __m256i b) {
        return static_cast<uint32_t>(_mm256_movemask_epi8(a)) |
               static_cast<uint64_t>(static_cast<uint32_t>(_mm256_movemask_epi8(b))) << 32;
    }
    static __m256i within(__m256i x, int first, int count) {
        const __m256i moved = _mm256_sub_epi8(x, _mm256_set1_epi8(static_cast<char>(first)));
        return _mm256_cmpeq_epi8(_mm256_min_epu8(moved, _mm256_set1_epi8(static_cast<char>(count - 1))), moved);
    }
    uint64_t is(int c) const {
        const __m256i wanted = _mm256_set1_epi8(static_cast<char>(c));
        return bits(_mm256_cmpeq_epi8(low, wanted), _mm256_cmpeq_epi8(high_half, wanted));
    }
    uint64_t in(int first, int count) const { return bits(within(low, first, count), within(high_half, first, count)); }
    uint64_t high() const { return bits(low, high_half); }
    Block folded() const {
        const __m256i bit = _mm256_set1_epi8(0x20);
        return Block(_mm256_or_si256(low, bit), _mm256_or_si256(high_half, bit));
    }
};

}  // namespace
}  // namespace pretokenize

#define SCAN_FUNCTION scan_avx2
#include "scan.inc"
#endif

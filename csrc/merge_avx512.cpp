// Merging with AVX-512. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>

#include "bpe_merge.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx2,bmi,bmi2,lzcnt,popcnt")

namespace bpe {
namespace {

template <size_t kLanes>
struct Lanes {
    static constexpr size_t kRegisters = kLanes / 16;
    __m512i candidates[kRegisters];

    [[gnu::always_inline]] explicit Lanes(const int32_t* from) {
        for (size_t r = 0; r < kRegisters; r++) candidates[r] = _mm512_load_si512(from + 16 * r);
    }
    [[gnu::always_inline]] void set(int place, int32_t candidate) {
        const uint64_t bit = place < 0 ? 0 : 1ull << place;
        for (size_t r = 0; r < kRegisters; r++)
            candidates[r] = _mm512_mask_set1_epi32(candidates[r], static_cast<__mmask16>(bit >> 16 * r), candidate);
    }
    [[gnu::always_inline]] int32_t lowest() const {
        __m512i low = candidates[0];
        for (size_t r = 1; r < kRegisters; r++) low = _mm512_min_epi32(low, candidates[r]);
        return _mm512_reduce_min_epi32(low);
    }
};

[[gnu::always_inline]] inline uint32_t match(const RankTable::Bucket& bucket, uint32_t tag) {
    const __mmask8 same = _mm256_cmpeq_epi32_mask(_mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.tags)),
                                                  _mm256_set1_epi32(static_cast<int>(tag)));
    const __m256i ranks = _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.ranks));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm256_castsi256_si128(_mm256_maskz_compress_epi32(same, ranks))));
}

[[gnu::always_inline]] inline uint32_t* put_starts(const Window& window, uint64_t starts, uint32_t* to) {
    for (size_t i = 0; i < Window::kWidth; i += 16, starts >>= 16) {
        const __mmask16 some = static_cast<__mmask16>(starts);
        _mm512_storeu_si512(to, _mm512_maskz_compress_epi32(some, _mm512_loadu_si512(window.tokens() + i)));
        to += __builtin_popcount(some);
    }
    return to;
}

}  // namespace
}  // namespace bpe

#define MERGE_TABLE merge_avx512
#include "merge.inc"
#endif

// Merging with AVX2. As in kernels_avx2.cpp, headers come before the pragma.
#include <algorithm>

#include "bpe_merge.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx2,bmi,bmi2,lzcnt,popcnt")

namespace bpe {
namespace {

template <size_t kLanes>
struct Lanes {
    static constexpr size_t kRegisters = kLanes / 8;
    __m256i candidates[kRegisters];

    [[gnu::always_inline]] explicit Lanes(const int32_t* from) {
        for (size_t r = 0; r < kRegisters; r++)
            candidates[r] = _mm256_load_si256(reinterpret_cast<const __m256i*>(from + 8 * r));
    }
    [[gnu::always_inline]] void set(int place, int32_t candidate) {
        const __m256i wanted = _mm256_set1_epi32(place), value = _mm256_set1_epi32(candidate);
        const __m256i first = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
        for (size_t r = 0; r < kRegisters; r++) {
            const __m256i places = _mm256_add_epi32(first, _mm256_set1_epi32(static_cast<int>(8 * r)));
            candidates[r] = _mm256_blendv_epi8(candidates[r], value, _mm256_cmpeq_epi32(places, wanted));
        }
    }
    [[gnu::always_inline]] int32_t lowest() const {
        __m256i low = candidates[0];
        for (size_t r = 1; r < kRegisters; r++) low = _mm256_min_epi32(low, candidates[r]);
        __m128i four = _mm_min_epi32(_mm256_castsi256_si128(low), _mm256_extracti128_si256(low, 1));
        four = _mm_min_epi32(four, _mm_shuffle_epi32(four, 0x4E));
        return _mm_cvtsi128_si32(_mm_min_epi32(four, _mm_shuffle_epi32(four, 0xB1)));
    }
};

[[gnu::always_inline]] inline uint32_t match(const RankTable::Bucket& bucket, uint32_t tag) {
    const __m256i same = _mm256_cmpeq_epi32(_mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.tags)),
                                            _mm256_set1_epi32(static_cast<int>(tag)));
    const __m256i hit = _mm256_and_si256(same, _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.ranks)));
    const __m128i four = _mm_or_si128(_mm256_castsi256_si128(hit), _mm256_extracti128_si256(hit, 1));
    const __m128i two = _mm_or_si128(four, _mm_shuffle_epi32(four, 0x4E));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(_mm_or_si128(two, _mm_shuffle_epi32(two, 0xB1))));
}

[[gnu::always_inline]] inline uint32_t* put_starts(const Window& window, uint64_t starts, uint32_t* to) {
    for (; starts; starts &= starts - 1) *to++ = window.tokens()[__builtin_ctzll(starts)];
    return to;
}

}  // namespace
}  // namespace bpe

#define MERGE_TABLE merge_avx2
#include "merge.inc"
#endif

// A token for each row of logits, drawn by inversion of the cumulative softmax in the order of the vocabulary, and its
// log-probability under what was drawn from and under the unfiltered softmax. logits: (rows, columns), fp32 or bf16.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define ON_BOTH __host__ __device__
#else
#define ON_BOTH
#endif

struct SampleSettings {
    uint64_t seed;
    double temperature;  // 0: the first of the largest logits, and the unfiltered softmax is that of 1
    int64_t top_k;       // 0: all. Then top_p (1: all), then min_p (0: all)
    double top_p, min_p;
};

struct SampleProblem {
    int64_t rows, columns, stride;  // stride of a row in elements
    int dtype;
    const void* logits;
    const int64_t *requests, *steps;  // (rows,): a row's random number is a function of (seed, request, step)
    SampleSettings common;            // of every row, but for those settings that each row has of its own, (rows,) or null
    const int64_t *own_seed, *own_top_k;
    const double *own_temperature, *own_top_p, *own_min_p;
    const uint32_t* mask;  // (rows, ceil(columns / 32)) or null: bit j % 32 of word j / 32 is set where token j may come
    int64_t mask_stride;   // of a row, in words
    int64_t* tokens;       // (rows,); the kernel leaves one below 0 where there is nothing to draw
    float *logprob, *unfiltered, *kept;  // (rows,); kept: the mask's share of the unfiltered softmax

    ON_BOTH SampleSettings of(int64_t r) const {
        return {own_seed ? static_cast<uint64_t>(own_seed[r]) : common.seed,
                own_temperature ? own_temperature[r] : common.temperature, own_top_k ? own_top_k[r] : common.top_k,
                own_top_p ? own_top_p[r] : common.top_p, own_min_p ? own_min_p[r] : common.min_p};
    }
};

// Values of a token that is none: the row holds NaN or +inf, or nothing above -inf; the mask allows nothing above -inf.
constexpr int64_t SAMPLE_NO_ROW = -1, SAMPLE_NO_MASK = -2;

// Weights are e^((x - best) / T) for the best token that the mask allows: the bits that they have where the others are -inf. The
// others' sum shares these exponentials while none is above this; else it is made of its own, against the row's maximum.
constexpr float SAMPLE_NEAR = 16.0f;

// Floats that one thread's work takes: the weights, the least kept ones twice over, and sums and maxima of blocks.
constexpr int64_t sample_room(int64_t columns) { return 4 * columns + 4096; }

// Throws std::invalid_argument, naming the row, for those two and for settings out of range.
void sample(const SampleProblem& problem, int num_threads);

// A token for each row of logits, drawn by inversion of the cumulative softmax in the order of the vocabulary, and its
// log-probability under what was drawn from and under the unfiltered softmax. logits: (rows, columns), fp32 or bf16.
#pragma once
#include <cstdint>

struct SampleProblem {
    int64_t rows, columns, stride;  // stride of a row in elements
    int dtype;
    const void* logits;
    uint64_t seed;
    const int64_t *requests, *steps;  // (rows,): a row's random number is a function of (seed, request, step)
    double temperature;               // 0: the first of the largest logits, and the unfiltered softmax is that of 1
    int64_t top_k;                    // 0: all. Then top_p (1: all), then min_p (0: all)
    double top_p, min_p;
    int64_t* tokens;           // (rows,); the kernel leaves -1 where a row is no distribution
    float *logprob, *unfiltered;  // (rows,)
};

// Floats that one thread's work takes: the weights, the least kept ones twice over, and sums and maxima of blocks.
constexpr int64_t sample_room(int64_t columns) { return 4 * columns + 4096; }

// Throws std::invalid_argument, naming the row, where logits hold NaN or +inf, or nothing above -inf.
void sample(const SampleProblem& problem, int num_threads);

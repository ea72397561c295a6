// The table of CPU kernels, filled once per instruction set by kernels_*.cpp. A kernel does one task on one thread,
// with memory given by its caller; the loops over tasks and threads are in attention.cpp, softmax.cpp and so on.
#pragma once
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "attention.h"
#include "decode_step.h"
#include "embedding.h"
#include "gae.h"
#include "head.h"
#include "loss.h"
#include "matmul.h"
#include "norm.h"
#include "ppo_loss.h"
#include "optim.h"
#include "outer.h"
#include "rope.h"
#include "sample.h"
#include "softmax.h"
#include "swiglu.h"

enum Dtype : int { FLOAT32 = 0, BFLOAT16 = 1 };

struct Kernels {
    void (*attention_forward)(const AttentionTask& task, float* scratch);
    void (*attention_backward)(const AttentionTask& task, float* scratch);
    void (*attention_prefix)(const AttentionTask& task, float* scratch);  // fp32 output, start 0, not causal
    // Task = sequence * kv_heads + kv_head, from `begin` to `end`, after which the same thread will go on with task `following`, or with none (-1).
    void (*attention_decode)(const DecodeProblem& problem, int64_t begin, int64_t end, int64_t following, float* scratch);
    // scratch: a row of floats.
    void (*softmax_forward)(const SoftmaxProblem& problem, int64_t begin, int64_t end, float* scratch);
    void (*softmax_backward)(const SoftmaxProblem& problem, int64_t begin, int64_t end);
    void (*loss_forward)(const LossProblem& problem, int64_t begin, int64_t end);
    void (*loss_backward)(const LossProblem& problem, int64_t begin, int64_t end);
    void (*divergence)(const DivergenceProblem& problem, int64_t begin, int64_t end);
    void (*norm_forward)(const NormProblem& problem, int64_t begin, int64_t end);
    // Adds to `dweight`, whose room is a whole number of registers.
    void (*norm_backward)(const NormProblem& problem, int64_t begin, int64_t end, float* dweight);
    // Elements [begin, begin + count) of one array; returns the sum of squares of OPTIM_NORM.
    double (*optim)(const OptimProblem& problem, const OptimSpan& span, int64_t begin, int64_t count);
    void (*sample)(const SampleProblem& problem, int64_t begin, int64_t end, float* scratch);  // of sample_room floats
    void (*rope_forward)(const RopeProblem& problem, int64_t begin, int64_t end);
    // Adds to `dweight`, laid out as RopeProblem's.
    void (*rope_backward)(const RopeProblem& problem, int64_t begin, int64_t end, float* dweight);
    void (*swiglu_forward)(const SwigluProblem& problem, int64_t begin, int64_t end);
    void (*swiglu_backward)(const SwigluProblem& problem, int64_t begin, int64_t end);
    // [begin, end) are episodes, blocks of PPO_BLOCK tokens, tokens, rows of the weight.
    void (*gae)(const GaeProblem& problem, int64_t begin, int64_t end);
    void (*ppo_loss)(const PpoLossProblem& problem, int64_t begin, int64_t end);
    void (*embedding_forward)(const EmbeddingProblem& problem, int64_t begin, int64_t end);
    void (*embedding_backward)(const EmbeddingProblem& problem, int64_t begin, int64_t end);
    void (*matmul)(const MatmulProblem& problem, const MatmulTask& task, float* scratch);
    void (*decode_pack)(const PackProblem& problem, int64_t begin, int64_t end);
    // At most PRODUCT_ROWS rows; columns from a multiple of PRODUCT_COLUMNS on.
    void (*decode_product)(const PackedProduct& problem, int64_t row, int64_t row_end, int64_t column, int64_t column_end);
    // Null where there are no products of bf16.
    void (*head_forward)(const HeadProblem& problem, int64_t begin, int64_t end, float* scratch);
    void (*head_divergence)(const HeadProblem& policy, const HeadProblem& reference, float* kl, int64_t begin, int64_t end, float* scratch);
    HeadRows (*head_pack)(const HeadProblem& problem, uint16_t* memory);
    void (*head_backward)(const HeadProblem& problem, const HeadRows& hidden, int64_t begin, int64_t end, float* dhidden,
                          float* scratch);
    // Null where there is no AMX. The columns [begin, end) of x; begin is a multiple of 32.
    void (*outer)(const OuterProblem& problem, int64_t begin, int64_t end, float* scratch);
};

extern const Kernels kernels_portable;
#if defined(__x86_64__)
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;
extern const Kernels kernels_avx512bf16;  // the same, with products of bf16 where a kernel has them
extern const Kernels kernels_amx;         // the same, those products by AMX tiles
#endif

// What both halves of attention's backward for Hopper start from.
#pragma once
#include "attention_sm90.cuh"

namespace {

struct BackwardProblem {
    Items of_keys, of_queries;
    Rows dq, dk, dv;
    const float *lse2, *delta;
    int64_t stride;  // of those, from head to head
    int heads, group;
    bool causal;
    float scale, scale2;  // the latter of exponents in base 2
};

constexpr int BACKWARD_CONSUMERS = 2, BACKWARD_TILE = BACKWARD_CONSUMERS * GROUP_ROWS, BACKWARD_QUERIES = 64;

}  // namespace

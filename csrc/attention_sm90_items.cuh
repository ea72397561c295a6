// What both halves of attention's backward for Hopper start from: the problem, and items of work that blocks take one by one.
#pragma once
#include "attention_sm90.cuh"

namespace {

// Items of work that the blocks take one after the other: a tile's heads, then the next one's.
struct Items {
    const AttentionTile* tiles;
    int32_t* taken;
    int count, heads;
};

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

// One thread: the next item.
DEVICE Item take(const Items& from) {
    const int index = atomicAdd(from.taken, 1);
    return {index < from.count ? from.tiles[index / from.heads] : AttentionTile{0, 0, 0, 0, -1, 0, 0, 0}, index % from.heads};
}

}  // namespace

// Rows of a (vocabulary, columns) weight by token id, rounded to the dtype asked for; and the sum of each row's gradients.
#pragma once
#include <cstdint>

struct EmbeddingProblem {
    int64_t tokens, vocabulary, columns;
    const int64_t* ids;  // (tokens,), each in [0, vocabulary): checked by the caller
    const void* from;    // forward: weight (vocabulary, columns); backward: gradient (tokens, columns)
    int from_dtype;
    void* to;            // forward: (tokens, columns); backward: (vocabulary, columns), fp32
    int to_dtype;
    const int64_t *order, *starts;  // backward, filled there: tokens row by row; row r's begin at starts[r] - r
};

void embedding_forward(const EmbeddingProblem& problem, int num_threads);
// A row's gradients are added in fp32 in the order of their tokens, by one thread: the result does not depend on how many
// there are.
void embedding_backward(const EmbeddingProblem& problem, int num_threads);

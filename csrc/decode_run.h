// Several tokens of every row, one after another, without a word to Python between them.
#pragma once
#include "decode_step.h"
#include "sample.h"
#include "token_mask.h"

struct DecodeRun {
    DecodeStep first;      // without slots: each token's own is the row's page for its length; all rows are in pages
    SampleProblem draws;   // without logits; its steps are those of the first draw; what it fills is (most, rows)
    int64_t most;          // steps; the rows have pages for so many tokens more
    const uint8_t* stops;  // (lists, vocabulary): 1 where a token ends a row
    const int64_t* stop_of;  // (rows,): the row's list
    std::vector<token_mask::Masks*> masks;  // (rows,) or none: what a row has to keep to, or null
    std::vector<int32_t> nodes;             // and where it is, which is moved along
};

// Returns how many steps were made: most, or fewer, up to one in which a row ended or after which its masks allow nothing, or up to one whose
// logits are no distribution. Where that is the first it throws as `sample` does.
int64_t decode_run(DecodeRun& run, int num_threads);

#include "decode_run.h"

#include <algorithm>
#include <stdexcept>
#include <vector>

int64_t decode_run(const DecodeRun& run, int num_threads) {
    DecodeStep p = run.first;
    SampleProblem s = run.draws;
    const int64_t rows = p.rows;
    std::vector<int64_t> positions(p.positions, p.positions + rows), slots(rows), steps(s.steps, s.steps + rows);
    std::vector<int32_t> lengths(p.attention.lengths, p.attention.lengths + rows);
    std::vector<float> logits(rows * p.vocabulary);
    p.positions = positions.data(), p.slots = slots.data(), p.attention.lengths = lengths.data(), p.logits = logits.data();
    s.logits = logits.data(), s.steps = steps.data();
    for (int64_t made = 0; made < run.most; ++made) {
        for (int64_t b = 0; b < rows; ++b) {
            const int64_t at = lengths[b] - 1;
            slots[b] = p.pages.own[b * p.pages.own_width + at / p.pages.size] * p.pages.size + at % p.pages.size;
        }
        decode_step(p, num_threads);
        try {
            sample(s, num_threads);
        } catch (const std::invalid_argument&) {
            if (!made) throw;
            return made;
        }
        bool ended = false;
        for (int64_t b = 0; b < rows; ++b) {
            ended |= run.stops[run.stop_of[b] * p.vocabulary + s.tokens[b]];
            ++positions[b], ++lengths[b], ++steps[b];
        }
        if (ended) return made + 1;
        p.tokens = s.tokens;
        s.tokens += rows, s.logprob += rows, s.unfiltered += rows, s.kept += rows;
    }
    return run.most;
}

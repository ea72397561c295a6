#include "decode_run.h"

#include <algorithm>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

// The masks of rows, (rows, words); all ones for those without.
class RowMasks {
  public:
    RowMasks(DecodeRun& run, int64_t vocabulary) : run_(run), words_((vocabulary + 31) / 32), bits_(run.masks.size() * words_, ~0u) {
        for (size_t b = 0; b < run.masks.size(); ++b)
            if (run.masks[b] && !fill(b)) throw std::invalid_argument("decode_run: nothing can follow in row " + std::to_string(b));
    }
    void attach(SampleProblem& s) const {
        if (!bits_.empty()) s.mask = bits_.data(), s.mask_stride = words_;
    }
    // Whether something can follow in every row.
    bool advance(const int64_t* tokens) {
        bool can = true;
        for (size_t b = 0; b < run_.masks.size(); ++b)
            if (run_.masks[b]) {
                const int32_t before = run_.nodes[b];
                run_.nodes[b] = run_.masks[b]->advance(before, static_cast<int32_t>(tokens[b]));
                if (run_.nodes[b] != before) can &= fill(b);
            }
        return can;
    }

  private:
    bool fill(size_t b) {
        const uint32_t* row = run_.masks[b]->row(run_.nodes[b]);
        if (row) std::copy_n(row, words_, bits_.data() + b * words_);
        return row;
    }

    DecodeRun& run_;
    int64_t words_;
    std::vector<uint32_t> bits_;
};

}  // namespace

int64_t decode_run(DecodeRun& run, int num_threads) {
    DecodeStep p = run.first;
    SampleProblem s = run.draws;
    const int64_t rows = p.rows;
    std::vector<int64_t> positions(p.positions, p.positions + rows), slots(rows), steps(s.steps, s.steps + rows);
    std::vector<int32_t> lengths(p.attention.lengths, p.attention.lengths + rows);
    std::vector<float> logits(rows * p.vocabulary);
    p.positions = positions.data(), p.slots = slots.data(), p.attention.lengths = lengths.data(), p.logits = logits.data();
    s.logits = logits.data(), s.steps = steps.data();
    RowMasks masks(run, p.vocabulary);
    masks.attach(s);
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
        if (!masks.advance(s.tokens) || ended) return made + 1;
        p.tokens = s.tokens;
        s.tokens += rows, s.logprob += rows, s.unfiltered += rows, s.kept += rows;
    }
    return run.most;
}

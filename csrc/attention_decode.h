// How a decode's queries find their keys: all of it that is the same in every layer of a model.
#pragma once
#include <optional>
#include <vector>

#include "attention.h"
#include "scratch.h"

class DecodePlan {
  public:
    // as_forward: a sequence's keys are its prefix's and its own, one after another.
    DecodePlan(const DecodeProblem& given, const DecodePages& pages, bool as_forward);
    DecodePlan(const DecodePlan&) = delete;

    void turn_to(const void* k, const void* v);  // keys and values that lie as those that were given
    void gather(int64_t sequence);               // its queries, if it has a prefix: before any of `tasks`

    DecodeProblem problem;             // for Kernels::attention_decode, after all `tasks`
    std::vector<AttentionTask> tasks;  // for Kernels::attention_prefix
    int64_t prefix_scratch, own_scratch;  // floats for one of either

  private:
    void plan_prefixes(const DecodePages& pages, const std::vector<PrefixParts>& of);

    std::vector<KeyRun> runs_;
    std::vector<KeySpan> spans_;
    std::vector<PrefixParts> parts_;
    std::vector<AttentionProblem> problems_;
    std::vector<double> part_lse_;
    std::optional<Scratch> packed_, part_out_;
};

// What an optimiser does to many arrays at once, each element read once: the sum of squares of the gradients, AdamW's update, and
// the two ends of Muon's, before and after its orthogonalisation. Arrays are contiguous fp32; a Span is one parameter's, with what
// each kind needs of:
//   NORM      -> the sum of the squares of `gradient`
//   ADAMW     parameter, gradient, first and second moment, updated in place
//   MOMENTUM  gradient, `first` the momentum, updated in place; `other`, in `dtype`, receives the Nesterov update
//   APPLY     parameter = keep * parameter - rate * other, with `other` in `dtype`
// Results do not depend on the number of threads. Sources: Loshchilov and Hutter, arXiv 1711.05101, alg. 2; Jordan et al. 2024.
#pragma once
#include <cstdint>

enum OptimKind : int { OPTIM_NORM, OPTIM_ADAMW, OPTIM_MOMENTUM, OPTIM_APPLY };

struct OptimSpan {  // of eight-byte fields, so that Python can write a table of them
    float* parameter;
    const float* gradient;
    float *first, *second;
    void* other;
    int64_t size;
};

struct OptimProblem {
    int kind, dtype;
    const OptimSpan* spans;
    int64_t count;
    float scale;         // of the gradient, before all else
    float keep, rate;    // what stays of the parameter; the step's length, with AdamW's correction of the first moment
    float beta1, beta2;  // decay of `first` and `second`
    float one_minus_beta1, one_minus_beta2;  // rounded from their exact values
    float root;          // AdamW's correction of the second moment's square root
    float eps;
};

double optim(const OptimProblem& problem, int num_threads);  // the sum of squares of NORM, else 0

// One half of the PPO loss (ppo_loss.h). A block takes PPO_BLOCK tokens, as a thread's loop on the CPU does, and leaves their sums;
// one more block adds those in fp64, always in the same order.
#include "device.cuh"
#include "gpu.h"
#include "ppo_loss.h"

namespace {

constexpr int THREADS = 256, EACH = PPO_BLOCK / THREADS;

// e^x - 1 - x, which is x^2 / 2 and more where the difference would cancel: there a polynomial through the five Chebyshev nodes of
// |x| <= ln(2)/2. e: e^x.
DEVICE float excess(float x, float e) {
    const float rest = 0.5f + x * (0.1666657776f + x * (0.0416665561f + x * (0.0083631733f + x * 0.0013926176f)));
    return fabsf(x) > 0.34f ? e - 1.f - x : x * x * rest;
}
DEVICE float clamp(float x, float low, float high) { return x > high ? high : low > x ? low : x; }  // NaN stays

DEVICE void policy(const PpoLossProblem& p, int64_t t, float x, float old, float target, float ref, float share, float* total) {
    const float low = static_cast<float>(1 - p.clip), high = static_cast<float>(1 + p.clip);
    const float gap = x - old, ratio = expf(gap), free = -target * ratio, bound = -target * clamp(ratio, low, high);
    total[PPO_LOSS] += bound > free ? bound : free;
    total[PPO_CLIPPED] += bound > free ? 1.f : 0.f;
    total[PPO_RATIO] = fmaxf(fabsf(gap), total[PPO_RATIO]);
    total[PPO_KL1] -= gap;
    total[PPO_KL2] += gap * gap * 0.5f;
    total[PPO_KL3] += excess(gap, ratio);
    if (p.ref) {
        const float to_ref = ref - x;
        total[PPO_REF_KL1] -= to_ref;
        total[PPO_REF_KL3] += excess(to_ref, expf(to_ref));
    }
    if (p.grad) p.grad[t] = bound > free ? 0.f : free * share;
}

DEVICE void value(const PpoLossProblem& p, int64_t t, float x, float old, float target, float share, float* total) {
    const float high = static_cast<float>(p.clip), moved = x - old;
    const float free = x - target, bound = old + clamp(moved, -high, high) - target;
    const float free_square = free * free, bound_square = bound * bound;
    const bool outside = fabsf(moved) > high;  // within the bounds the two differ by rounding alone, which is no clipping
    total[PPO_LOSS] += (free_square > bound_square ? free_square : bound_square) * 0.5f;  // NaN among the old ones is the bound's
    total[PPO_CLIPPED] += bound_square > free_square && outside ? 1.f : 0.f;
    if (p.grad) p.grad[t] = (bound_square > free_square ? (outside ? 0.f : bound) : free + (bound - bound)) * share;
}

__global__ void __launch_bounds__(THREADS) ppo_loss_kernel(PpoLossProblem p) {
    __shared__ float room[THREADS / WARP];
    const int64_t from = static_cast<int64_t>(blockIdx.x) * PPO_BLOCK + threadIdx.x;
    const float share = 1.f / static_cast<float>(p.tokens);
    float x[EACH], old[EACH], target[EACH], ref[EACH], total[PPO_TERMS] = {};
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int64_t t = from + i * THREADS;
        const bool inside = t < p.tokens;
        x[i] = inside ? p.x[t] : 0.f, old[i] = inside ? p.old[t] : 0.f, target[i] = inside ? p.target[t] : 0.f;
        ref[i] = inside && p.ref ? p.ref[t] : 0.f;
    }
#pragma unroll
    for (int i = 0; i < EACH; ++i) {
        const int64_t t = from + i * THREADS;
        if (t >= p.tokens) break;
        p.value ? value(p, t, x[i], old[i], target[i], share, total) : policy(p, t, x[i], old[i], target[i], ref[i], share, total);
    }
#pragma unroll
    for (int term = 0; term < PPO_TERMS; ++term) {
        const float sum = term == PPO_RATIO ? block_max(total[term], room) : block_sum(total[term], room);
        if (threadIdx.x == 0) p.sums[static_cast<int64_t>(blockIdx.x) * PPO_TERMS + term] = sum;
    }
}

// A warp a term.
__global__ void __launch_bounds__(PPO_TERMS* WARP) ppo_terms_kernel(PpoLossProblem p, int64_t blocks, float* terms) {
    __shared__ float room[PPO_TERMS];
    const int lane = threadIdx.x % WARP, term = threadIdx.x / WARP;
    double total = 0, highest = 0;
    for (int64_t block = lane; block < blocks; block += WARP) {
        const double x = p.sums[block * PPO_TERMS + term];
        total += x, highest = x > highest ? x : highest;
    }
#pragma unroll
    for (int lanes = WARP / 2; lanes; lanes /= 2) {
        total += __shfl_xor_sync(0xffffffffu, total, lanes);
        const double other = __shfl_xor_sync(0xffffffffu, highest, lanes);
        highest = other > highest ? other : highest;
    }
    if (lane == 0) room[term] = static_cast<float>(term == PPO_RATIO ? exp(highest) : total / static_cast<double>(p.tokens));
    __syncthreads();
    // A maximum over NaN is not to be trusted.
    if (lane == 0) terms[term] = term == PPO_RATIO && isnan(room[PPO_KL2]) ? room[PPO_KL2] : room[term];
}

}  // namespace

int64_t gpu::ppo_loss_workspace(int64_t tokens) {
    return ceil_div(tokens, PPO_BLOCK) * PPO_TERMS * static_cast<int64_t>(sizeof(double));
}

void gpu::ppo_loss(PpoLossProblem problem, float* terms, void* workspace, cudaStream_t stream) {
    const int64_t blocks = ceil_div(problem.tokens, PPO_BLOCK);
    problem.sums = static_cast<double*>(workspace);
    launch(ppo_loss_kernel, dim3(static_cast<unsigned>(blocks)), dim3(THREADS), 0, stream, "ppo_loss", problem);
    launch(ppo_terms_kernel, dim3(1), dim3(PPO_TERMS * WARP), 0, stream, "ppo_loss", problem, blocks, terms);
}

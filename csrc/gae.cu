// Generalised advantage estimates (gae.h), a warp an episode. A_t = d_t + a A_{t+1} is a linear recurrence with one factor, so the
// composition of `lanes` steps of it is b -> b + a^lanes b': five exchanges add up 32 lanes. A warp goes from an episode's end to its
// begin in runs counted from the end, and so an episode's bits do not depend on where in the batch it lies.
#include "device.cuh"
#include "gae.h"
#include "gpu.h"

namespace {

constexpr int EACH = 4, RUN = EACH * WARP, WARPS = 4;  // tokens of a lane (a float4), of a warp; episodes of a block

DEVICE void fill_nan(const GaeProblem& p, int64_t from, int64_t to) {
    for (int64_t t = from + threadIdx.x % WARP; t < to; t += WARP) p.advantages[t] = p.returns[t] = NAN;
}

__global__ void __launch_bounds__(WARPS* WARP) gae_kernel(GaeProblem p, int64_t tokens) {
    __shared__ float4 room[WARPS][2][WARP];  // rewards and values, then advantages and returns
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int64_t episode = static_cast<int64_t>(blockIdx.x) * WARPS + warp;
    const auto bound = [&](int64_t b) { return max(int64_t{0}, min(static_cast<int64_t>(p.cu_seqlens[b]), tokens)); };
    // Bounds that do not rise from 0 to the number of tokens leave tokens out, which no check on the host has seen.
    if (episode == 0) fill_nan(p, 0, p.batch ? bound(0) : tokens);
    if (episode >= p.batch) return;
    const int64_t begin = bound(episode), end = bound(episode + 1);
    if (episode == p.batch - 1) fill_nan(p, end, tokens);

    double power[6];  // a^1, then of the lane's tokens once, twice, four times, ...
    power[0] = p.gamma_lambda * p.gamma_lambda * p.gamma_lambda * p.gamma_lambda;
    for (int i = 1; i < 6; ++i) power[i] = power[i - 1] * power[i - 1];
    double reach = 1;  // a^(tokens of the lanes after this one)
    for (int i = 0; i < 5; ++i) reach *= (31 - lane) >> i & 1 ? power[i] : 1.0;

    float* const rewards = &room[warp][0][0].x;
    float* const values = &room[warp][1][0].x;
    float reward[EACH], value[EACH];
    const auto fetch = [&](int64_t from) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t t = from + i * WARP + lane;
            reward[i] = t >= begin ? p.rewards[t] : 0.f, value[i] = t >= begin ? p.values[t] : 0.f;
        }
    };
    double carry = 0;   // A of the token after the run
    float after = 0.f;  // V of it
    fetch(end - RUN);
    for (int64_t from = end - RUN; from + RUN > begin; from -= RUN) {
#pragma unroll
        for (int i = 0; i < EACH; ++i) rewards[i * WARP + lane] = reward[i], values[i * WARP + lane] = value[i];
        __syncwarp();
        fetch(from - RUN);  // the next run's come while this one's are added up
        const float4 r = room[warp][0][lane], v = room[warp][1][lane];
        float next = __shfl_down_sync(0xffffffffu, v.x, 1);
        next = lane == WARP - 1 ? after : next;
        after = __shfl_sync(0xffffffffu, v.x, 0);
        const double d3 = static_cast<double>(r.w) + p.gamma * next - v.w, d2 = static_cast<double>(r.z) + p.gamma * v.w - v.z;
        const double d1 = static_cast<double>(r.y) + p.gamma * v.z - v.y, d0 = static_cast<double>(r.x) + p.gamma * v.y - v.x;
        double sum = d0 + p.gamma_lambda * (d1 + p.gamma_lambda * (d2 + p.gamma_lambda * d3));  // A, had the lane the last tokens
#pragma unroll
        for (int i = 0; i < 5; ++i) {
            const double further = __shfl_down_sync(0xffffffffu, sum, 1 << i);
            if (lane + (1 << i) < WARP) sum += power[i] * further;
        }
        // What follows the lane's last token: the next lane's sum and, beyond the run, the carry.
        double behind = __shfl_down_sync(0xffffffffu, sum, 1);
        behind = (lane == WARP - 1 ? 0 : behind) + reach * carry;
        const double a3 = d3 + p.gamma_lambda * behind, a2 = d2 + p.gamma_lambda * a3, a1 = d1 + p.gamma_lambda * a2;
        const double a0 = d0 + p.gamma_lambda * a1;
        carry = __shfl_sync(0xffffffffu, a0, 0);
        const auto f = [](double x) { return static_cast<float>(x); };
        room[warp][0][lane] = make_float4(f(a0), f(a1), f(a2), f(a3));
        room[warp][1][lane] = make_float4(f(a0 + v.x), f(a1 + v.y), f(a2 + v.z), f(a3 + v.w));
        __syncwarp();
#pragma unroll
        for (int i = 0; i < EACH; ++i) {
            const int64_t t = from + i * WARP + lane;
            if (t >= begin) p.advantages[t] = rewards[i * WARP + lane], p.returns[t] = values[i * WARP + lane];
        }
    }
}

}  // namespace

void gpu::gae(const GaeProblem& problem, int64_t tokens, cudaStream_t stream) {
    const int64_t blocks = ceil_div(problem.batch > 0 ? problem.batch : 1, WARPS);
    launch(gae_kernel, dim3(static_cast<unsigned>(blocks)), dim3(WARPS * WARP), 0, stream, "gae", problem, tokens);
}

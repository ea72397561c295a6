// A token for each row of logits (sample.h), a block a row, by the CPU's rules (sample.inc): nothing is sorted, every filter comes
// down to a least logit that is kept. Weights and their sums in blocks of 512 elements are the CPU's to the last bit, by the same
// operations in the same order, none of them fused; so both draw the same token but where a random point or a filter's bound falls
// within rounding of a border. Few rows have their maxima and sums made by many blocks each; the row's own block goes on from there.
#include "device.cuh"
#include "gpu.h"
#include "sample.h"

namespace {

constexpr int BLOCK = 512, LANES = 16, EACH = BLOCK / LANES;  // a block is summed by 16 lanes, 32 elements each
constexpr int THREADS = 512, SPLIT_THREADS = 128, MOST_SPLITS = 64;
constexpr int FEW = 256;  // elements among which the least one kept is looked for by comparing each with each

// --- one row -------------------------------------------------------------------------------------------------------------------

template <class T, bool MASKED>
struct Row {
    const T* x;
    const uint32_t* mask;
    int columns, blocks;
    float inverse, best, one;      // best: the largest that the mask allows, whose weight is 1; one: sample.h, SAMPLE_NEAR
    float *peaks, *sums, *wholes;  // of each block: each lane's largest; the sum of its weights; MASKED, of all e^((x - one) / T)

    DEVICE float any(int i) const { return i < columns ? to_float(x[i]) : -INFINITY; }
    DEVICE bool allows(int i) const { return !MASKED || (i < columns && (mask[i / 32] >> (i % 32) & 1)); }
    DEVICE float at(int i) const { return allows(i) ? any(i) : -INFINITY; }
    DEVICE void measure(float maximum, float allowed) {
        best = allowed;
        one = !MASKED || __fmul_rn(__fsub_rn(maximum, best), inverse) <= SAMPLE_NEAR ? best : maximum;
    }
    DEVICE float weight(float value) const { return weight(value, best); }
    DEVICE float weight(float value, float shift) const {  // e^((value - shift) / T), NaN for NaN and beside what is no number
        const float z = __fmul_rn(__fsub_rn(value, shift), inverse), y = z < -87.f ? -87.f : z;
        const float shifted = __fadd_rn(__fmul_rn(y, LOG2E), 12582912.f), whole = __fsub_rn(shifted, 12582912.f);
        const float r = __fadd_rn(__fsub_rn(y, __fmul_rn(whole, 0.693359375f)), __fmul_rn(whole, 2.12194440e-4f));
        float q = __fadd_rn(0.0083631733f, __fmul_rn(r, 0.0013926176f));
        q = __fadd_rn(0.0416665561f, __fmul_rn(r, q));
        q = __fadd_rn(0.1666657776f, __fmul_rn(r, q));
        q = __fadd_rn(0.5f, __fmul_rn(r, q));
        const float p = __fadd_rn(1.f, __fadd_rn(r, __fmul_rn(__fmul_rn(r, r), q)));
        const float e = __uint_as_float(__float_as_uint(p) + (__float_as_uint(shifted) << 23));
        return z < -87.f ? 0.f : z <= SAMPLE_NEAR ? e : NAN;
    }
};

// Calls f(number, lane) for blocks from `first` to `end`, a half of a warp a block; a number beyond `end` keeps the other half company.
template <class F>
DEVICE void each_block(int first, int end, F&& f) {
    const int half = threadIdx.x / LANES, halves = blockDim.x / LANES;
    for (int block = first + half; block - half % 2 < end; block += halves) f(block, static_cast<int>(threadIdx.x) % LANES);
}
DEVICE float lanes_sum(float x) { return warp_sum<LANES>(x); }  // halves onto each other, down to one lane

struct Highest {
    float all, allowed;
};
template <class T, bool MASKED>
DEVICE Highest find_peaks(const Row<T, MASKED>& row, int first, int end) {  // the thread's largest
    Highest highest{-INFINITY, -INFINITY};
    each_block(first, end, [&](int block, int lane) {
        if (block >= end) return;
        float peak = -INFINITY;
#pragma unroll 16
        for (int j = 0; j < EACH; ++j) {
            const int i = block * BLOCK + j * LANES + lane;
            const float value = row.any(i);
            if (MASKED) highest.all = fmaxf(highest.all, value);
            if (row.allows(i)) peak = fmaxf(peak, value);
        }
        row.peaks[block * LANES + lane] = peak;
        highest.allowed = fmaxf(highest.allowed, peak);
    });
    if (!MASKED) highest.all = highest.allowed;
    return highest;
}

// The sums of the weights of elements that are at least `least`; -inf: of all.
template <class T, bool MASKED>
DEVICE void find_sums(const Row<T, MASKED>& row, int first, int end, float least) {
    each_block(first, end, [&](int block, int lane) {
        float sum = 0.f;
        if (block < end && (least == -INFINITY || row.peaks[block * LANES + lane] >= least)) {
#pragma unroll 8
            for (int j = 0; j < EACH; ++j) {
                const float value = row.at(block * BLOCK + j * LANES + lane);
                if (least == -INFINITY || value >= least) sum = __fadd_rn(sum, row.weight(value));
            }
        }
        sum = lanes_sum(sum);
        if (block < end && lane == 0) row.sums[block] = sum;
    });
}
// The first time, when the row's distribution is not known to be one: with the sums over what the mask forbids.
template <class T, bool MASKED>
DEVICE void find_first_sums(const Row<T, MASKED>& row, int first, int end) {
    if (!MASKED) return find_sums(row, first, end, -INFINITY);
    const bool shared = row.one == row.best;
    each_block(first, end, [&](int block, int lane) {
        float sum = 0.f, whole = 0.f;
        if (block < end) {
#pragma unroll 8
            for (int j = 0; j < EACH; ++j) {
                const int i = block * BLOCK + j * LANES + lane;
                const float value = row.any(i), weight = row.weight(value, row.one);
                whole = __fadd_rn(whole, weight);
                if (row.allows(i)) sum = __fadd_rn(sum, shared ? weight : row.weight(value));
            }
        }
        sum = lanes_sum(sum), whole = lanes_sum(whole);
        if (block < end && lane == 0) row.sums[block] = sum, row.wholes[block] = whole;
    });
}

// --- what a row's block shares -------------------------------------------------------------------------------------------------

struct Shared {
    double sums[THREADS / WARP][3];
    int counts[THREADS / WARP][3];
    float room[THREADS / WARP];
    float few[FEW];
    unsigned long long few_weights[FEW];  // in units of 2^-52: whole numbers add up to the same in any order
    int few_count;
    float weights[BLOCK];
    double before, whole;
    int block, token;
    SampleSettings settings;
};

struct Mass {
    double weight[3];
    int count[3];
};
DEVICE void add_up(Mass& mass, Shared& shared) {  // over the block, in one order
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 3; ++i) {
#pragma unroll
        for (int lanes = WARP / 2; lanes; lanes /= 2) {
            mass.weight[i] += __shfl_xor_sync(0xffffffffu, mass.weight[i], lanes);
            mass.count[i] += __shfl_xor_sync(0xffffffffu, mass.count[i], lanes);
        }
        if (lane == 0) shared.sums[warp][i] = mass.weight[i], shared.counts[warp][i] = mass.count[i];
    }
    __syncthreads();
    mass = {};
    for (int w = 0; w < THREADS / WARP; ++w)
#pragma unroll
        for (int i = 0; i < 3; ++i) mass.weight[i] += shared.sums[w][i], mass.count[i] += shared.counts[w][i];
}

DEVICE double total_of(const float* sums, int blocks, Shared& shared) {
    Mass mass{};
    for (int block = threadIdx.x; block < blocks; block += THREADS) mass.weight[0] += static_cast<double>(sums[block]);
    add_up(mass, shared);
    return mass.weight[0];
}

// --- the least logit that is kept ----------------------------------------------------------------------------------------------

// Whole numbers in the order of the floats; -0 is just below 0.
DEVICE int64_t rank_of(float x) {
    const int bits = __float_as_int(x);
    return bits ^ ((bits >> 31) & 0x7fffffff);
}
DEVICE float ranked(int64_t rank) {
    const int key = static_cast<int>(rank);
    return __int_as_float(key ^ ((key >> 31) & 0x7fffffff));
}
// Halving the values gets through the bulk of a row in a few steps, halving the ranks comes to an end for sure.
DEVICE int64_t between(int64_t first, int64_t end, bool by_value) {
    if (end - first <= 1) return end;
    const int64_t middle = by_value ? rank_of(0.5f * ranked(first) + 0.5f * ranked(end)) : first + (end - first) / 2;
    return middle <= first ? first + 1 : middle >= end ? end - 1 : middle;
}

// Calls f(value) for the elements that may be at least `bound`, above -inf: of the row, or of its peaks.
template <class T, bool MASKED>
struct Elements {
    const Row<T, MASKED>& row;
    template <class F>
    DEVICE void operator()(float bound, F&& f) const {
        each_block(0, row.blocks, [&](int block, int lane) {
            if (block >= row.blocks || !(row.peaks[block * LANES + lane] >= bound)) return;
#pragma unroll 8
            for (int j = 0; j < EACH; ++j) f(row.at(block * BLOCK + j * LANES + lane));
        });
    }
};
struct Peaks {
    const float* peaks;
    int count;
    template <class F>
    DEVICE void operator()(float, F&& f) const {
        for (int i = threadIdx.x; i < count; i += THREADS) f(peaks[i]);
    }
};

// Number and, WEIGHTED, weight of the elements that are at least each bound; the bounds rise.
template <bool WEIGHTED, class Each, class Weight>
DEVICE Mass mass_from(const Each& each, const Weight& weight, const float (&bounds)[3], Shared& shared) {
    float sum[3] = {};
    int count[3] = {};
    each(bounds[0], [&](float value) {
        if (!(value >= bounds[0])) return;
        const float w = WEIGHTED ? weight(value) : 0.f;
#pragma unroll
        for (int i = 0; i < 3; ++i)
            if (value >= bounds[i]) sum[i] += w, ++count[i];
    });
    Mass mass;
#pragma unroll
    for (int i = 0; i < 3; ++i) mass.weight[i] = WEIGHTED ? static_cast<double>(sum[i]) : 0, mass.count[i] = count[i];
    add_up(mass, shared);
    return mass;
}

// The largest of the n elements in [low, high] such that it and all larger ones weigh (or, not WEIGHTED, number) at least `target`; low
// if there is none. Three bounds a pass, until few elements are left between two.
template <bool WEIGHTED, class Each, class Weight>
DEVICE float least_kept(const Each& each, const Weight& weight, int n, float low, float high, double target, Shared& shared) {
    int64_t first = rank_of(low), end = rank_of(high) + 1;
    int count_first = n, count_end = 0;
    double above = 0;  // weight from `end` on
    for (int step = 0; end - first > 1 && count_first - count_end > FEW; ++step) {
        const bool by_value = step < 5;
        const int64_t middle = between(first, end, by_value);
        const int64_t bound[3] = {between(first, middle, by_value), middle, between(middle, end, by_value)};
        const float bounds[3] = {ranked(bound[0]), ranked(bound[1]), ranked(bound[2])};
        const Mass mass = mass_from<WEIGHTED>(each, weight, bounds, shared);
        for (int i = 0; i < 3 && bound[i] < end; ++i) {
            if ((WEIGHTED ? mass.weight[i] : mass.count[i]) >= target) first = bound[i], count_first = mass.count[i];
            else end = bound[i], count_end = mass.count[i], above = mass.weight[i];
        }
    }
    if (end - first <= 1) return ranked(first);

    const float from = ranked(first), to = ranked(end);
    if (threadIdx.x == 0) shared.few_count = 0;
    __syncthreads();
    each(from, [&](float value) {
        if (!(value >= from && value < to)) return;
        const int at = atomicAdd(&shared.few_count, 1);
        shared.few[at] = value;
        shared.few_weights[at] = WEIGHTED ? static_cast<unsigned long long>(static_cast<double>(weight(value)) * 0x1p52) : 1;
    });
    __syncthreads();
    float least = -INFINITY;
    const int few = shared.few_count, me = threadIdx.x;
    if (me < few) {
        unsigned long long sum = 0;
        for (int i = 0; i < few; ++i) sum += shared.few[i] >= shared.few[me] ? shared.few_weights[i] : 0;
        const double mass = WEIGHTED ? above + static_cast<double>(sum) * 0x1p-52 : count_end + static_cast<double>(sum);
        if (mass >= target) least = shared.few[me];
    }
    least = block_max(least, shared.room);
    return least > -INFINITY ? least : from;
}

// The least logit that all filters keep. total: of the row's weights.
template <class T, bool MASKED>
DEVICE float least_logit(const SampleSettings& s, const Row<T, MASKED>& row, double total, Shared& shared) {
    const bool top_k = s.top_k > 0 && s.top_k < row.columns;
    float low = -INFINITY;
    if (top_k || s.top_p < 1) {
        // What is cut for sure: logits without weight; for top-p, those that even together weigh less than 1 - p; for top-k, those
        // below the k-th of the lanes' maxima.
        const double light = log((1 - s.top_p) * total / static_cast<double>(row.columns)) - 1e-3;
        low = fmaxf(static_cast<float>(row.best + s.temperature * (top_k || light < -88 ? -88 : light)), -3e38f);
        const auto weight = [&](float value) { return row.weight(value); };
        const Elements<T, MASKED> elements{row};
        if (top_k) {
            const double k = static_cast<double>(s.top_k);
            const Peaks peaks{row.peaks, row.blocks * LANES};
            if (s.top_k <= peaks.count) low = least_kept<false>(peaks, weight, peaks.count, low, row.best, k, shared);
            low = least_kept<false>(elements, weight, row.columns, low, row.best, k, shared);
        }
        if (s.top_p < 1) {
            if (top_k) total = mass_from<true>(elements, weight, {low, low, low}, shared).weight[0];
            low = least_kept<true>(elements, weight, row.columns, low, row.best, s.top_p * total, shared);
        }
    }
    return s.min_p > 0 ? fmaxf(low, static_cast<float>(row.best + s.temperature * log(s.min_p))) : low;
}

// --- the draw ------------------------------------------------------------------------------------------------------------------

DEVICE uint64_t mix(uint64_t x) {  // SplitMix64's finaliser
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9u;
    x = (x ^ (x >> 27)) * 0x94D049BB133111EBu;
    return x ^ (x >> 31);
}
DEVICE double uniform(uint64_t seed, uint64_t request, uint64_t step) {
    constexpr uint64_t golden = 0x9E3779B97F4A7C15u;
    return static_cast<double>(mix(mix(request + (seed + 1) * golden) + (step + 1) * golden) >> 11) * 0x1p-53;
}

// One warp: the first of n weights with which their sum, begun at `before`, passes the point; when rounding puts the point at the very
// end, the last one above 0. One lane has it, and calls found(number, sum before it).
template <class F>
DEVICE void pass_point(const float* weights, int n, double before, double point, F&& found) {
    const int lane = threadIdx.x % WARP, each = (n + WARP - 1) / WARP, first = min(lane * each, n), end = min(first + each, n);
    double part = 0;
    for (int i = first; i < end; ++i) part += static_cast<double>(weights[i]);
    double sum = lane == 0 ? before + part : part;
#pragma unroll
    for (int lanes = 1; lanes < WARP; lanes *= 2) {
        const double left = __shfl_up_sync(0xffffffffu, sum, lanes);
        if (lane >= lanes) sum += left;
    }
    const double left = __shfl_up_sync(0xffffffffu, sum, 1);
    before = lane == 0 ? before : left;
    const unsigned passing = __ballot_sync(0xffffffffu, part > 0 && sum > point), any = __ballot_sync(0xffffffffu, part > 0);
    if (lane != (passing ? __ffs(passing) - 1 : 31 - __clz(any))) return;
    int at = -1;
    for (int i = first; i < end; ++i) {
        if (!(weights[i] > 0.f)) continue;
        if (at >= 0) before += static_cast<double>(weights[at]);
        at = i;
        if (before + static_cast<double>(weights[i]) > point) break;
    }
    found(at, before);
}

DEVICE bool in_range(const SampleSettings& s) {
    return s.temperature >= 0 && s.temperature < INFINITY && s.top_k >= 0 && s.top_p > 0 && s.top_p <= 1 && s.min_p >= 0 && s.min_p <= 1;
}

template <class T, bool MASKED>
DEVICE Row<T, MASKED> row_of(const SampleProblem& p, float* workspace, int64_t r, const SampleSettings& s) {
    const int blocks = static_cast<int>((p.columns + BLOCK - 1) / BLOCK);
    float* const room = workspace + r * (blocks * (LANES + 2) + 2 * MOST_SPLITS);
    const double inverse = 1 / (s.temperature == 0 ? 1 : s.temperature);
    Row<T, MASKED> row{};
    row.x = static_cast<const T*>(p.logits) + r * p.stride;
    row.mask = MASKED ? p.mask + r * p.mask_stride : nullptr;
    row.columns = static_cast<int>(p.columns), row.blocks = blocks;
    row.inverse = inverse < 3e38 ? static_cast<float>(inverse) : 3e38f;
    row.peaks = room + 2 * MOST_SPLITS, row.sums = row.peaks + blocks * LANES, row.wholes = row.sums + blocks;
    return row;
}
// Of each split the largest of all and, MOST_SPLITS on, of those that the mask allows.
template <class T, bool MASKED>
DEVICE float* maxima_of(const Row<T, MASKED>& row) { return row.peaks - 2 * MOST_SPLITS; }
DEVICE int split_begin(int blocks, int split, int splits) { return static_cast<int>(static_cast<int64_t>(blocks) * split / splits); }

template <class T, bool MASKED>
__global__ void __launch_bounds__(SPLIT_THREADS) sample_peaks_kernel(SampleProblem p, float* workspace) {
    __shared__ float room[SPLIT_THREADS / WARP];
    const int split = blockIdx.x, splits = gridDim.x;
    const Row<T, MASKED> row = row_of<T, MASKED>(p, workspace, blockIdx.y, p.of(blockIdx.y));
    const int first = split_begin(row.blocks, split, splits), end = split_begin(row.blocks, split + 1, splits);
    const Highest highest = find_peaks(row, first, end);
    const float all = block_max(highest.all, room), allowed = MASKED ? block_max(highest.allowed, room) : all;
    if (threadIdx.x == 0) maxima_of(row)[split] = all, maxima_of(row)[MOST_SPLITS + split] = allowed;
}
DEVICE float largest_of(const float* maxima, int splits) {  // by each warp
    float highest = -INFINITY;
    for (int i = threadIdx.x % WARP; i < splits; i += WARP) highest = fmaxf(highest, maxima[i]);
    return warp_max(highest) + 0.f;  // never -0
}
template <class T, bool MASKED>
DEVICE void measure_splits(Row<T, MASKED>& row, int splits) {
    const float maximum = largest_of(maxima_of(row), splits);
    row.measure(maximum, MASKED ? largest_of(maxima_of(row) + MOST_SPLITS, splits) : maximum);
}
template <class T, bool MASKED>
__global__ void __launch_bounds__(SPLIT_THREADS) sample_sums_kernel(SampleProblem p, float* workspace) {
    const int split = blockIdx.x, splits = gridDim.x;
    Row<T, MASKED> row = row_of<T, MASKED>(p, workspace, blockIdx.y, p.of(blockIdx.y));
    measure_splits(row, splits);
    find_first_sums(row, split_begin(row.blocks, split, splits), split_begin(row.blocks, split + 1, splits));
}

// splits: into how many parts the two kernels above have cut the rows; 0: they have not been.
template <class T, bool MASKED>
__global__ void __launch_bounds__(THREADS, MASKED ? 1 : 2) sample_kernel(SampleProblem p, float* workspace, int splits) {
    __shared__ Shared shared;
    const int64_t r = blockIdx.x;
    if (threadIdx.x == 0) shared.settings = p.of(r);
    __syncthreads();
    const SampleSettings& s = shared.settings;
    Row<T, MASKED> row = row_of<T, MASKED>(p, workspace, r, s);
    if (splits) {
        measure_splits(row, splits);
    } else {
        const Highest highest = find_peaks(row, 0, row.blocks);
        const float maximum = block_max(highest.all, shared.room) + 0.f;
        row.measure(maximum, MASKED ? block_max(highest.allowed, shared.room) + 0.f : maximum);
        find_first_sums(row, 0, row.blocks);
        __syncthreads();
    }
    const double total = total_of(row.sums, row.blocks, shared), whole = MASKED ? total_of(row.wholes, row.blocks, shared) : total;
    if (!(whole >= 1) || !(row.best > -INFINITY) || !in_range(s)) {  // one weight is 1, and NaN is no number
        if (threadIdx.x == 0) p.tokens[r] = -1, p.logprob[r] = p.unfiltered[r] = p.kept[r] = NAN;
        return;
    }
    const bool greedy = s.temperature == 0;
    const double temperature = greedy ? 1 : s.temperature;
    if (threadIdx.x == 0) {
        shared.whole = whole;
        p.kept[r] = static_cast<float>(total / whole * exp((static_cast<double>(row.best) - row.one) / temperature));
    }
    const float least = greedy ? row.best : least_logit(s, row, total, shared);
    double left = total;
    if (least > -INFINITY) {
        find_sums(row, 0, row.blocks, least);
        __syncthreads();
        left = total_of(row.sums, row.blocks, shared);
    }
    const double point = greedy ? 0 : uniform(s.seed, p.requests[r], p.steps[r]) * left;
    if (threadIdx.x < WARP)
        pass_point(row.sums, row.blocks, 0, point, [&](int at, double before) { shared.block = at, shared.before = before; });
    __syncthreads();
    const int from = shared.block * BLOCK;
    for (int i = threadIdx.x; i < BLOCK; i += THREADS) {
        const float value = row.at(from + i);
        shared.weights[i] = value >= least ? row.weight(value) : 0.f;
    }
    __syncthreads();
    if (threadIdx.x < WARP)
        pass_point(shared.weights, BLOCK, shared.before, point, [&](int at, double) { shared.token = from + at; });
    __syncthreads();
    if (threadIdx.x == 0) {
        const double token = row.at(shared.token);
        p.tokens[r] = shared.token;
        p.logprob[r] = greedy ? 0.f : static_cast<float>((token - row.best) / temperature - log(left));
        p.unfiltered[r] = static_cast<float>((token - row.one) / temperature - log(shared.whole));
    }
}

template <class T, bool MASKED>
void run(const SampleProblem& p, float* room, cudaStream_t stream) {
    // More rows than these keep a GPU busy by themselves, and each is then read from memory once, not once a kernel.
    const int64_t blocks = ceil_div(p.columns, BLOCK), most = ceil_div(blocks, SPLIT_THREADS / LANES);
    const int splits = p.rows <= 64 && blocks >= 16 ? static_cast<int>(most < MOST_SPLITS ? most : MOST_SPLITS) : 0;
    if (splits) {
        const dim3 grid(static_cast<unsigned>(splits), static_cast<unsigned>(p.rows));
        launch(sample_peaks_kernel<T, MASKED>, grid, dim3(SPLIT_THREADS), 0, stream, "sample", p, room);
        launch(sample_sums_kernel<T, MASKED>, grid, dim3(SPLIT_THREADS), 0, stream, "sample", p, room);
    }
    launch(sample_kernel<T, MASKED>, dim3(static_cast<unsigned>(p.rows)), dim3(THREADS), 0, stream, "sample", p, room, splits);
}

}  // namespace

int64_t gpu::sample_workspace(int64_t rows, int64_t columns) {
    return rows * (ceil_div(columns, BLOCK) * (LANES + 2) + 2 * MOST_SPLITS) * static_cast<int64_t>(sizeof(float));
}

void gpu::sample(const SampleProblem& p, void* workspace, cudaStream_t stream) {
    by_dtype(p.dtype, [&](auto type) {
        using T = decltype(type);
        (p.mask ? run<T, true> : run<T, false>)(p, static_cast<float*>(workspace), stream);
    });
}

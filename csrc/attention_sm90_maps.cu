// What attention's Hopper kernels need of the host: which problems they take, and maps of arrays for the copy engine.
#include <cudaTypedefs.h>

#include "attention_sm90.cuh"

namespace {

bool suits(const Rows& rows, int64_t heads) {
    constexpr int64_t LIMIT = int64_t{1} << 39;  // the copy engine's, in bytes 2^40
    const auto stride = [&](int64_t elements) { return elements > 0 && elements % 8 == 0 && elements < LIMIT; };
    return reinterpret_cast<uintptr_t>(rows.data) % 16 == 0 && stride(rows.token_stride) && (heads == 1 || stride(rows.head_stride));
}

PFN_cuTensorMapEncodeTiled_v12000 find_encode() {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult result;
    check(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &result), "attention");
    if (result != cudaDriverEntryPointSuccess || !function) throw std::runtime_error("attention: the driver has no cuTensorMapEncodeTiled");
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(function);
}

}  // namespace

CUtensorMap sm90::tensor_map(const Rows& from, int64_t tokens, int64_t heads, int64_t head_dim, int rows) {
    static const PFN_cuTensorMapEncodeTiled_v12000 encode = find_encode();
    CUtensorMap map;
    const cuuint64_t sizes[] = {static_cast<cuuint64_t>(head_dim), static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(tokens)};
    const cuuint64_t strides[] = {static_cast<cuuint64_t>(heads == 1 ? head_dim : from.head_stride) * 2,
                                  static_cast<cuuint64_t>(from.token_stride) * 2};
    const cuuint32_t box[] = {64, 1, static_cast<cuuint32_t>(rows)}, steps[] = {1, 1, 1};
    if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 3, from.data, sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
               CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) != CUDA_SUCCESS)
        throw std::runtime_error("attention: no tensor map for these strides");
    return map;
}

int sm90::multiprocessors() {
    int device = 0, count = 0;
    check(cudaGetDevice(&device), "attention");
    check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "attention");
    return count;
}

namespace gpu {

bool attention_sm90_takes(const AttentionProblem& p) {
    bool takes = p.dtype && !p.wide && (p.head_dim == 64 || p.head_dim == 128) && p.scale > 0 && p.scale < INFINITY;
    takes = takes && suits(p.q, p.heads) && suits(p.k, p.kv_heads) && suits(p.v, p.kv_heads) && suits(p.out, p.heads);
    if (p.dout.data)
        takes = takes && suits(p.dout, p.heads) && suits(p.dq, p.heads) && suits(p.dk, p.kv_heads) && suits(p.dv, p.kv_heads);
    return takes;
}

}  // namespace gpu

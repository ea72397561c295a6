// Stands in for NVIDIA's header: tensor maps.
#pragma once
#include <cstdint>
#include <cstring>

using cuuint32_t = uint32_t;
using cuuint64_t = uint64_t;
enum CUresult { CUDA_SUCCESS = 0, CUDA_ERROR_INVALID_VALUE = 1 };
enum CUtensorMapDataType { CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 = 9 };
enum CUtensorMapInterleave { CU_TENSOR_MAP_INTERLEAVE_NONE = 0 };
enum CUtensorMapSwizzle { CU_TENSOR_MAP_SWIZZLE_NONE = 0, CU_TENSOR_MAP_SWIZZLE_128B = 3 };
enum CUtensorMapL2promotion { CU_TENSOR_MAP_L2_PROMOTION_NONE = 0, CU_TENSOR_MAP_L2_PROMOTION_L2_128B = 2, CU_TENSOR_MAP_L2_PROMOTION_L2_256B = 3 };
enum CUtensorMapFloatOOBfill { CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE = 0 };
struct alignas(64) CUtensorMap {
    uint64_t opaque[16];
};

struct EmulatedTensor {
    static constexpr uint64_t MAGIC = 0x7e4504a9;
    uint64_t magic;
    unsigned char* data;
    uint64_t sizes[3], strides[2];  // strides in bytes
    uint32_t box[3], swizzled;
};

// What the driver asks of a map of three dimensions of bf16; errors are those of its documentation.
inline CUresult cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* data, const cuuint64_t* sizes,
                                       const cuuint64_t* strides, const cuuint32_t* box, const cuuint32_t* element_strides,
                                       CUtensorMapInterleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
    EmulatedTensor t{};
    bool ok = type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 && rank == 3 && reinterpret_cast<uintptr_t>(data) % 16 == 0;
    for (int d = 0; d < 3 && ok; ++d) {
        ok = sizes[d] >= 1 && sizes[d] <= (1ull << 32) && box[d] >= 1 && box[d] <= 256 && element_strides[d] == 1;
        ok = ok && (d == 2 || (strides[d] % 16 == 0 && strides[d] < (1ull << 40)));
        t.sizes[d] = sizes[d], t.box[d] = box[d];
        if (d < 2) t.strides[d] = strides[d];
    }
    ok = ok && box[0] * 2 % 16 == 0 && (swizzle != CU_TENSOR_MAP_SWIZZLE_128B || box[0] * 2 <= 128);
    if (!ok) return CUDA_ERROR_INVALID_VALUE;
    t.magic = EmulatedTensor::MAGIC, t.data = static_cast<unsigned char*>(data), t.swizzled = swizzle == CU_TENSOR_MAP_SWIZZLE_128B;
    std::memcpy(map, &t, sizeof t);
    return CUDA_SUCCESS;
}

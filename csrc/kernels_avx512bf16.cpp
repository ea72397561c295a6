// The kernels for AVX-512 with bf16 products. As in kernels_avx2.cpp, headers come before the pragma.
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#define ISA_LANES 16
#define ISA_ROWS 16
#define ISA_BF16
#define ISA_TABLE kernels_avx512bf16
#include "kernels.inc"
#endif

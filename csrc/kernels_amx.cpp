// The kernels for AVX-512 with AMX tiles for products of bf16. As in kernels_avx2.cpp, headers come before the pragma; the tile
// instructions are written in assembly, so the target needs no name for them.
#include "kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,prefer-vector-width=512")
#define ISA_LANES 16
#define ISA_ROWS 16
#define ISA_BF16
#define ISA_AMX
#define ISA_TABLE kernels_amx
#include "kernels.inc"
#endif

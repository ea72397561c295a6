// The kernels for AVX2 with FMA. Standard headers come before the pragma: a copy of an inline function from one of
// them, compiled for AVX2, must not become the copy that the linker keeps for everybody.
#include "kernels.h"

#if defined(__x86_64__)
#pragma GCC target("avx2,fma")
#define ISA_LANES 8
#define ISA_ROWS 4
#define ISA_TABLE kernels_avx2
#include "kernels.inc"
#endif

// The kernels in the instructions that every CPU of this architecture has.
#include "kernels.h"

#define ISA_LANES 4
#define ISA_ROWS 2
#define ISA_TABLE kernels_portable
#include "kernels.inc"

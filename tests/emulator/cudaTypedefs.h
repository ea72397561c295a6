// Stands in for NVIDIA's header: the types of the driver's functions.
#pragma once
#include "cuda.h"

using PFN_cuTensorMapEncodeTiled_v12000 = decltype(&cuTensorMapEncodeTiled);

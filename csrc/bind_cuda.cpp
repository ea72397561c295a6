// The module nanorlhf._cuda, which imports on machines without a GPU or its driver. Each bind_cuda_*.cpp converts arguments,
// drops the GIL, calls the core and maps errors; nothing is computed here.
#include "bind_cuda.h"

// Weak: setup.py leaves out a binding whose kernels an nvcc could not compile.
__attribute__((weak)) void bind_cuda_rows(py::module_& m);
__attribute__((weak)) void bind_cuda_scans(py::module_& m);
__attribute__((weak)) void bind_cuda_attention(py::module_& m);
__attribute__((weak)) void bind_cuda_decode(py::module_& m);
#ifdef NANORLHF_EMULATED
void bind_emulator(py::module_& m);
#endif

PYBIND11_MODULE(_cuda, m) {
    m.doc() = "The CUDA kernels of nanorlhf.";
    if (bind_cuda_rows) bind_cuda_rows(m);
    if (bind_cuda_scans) bind_cuda_scans(m);
    if (bind_cuda_attention) bind_cuda_attention(m);
    if (bind_cuda_decode) bind_cuda_decode(m);
#ifdef NANORLHF_EMULATED
    bind_emulator(m);
#endif
}

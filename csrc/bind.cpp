// The module nanorlhf._C. Each bind_*.cpp converts arguments, drops the GIL, calls the core and maps errors;
// nothing is computed here.
#include <malloc.h>
#include <pybind11/pybind11.h>

namespace py = pybind11;

void bind_tokenizer(py::module_& m);
void bind_ops(py::module_& m);
void bind_decode(py::module_& m);
void bind_token_mask(py::module_& m);

// Large activations come and go every step. By default glibc maps each one afresh and the kernel zeroes its pages
// again, which costs a CPU training step up to half of its time; kept blocks are reused instead.
static bool keep_freed_memory() {
#ifdef __GLIBC__
    return mallopt(M_MMAP_THRESHOLD, 1 << 30) && mallopt(M_TRIM_THRESHOLD, 2147483647);
#else
    return false;
#endif
}

PYBIND11_MODULE(_C, m) {
    m.doc() = "Native code of nanorlhf: byte-level BPE, the CPU kernels and constrained output.";
    m.def("keep_freed_memory", &keep_freed_memory,
          "Let malloc keep large freed blocks for reuse. Returns whether the C library took the setting.");
    bind_tokenizer(m);
    bind_ops(m);
    bind_decode(m);
    bind_token_mask(m);
}

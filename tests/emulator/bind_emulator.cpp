// What the tests ask of the emulator itself.
#include <pybind11/pybind11.h>

#include "emulator.h"

void bind_emulator(pybind11::module_& m) {
    m.def("seed", &emulator::seed, "The order of threads, blocks and background work from now on.");
}

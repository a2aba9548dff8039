#pragma once

#include <pybind11/pybind11.h>

// Adds the operators' fake kernels to the Python module.
void define_fakes(pybind11::module_& m);

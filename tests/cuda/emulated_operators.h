// Included before csrc/cuda/*.cu when they are compiled for the CPU: registers the operators on CPU tensors, in a
// namespace of their own beside the package's kernels.
#pragma once

#include "emulation.h"

#include <torch/csrc/stable/library.h>

#define FFW_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ffw_emulated, CPU, m)

// Settings of the emulation, for ctypes. Every library has its own copy.
extern "C" __attribute__((visibility("default"), weak)) void ffw_emulation_set(unsigned order, size_t shared_limit) {
  emulation::order = order;
  emulation::shared_limit = shared_limit;
}

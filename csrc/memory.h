// How tensors keep their elements, and the copies that an operator makes of those which its loops cannot take as they
// are: the same on every backend. PyTorch is used through its stable ABI only; nothing here reads a tensor's memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <utility>
#include <vector>

#include "gate.h"

namespace ffw {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Precision ---------------------------------------------------------------------------------------------------------

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }

// What is computed with: float for 16-bit storage, else the storage's own.
inline ScalarType working_dtype(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

inline Tensor as_dtype(const Tensor& tensor, ScalarType dtype) {
  return tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype);
}

// Order -------------------------------------------------------------------------------------------------------------

// Whether the strides are those of some order of the dimensions, without gaps.
inline bool is_dense(const Tensor& tensor) {
  std::vector<std::pair<int64_t, int64_t>> dimensions;  // stride, size
  for (int64_t i = 0; i < tensor.dim(); ++i) {
    if (tensor.size(i) != 1) dimensions.emplace_back(tensor.stride(i), tensor.size(i));
  }
  std::sort(dimensions.begin(), dimensions.end());
  int64_t expected = 1;
  for (const auto& [stride, size] : dimensions) {
    if (stride != expected) return false;
    expected *= size;
  }
  return true;
}

// Of tensors of one shape.
inline bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

// Whether all tensors (of one shape) keep their elements in one and the same order, without gaps, so that a loop may
// run over their memory and ignore their dimensions.
inline bool same_dense_order(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  if (first.numel() == 0) return true;
  return is_dense(first) && std::all_of(tensors.begin(), tensors.end(),
                                        [&](const Tensor* tensor) { return same_strides(first, *tensor); });
}

inline Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_dense(const Tensor& tensor, ScalarType dtype) { return made_contiguous(as_dtype(tensor, dtype)); }

// An argument that is changed in place: itself if contiguous and of that dtype, else a copy that save() puts back.
class InPlace {
 public:
  explicit InPlace(const Tensor& tensor) : InPlace(tensor, tensor.scalar_type()) {}
  InPlace(const Tensor& tensor, ScalarType dtype) : tensor_(tensor), dense_(as_dense(tensor, dtype)) {}
  const Tensor& dense() const { return dense_; }
  void save() {
    if (dense_.get() != tensor_.get()) torch::stable::copy_(tensor_, dense_);
  }

 private:
  Tensor tensor_, dense_;
};

// Gates -------------------------------------------------------------------------------------------------------------

// Whether a loop over gates may run over the memory of all tensors (of one shape) and ignore their dimensions. Random
// gates number their elements in the tensors' logical order, so memory order must be that one.
inline bool may_run_over_memory(Kind kind, std::initializer_list<const Tensor*> tensors) {
  if (!is_random(kind)) return same_dense_order(tensors);
  return std::all_of(tensors.begin(), tensors.end(), [](const Tensor* tensor) { return tensor->is_contiguous(); });
}

// run(out, inputs...) on dense tensors of one order: the given ones if they are, else contiguous copies.
template <typename Run, typename... Inputs>
Tensor run_dense(Kind kind, Tensor out, const Run& run, const Inputs&... inputs) {
  if (may_run_over_memory(kind, {&out, &inputs...})) {
    run(out, inputs...);
    return out;
  }
  const Tensor result = out.is_contiguous() ? out : torch::stable::new_empty(out, out.sizes());
  run(result, made_contiguous(inputs)...);
  if (result.get() != out.get()) torch::stable::copy_(out, result);
  return out;
}

}  // namespace ffw

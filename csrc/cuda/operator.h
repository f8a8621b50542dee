// What all CUDA operators do with tensors before they launch: checks with the messages of ffw_fast/ops.py, memory
// order, the device and its current stream. PyTorch is used through its stable ABI only. Nothing here reads device
// memory or waits for the device, so every operator can be captured in a CUDA graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "device.cuh"

#if !defined(FFW_OPERATORS)  // an emulation registers its operators elsewhere
#define FFW_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CUDA, m)
#endif

namespace ffw::cuda {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Checks ------------------------------------------------------------------------------------------------------------

template <typename... Parts>
std::string text_of(const Parts&... parts) {
  std::ostringstream text;
  (text << ... << parts);
  return text.str();
}

// Becomes a ValueError in Python.
template <typename... Parts>
void check_value(bool holds, const Parts&... message) {
  if (!holds) throw std::invalid_argument(text_of(message...));
}

// Becomes a RuntimeError: a TypeError cannot be raised through the stable ABI.
template <typename... Parts>
void check_type(bool holds, const Parts&... message) {
  if (!holds) throw std::runtime_error(text_of(message...));
}

inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

inline std::string dtype_text(ScalarType dtype) {
  switch (dtype) {
    case ScalarType::Double: return "torch.float64";
    case ScalarType::Float: return "torch.float32";
    case ScalarType::Half: return "torch.float16";
    case ScalarType::BFloat16: return "torch.bfloat16";
    case ScalarType::Long: return "torch.int64";
    case ScalarType::Int: return "torch.int32";
    case ScalarType::Bool: return "torch.bool";
    default: return std::string("torch dtype ") + torch::headeronly::toString(dtype);
  }
}

inline bool is_half(ScalarType dtype) { return dtype == ScalarType::BFloat16 || dtype == ScalarType::Half; }
inline bool is_floating(ScalarType dtype) {
  return is_half(dtype) || dtype == ScalarType::Float || dtype == ScalarType::Double;
}
inline ScalarType working_dtype(ScalarType dtype) { return is_half(dtype) ? ScalarType::Float : dtype; }

inline bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

inline void check_shape_and_dtype(const char* name, const Tensor& tensor, const char* of, const Tensor& like) {
  check_value(same_shape(tensor, like), name, " must have the shape of ", of, " ", shape_text(like), ", got ",
              shape_text(tensor));
  check_type(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", of, " ",
             dtype_text(like.scalar_type()), ", got ", dtype_text(tensor.scalar_type()));
}

inline void check_pair(const Tensor& weight, const Tensor& scores, const Tensor& temperature, const Tensor& draw) {
  check_value(same_shape(weight, scores), "scores must have the weight's shape ", shape_text(weight), ", got ",
              shape_text(scores));
  const ScalarType type = weight.scalar_type();
  const bool wide_scores = is_half(type) && scores.scalar_type() == ScalarType::Float;
  check_type(is_floating(type) && (type == scores.scalar_type() || wide_scores), "scores must have the weight's dtype ",
             dtype_text(type), " (or float32 beside 16 bits), got ", dtype_text(scores.scalar_type()));
  check_value(temperature.numel() == 1 && temperature.scalar_type() == ScalarType::Float,
              "temperature must be one float32, got ", dtype_text(temperature.scalar_type()), " of shape ",
              shape_text(temperature));
  check_value(draw.dim() == 1 && draw.numel() == 3 && draw.scalar_type() == ScalarType::Long,
              "draw must be 3 int64 numbers, got ", dtype_text(draw.scalar_type()), " of shape ", shape_text(draw));
}

inline Kind checked_kind(int64_t kind) {
  check_value(kind >= 0 && kind < kind_count, kind, " is not a valid GateKind");
  return static_cast<Kind>(kind);
}

inline int checked_size(const char* name, int64_t size) {
  check_value(size >= 0 && size < (int64_t{1} << 30), name, " must be below 2**30, got ", size);
  return static_cast<int>(size);
}

// The device --------------------------------------------------------------------------------------------------------

// Makes the tensors' device the current one while it lives; `stream` is the one PyTorch works on there.
#if defined(FFW_EMULATION)
struct OnDevice {
  explicit OnDevice(std::initializer_list<const Tensor*>) {}
  cudaStream_t stream = nullptr;
};
#else
class OnDevice {
 public:
  explicit OnDevice(std::initializer_list<const Tensor*> tensors) : guard_(checked_device(tensors)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(checked_device(tensors), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  static int32_t checked_device(std::initializer_list<const Tensor*> tensors) {
    const int32_t device = (*tensors.begin())->get_device_index();
    for (const Tensor* tensor : tensors) {
      check_type(tensor->is_cuda() && tensor->get_device_index() == device, "expected all tensors on cuda:", device);
    }
    return device;
  }
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Memory ------------------------------------------------------------------------------------------------------------

inline Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

inline Tensor as_dense(const Tensor& tensor, ScalarType dtype) {
  return made_contiguous(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// An argument that is changed in place: itself if contiguous and of that dtype, else a copy that save() puts back.
class InPlace {
 public:
  InPlace(const Tensor& tensor, ScalarType dtype) : tensor_(tensor), dense_(as_dense(tensor, dtype)) {}
  const Tensor& dense() const { return dense_; }
  void save() {
    if (dense_.get() != tensor_.get()) torch::stable::copy_(tensor_, dense_);
  }

 private:
  Tensor tensor_, dense_;
};

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

// Whether all tensors (of one shape) keep their elements in one and the same order, without gaps, so that a kernel may
// run over their memory and ignore their dimensions. Random gates number their elements in the tensors' logical order.
inline bool may_run_over_memory(Kind kind, std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  if (first.numel() == 0) return true;
  if (is_random(kind) ? !first.is_contiguous() : !is_dense(first)) return false;
  for (const Tensor* tensor : tensors) {
    for (int64_t i = 0; i < first.dim(); ++i) {
      if (first.size(i) != 1 && tensor->stride(i) != first.stride(i)) return false;
    }
  }
  return true;
}

// Calls run(Weight(), Score()) with the stored types of weights beside working scores.
template <typename Run>
void for_dtype(ScalarType weight, const Run& run) {
  switch (weight) {
    case ScalarType::Float: return run(float(), float());
    case ScalarType::Half: return run(__half(), float());
    case ScalarType::BFloat16: return run(__nv_bfloat16(), float());
    default: return run(double(), double());
  }
}

}  // namespace ffw::cuda

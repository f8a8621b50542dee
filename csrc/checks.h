// What the operators of every backend ask of their tensors, with the messages of ffw_fast/ops.py, and in which order
// tensors keep their elements. PyTorch is used through its stable ABI only; nothing here reads a tensor's memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <initializer_list>
#include <sstream>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "gate.h"

namespace ffw {

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

// As Python shows it: "(3, 4)".
inline std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

// As Python shows it: "torch.float32".
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

inline void check_pair(const Tensor& weight, const Tensor& scores) {
  check_value(same_shape(weight, scores), "scores must have the weight's shape ", shape_text(weight), ", got ",
              shape_text(scores));
  const ScalarType type = weight.scalar_type();
  const bool wide_scores = is_half(type) && scores.scalar_type() == ScalarType::Float;
  check_type(is_floating(type) && (type == scores.scalar_type() || wide_scores), "scores must have the weight's dtype ",
             dtype_text(type), " (or float32 beside 16 bits), got ", dtype_text(scores.scalar_type()));
}

inline void check_temperature(const Tensor& temperature) {
  check_value(temperature.numel() == 1 && temperature.scalar_type() == ScalarType::Float,
              "temperature must be one float32, got ", dtype_text(temperature.scalar_type()), " of shape ",
              shape_text(temperature));
}

inline void check_draw(const Tensor& draw) {
  check_value(draw.dim() == 1 && draw.numel() == 3 && draw.scalar_type() == ScalarType::Long,
              "draw must be 3 int64 numbers, got ", dtype_text(draw.scalar_type()), " of shape ", shape_text(draw));
}

inline Kind checked_kind(int64_t kind) {
  check_value(kind >= 0 && kind < kind_count, kind, " is not a valid GateKind");
  return static_cast<Kind>(kind);
}

// Order in memory ---------------------------------------------------------------------------------------------------

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

struct Named {
  const char* name;
  const Tensor& tensor;
};

// That two tensors share no memory. Tensors with gaps are let through: they may well lie in each other's.
inline void check_apart(const Named& a, const Named& b) {
  if (a.tensor.numel() == 0 || b.tensor.numel() == 0 || !is_dense(a.tensor) || !is_dense(b.tensor)) return;
  const auto bytes = [](const Tensor& tensor) { return tensor.numel() * static_cast<int64_t>(tensor.element_size()); };
  const char* first = static_cast<const char*>(a.tensor.data_ptr());
  const char* second = static_cast<const char*>(b.tensor.data_ptr());
  check_value(first + bytes(a.tensor) <= second || second + bytes(b.tensor) <= first, a.name, " and ", b.name,
              " share memory; what is changed in place needs memory of its own");
}

// That nothing which an operator changes in place shares memory with anything else that it is given.
inline void check_apart(std::initializer_list<Named> changed, std::initializer_list<Named> others) {
  for (const Named* a = changed.begin(); a != changed.end(); ++a) {
    for (const Named* b = a + 1; b != changed.end(); ++b) check_apart(*a, *b);
    for (const Named& other : others) check_apart(*a, other);
  }
}

inline Tensor made_contiguous(const Tensor& tensor) {
  return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
}

}  // namespace ffw

// Checks and memory order: see tensors.h.
#include "tensors.h"

#include <algorithm>
#include <utility>
#include <vector>

namespace ffw::cpu {

std::string shape_text(const Tensor& tensor) {
  std::ostringstream text;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  text << (tensor.dim() == 1 ? ",)" : ")");
  return text.str();
}

std::string dtype_text(ScalarType dtype) {
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

bool same_shape(const Tensor& a, const Tensor& b) {
  if (a.dim() != b.dim()) return false;
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != b.size(i)) return false;
  }
  return true;
}

void check_on_cpu(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) check_type(tensor->is_cpu(), "expected all tensors on the CPU");
}

void check_shape_and_dtype(const char* name, const Tensor& tensor, const char* of, const Tensor& like) {
  check_value(same_shape(tensor, like), name, " must have the shape of ", of, " ", shape_text(like), ", got ",
              shape_text(tensor));
  check_type(tensor.scalar_type() == like.scalar_type(), name, " must have the dtype of ", of, " ",
             dtype_text(like.scalar_type()), ", got ", dtype_text(tensor.scalar_type()));
}

void check_pair(const Tensor& weight, const Tensor& scores) {
  check_value(same_shape(weight, scores), "scores must have the weight's shape ", shape_text(weight), ", got ",
              shape_text(scores));
  const ScalarType type = weight.scalar_type();
  const bool wide_scores = is_half(type) && scores.scalar_type() == ScalarType::Float;
  check_type(is_floating(type) && (type == scores.scalar_type() || wide_scores), "scores must have the weight's dtype ",
             dtype_text(type), " (or float32 beside 16 bits), got ", dtype_text(scores.scalar_type()));
}

Kind checked_kind(int64_t kind) {
  check_value(kind >= 0 && kind < kind_count, kind, " is not a valid GateKind");
  return static_cast<Kind>(kind);
}

float checked_temperature(const Tensor& temperature) {
  check_value(temperature.numel() == 1 && temperature.scalar_type() == ScalarType::Float,
              "temperature must be one float32, got ", dtype_text(temperature.scalar_type()), " of shape ",
              shape_text(temperature));
  return *static_cast<const float*>(temperature.data_ptr());
}

Draw checked_draw(const Tensor& draw) {
  check_value(draw.dim() == 1 && draw.numel() == 3 && draw.scalar_type() == ScalarType::Long,
              "draw must be 3 int64 numbers, got ", dtype_text(draw.scalar_type()), " of shape ", shape_text(draw));
  const int64_t* numbers = static_cast<const int64_t*>(draw.data_ptr());
  const int64_t stride = draw.stride(0);
  return {numbers[0], numbers[stride], numbers[2 * stride]};
}

double checked_scalar(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check_value(tensor.numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double), name,
              " must be one float32 or float64, got ", dtype_text(type), " of shape ", shape_text(tensor));
  const void* data = tensor.data_ptr();
  return type == ScalarType::Float ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
}

namespace {

// Whether the strides are those of some order of the dimensions, without gaps.
bool is_dense(const Tensor& tensor) {
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

bool same_strides(const Tensor& a, const Tensor& b) {
  for (int64_t i = 0; i < a.dim(); ++i) {
    if (a.size(i) != 1 && a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

}  // namespace

bool same_dense_order(std::initializer_list<const Tensor*> tensors) {
  const Tensor& first = **tensors.begin();
  if (first.numel() == 0) return true;
  return is_dense(first) && std::all_of(tensors.begin(), tensors.end(),
                                        [&](const Tensor* tensor) { return same_strides(first, *tensor); });
}

}  // namespace ffw::cpu

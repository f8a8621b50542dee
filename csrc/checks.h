// What the operators of every backend ask of their tensors, with the messages of ffw_fast/ops.py. PyTorch is used
// through its stable ABI only; nothing here reads a tensor's memory.
#pragma once

#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

#include "gate.h"
#include "memory.h"

namespace ffw {

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

// A shape as Python shows it: "(3, 4)". It is written where a check fails only: writing takes longer than a small
// operator does.
struct ShapeText {
  const Tensor& tensor;
};
inline ShapeText shape_text(const Tensor& tensor) { return {tensor}; }
inline std::ostream& operator<<(std::ostream& text, ShapeText shape) {
  const Tensor& tensor = shape.tensor;
  text << "(";
  for (int64_t i = 0; i < tensor.dim(); ++i) text << (i > 0 ? ", " : "") << tensor.size(i);
  return text << (tensor.dim() == 1 ? ",)" : ")");
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

// Of gate_weight_backward, whose grad may have any floating-point dtype.
inline void check_gate_grad(const Tensor& grad, const Tensor& weight) {
  check_value(same_shape(grad, weight), "grad must have the weight's shape ", shape_text(weight), ", got ",
              shape_text(grad));
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

inline void check_scalar(const char* name, const Tensor& tensor) {
  const ScalarType type = tensor.scalar_type();
  check_value(tensor.numel() == 1 && (type == ScalarType::Float || type == ScalarType::Double), name,
              " must be one float32 or float64, got ", dtype_text(type), " of shape ", shape_text(tensor));
}

inline Kind checked_kind(int64_t kind) {
  check_value(kind >= 0 && kind < kind_count, kind, " is not a valid GateKind");
  return static_cast<Kind>(kind);
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

// Operators ---------------------------------------------------------------------------------------------------------

// Of gated_adam_step_; its scalars are checked where they are read.
inline void check_adam(const Tensor& gated, const Tensor& scores, const Tensor& exp_avg, const Tensor& exp_avg_sq,
                       const Tensor& movement, const Tensor& weight, const Tensor& grad) {
  check_pair(weight, scores);
  check_shape_and_dtype("gated", gated, "weight", weight);
  check_shape_and_dtype("grad", grad, "weight", weight);
  check_shape_and_dtype("exp_avg", exp_avg, "scores", scores);
  check_shape_and_dtype("exp_avg_sq", exp_avg_sq, "scores", scores);
  check_value(movement.numel() == 1 && movement.scalar_type() == ScalarType::Double,
              "movement must be one float64, got ", dtype_text(movement.scalar_type()), " of shape ",
              shape_text(movement));
  check_apart({{"gated", gated}, {"scores", scores}, {"exp_avg", exp_avg}, {"exp_avg_sq", exp_avg_sq},
               {"movement", movement}},
              {{"weight", weight}, {"grad", grad}});
}

// Of fit_linear_head_, but for the range of labels and order, which are read where they are used.
inline void check_head(const Tensor& weight, const Tensor& bias, const Tensor& weight_momentum,
                       const Tensor& bias_momentum, const Tensor& plateau, const Tensor& features,
                       const Tensor& labels, const Tensor& order, int64_t batch_size) {
  check_value(weight.dim() == 3 && weight.size(1) > 0 && bias.dim() == 2 && bias.size(0) == weight.size(0) &&
                  bias.size(1) == weight.size(1),
              "expected weight (heads, K, D) and bias (heads, K), got ", shape_text(weight), ", ", shape_text(bias));
  check_value(features.dim() == 2 && features.size(1) == weight.size(2) && labels.dim() == 2 &&
                  labels.size(0) == features.size(0) && labels.size(1) == weight.size(0),
              "expected features (n, D) and labels (n, heads) for a weight ", shape_text(weight), ", got ",
              shape_text(features), ", ", shape_text(labels));
  const ScalarType dtype = weight.scalar_type();
  check_type((dtype == ScalarType::Float || dtype == ScalarType::Double) && features.scalar_type() == dtype,
             "weight and features must both be float32 or float64, got ", dtype_text(dtype), ", ",
             dtype_text(features.scalar_type()));
  check_shape_and_dtype("weight_momentum", weight_momentum, "weight", weight);
  check_shape_and_dtype("bias_momentum", bias_momentum, "bias", bias);
  check_type(bias.scalar_type() == dtype, "bias must have the dtype of weight ", dtype_text(dtype), ", got ",
             dtype_text(bias.scalar_type()));
  check_value(plateau.dim() == 1 && plateau.numel() == 3 && plateau.scalar_type() == ScalarType::Double,
              "plateau must be 3 float64 numbers, got ", dtype_text(plateau.scalar_type()), " of shape ",
              shape_text(plateau));
  check_value(order.dim() == 2, "order must be (epochs, samples), got ", shape_text(order));
  check_type(labels.scalar_type() == ScalarType::Long && order.scalar_type() == ScalarType::Long,
             "labels and order must be int64, got ", dtype_text(labels.scalar_type()), ", ",
             dtype_text(order.scalar_type()));
  check_value(batch_size > 0, "batch_size must be positive, got ", batch_size);
  check_apart({{"weight", weight}, {"bias", bias}, {"weight_momentum", weight_momentum},
               {"bias_momentum", bias_momentum}, {"plateau", plateau}},
              {{"features", features}, {"labels", labels}, {"order", order}});
}

// Of mutual_information: logits [n, heads, K], labels [n, heads].
inline void check_information(const Tensor& logits, const Tensor& labels) {
  check_value(logits.dim() == 3 && labels.dim() == 2 && labels.size(0) == logits.size(0) &&
                  labels.size(1) == logits.size(1),
              "expected logits (n, heads, K) and labels (n, heads), got ", shape_text(logits), ", ",
              shape_text(labels));
  check_type(is_floating(logits.scalar_type()) && labels.scalar_type() == ScalarType::Long,
             "expected floating-point logits and int64 labels, got ", dtype_text(logits.scalar_type()), ", ",
             dtype_text(labels.scalar_type()));
  check_value(logits.numel() > 0, "mutual information needs at least one sample, head and class, got logits ",
              shape_text(logits));
}

// Of mutual_information_backward: grad [heads] and joint [heads, K, K], too.
inline void check_information_backward(const Tensor& grad, const Tensor& logits, const Tensor& labels,
                                       const Tensor& joint) {
  check_information(logits, labels);
  const int64_t heads = logits.size(1), classes = logits.size(2);
  check_value(grad.dim() == 1 && grad.size(0) == heads, "grad must be one number a head, got ", shape_text(grad));
  check_value(joint.dim() == 3 && joint.size(0) == heads && joint.size(1) == classes && joint.size(2) == classes,
              "joint must be (heads, K, K), got ", shape_text(joint));
}

// Of objective, but for the range of labels: logits [n, C], labels [n], head logits [n, heads, K], bias labels
// [n, heads].
inline void check_objective(const Tensor& logits, const Tensor& labels, const Tensor& head_logits,
                            const Tensor& bias_labels, const std::optional<Tensor>& importance,
                            const std::optional<Tensor>& aligned) {
  check_value(logits.dim() == 2 && labels.dim() == 1 && labels.size(0) == logits.size(0),
              "expected logits (n, C) and labels (n,), got ", shape_text(logits), ", ", shape_text(labels));
  check_value(head_logits.dim() == 3 && bias_labels.dim() == 2 && head_logits.size(0) == logits.size(0) &&
                  bias_labels.size(0) == logits.size(0) && bias_labels.size(1) == head_logits.size(1),
              "expected head logits (", logits.size(0), ", heads, K) and bias labels (", logits.size(0),
              ", heads), got ", shape_text(head_logits), ", ", shape_text(bias_labels));
  check_value(logits.numel() > 0 && head_logits.numel() > 0, "the objective of an empty minibatch is not defined");
  check_type(is_floating(logits.scalar_type()) && head_logits.scalar_type() == logits.scalar_type(),
             "logits and head logits must have one floating-point dtype, got ", dtype_text(logits.scalar_type()),
             ", ", dtype_text(head_logits.scalar_type()));
  check_value(!importance || (importance->dim() == 3 && importance->size(0) == head_logits.size(1) &&
                              importance->size(1) == logits.size(1) && importance->size(2) == head_logits.size(2)),
              "importance must be (heads, C, K), got ", importance ? text_of(shape_text(*importance)) : "");
  check_value(!aligned || (aligned->dim() == 1 && aligned->size(0) == logits.size(1)), "aligned must be (C,), got ",
              aligned ? text_of(shape_text(*aligned)) : "");
  const auto check_labels = [](const char* name, const Tensor& given) {
    check_type(given.scalar_type() == ScalarType::Long, name, " must be int64, got ", dtype_text(given.scalar_type()));
  };
  check_labels("labels", labels);
  check_labels("bias labels", bias_labels);
  if (aligned) check_labels("aligned", *aligned);
}

}  // namespace ffw

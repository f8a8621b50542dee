// Checks: see tensors.h.
#include "tensors.h"

namespace ffw::cpu {

void check_on_cpu(std::initializer_list<const Tensor*> tensors) {
  for (const Tensor* tensor : tensors) check_type(tensor->is_cpu(), "expected all tensors on the CPU");
}

float checked_temperature(const Tensor& temperature) {
  check_temperature(temperature);
  return *static_cast<const float*>(temperature.data_ptr());
}

Draw checked_draw(const Tensor& draw) {
  check_draw(draw);
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

}  // namespace ffw::cpu

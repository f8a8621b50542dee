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
  check_scalar(name, tensor);
  const void* data = tensor.data_ptr();
  const bool single = tensor.scalar_type() == ScalarType::Float;
  return single ? *static_cast<const float*>(data) : *static_cast<const double*>(data);
}

const int64_t* checked_indices(const char* name, const Tensor& indices, int64_t end) {
  const int64_t* data = static_cast<const int64_t*>(indices.data_ptr());
  for (int64_t i = 0; i < indices.numel(); ++i) {
    check_value(data[i] >= 0 && data[i] < end, name, " must be in [0, ", end, "), got ", data[i]);
  }
  return data;
}

}  // namespace ffw::cpu

// tanh_: the hyperbolic tangent in place.
#include "tensors.h"

namespace ffw::cpu {
namespace {

void tanh_in_place(Tensor x) {
  check_on_cpu({&x});
  const ScalarType dtype = x.scalar_type();
  check_type(dtype == ScalarType::Float || is_half(dtype), "x must be torch.float32, bfloat16 or float16, got ",
             dtype_text(dtype));
  if (!same_dense_order({&x})) {
    InPlace gaps(x);
    tanh_in_place(gaps.dense());
    gaps.save();
    return;
  }
  const Array array(x);
  const auto loop = instruction_set().tanh;
  for_each_block(x.numel(), [&](int64_t start, int64_t n) {
    float buffer[block_size];
    float* values = array.update(start, n, buffer);
    loop(values, n);
    array.write(start, n, values);
  });
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) {
  m.impl("tanh_", TORCH_BOX(&ffw::cpu::tanh_in_place));
}

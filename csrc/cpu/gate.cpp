// gate_weight and gate_weight_backward: the gate evaluated or sampled and multiplied, one pass over memory.
#include "tensors.h"

namespace ffw::cpu {
namespace {

template <typename T>
void gate_weight_dense(const Tensor& out, const Tensor& weight, const Tensor& scores, float temperature,
                       const Draw& draw, Kind kind) {
  const Array out_array(out), weight_array(weight), scores_array(scores);
  const T inverse = inverse_temperature<T>(temperature);
  const Loops<T>& loop = loops<T>();
  for_each_block(weight.numel(), [&](int64_t start, int64_t n) {
    T w[block_size], m[block_size], u[block_size], v[block_size];
    if (is_random(kind)) loop.uniform(draw, start, n, u);
    T* target = out_array.target(start, v);
    loop.gate_weight[static_cast<int>(kind)](weight_array.read(start, n, w), scores_array.read(start, n, m), u,
                                             inverse, target, n);
    out_array.write(start, n, target);
  });
}

template <typename T>
void gate_weight_backward_dense(const Tensor& out, const Tensor& grad, const Tensor& weight, const Tensor& scores,
                                float temperature, const Draw& draw, Kind kind) {
  const Array out_array(out), grad_array(grad), weight_array(weight), scores_array(scores);
  const T inverse = inverse_temperature<T>(temperature);
  const Loops<T>& loop = loops<T>();
  for_each_block(weight.numel(), [&](int64_t start, int64_t n) {
    T g[block_size], w[block_size], m[block_size], u[block_size], result[block_size];
    if (has_random_slope(kind)) loop.uniform(draw, start, n, u);
    T* target = out_array.target(start, result);
    loop.gate_weight_backward[static_cast<int>(kind)](grad_array.read(start, n, g), weight_array.read(start, n, w),
                                                      scores_array.read(start, n, m), u, inverse, target, n);
    out_array.write(start, n, target);
  });
}

Tensor gate_weight(Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int64_t kind_number) {
  check_on_cpu({&weight, &scores, &temperature, &draw});
  check_pair(weight, scores);
  const float t = checked_temperature(temperature);
  const Draw d = checked_draw(draw);
  const Kind kind = checked_kind(kind_number);
  const auto dense = scores.scalar_type() == ScalarType::Double ? gate_weight_dense<double> : gate_weight_dense<float>;
  const auto run = [&](const Tensor& out, const Tensor& w, const Tensor& m) { dense(out, w, m, t, d, kind); };
  return run_dense(kind, torch::stable::empty_like(weight), run, weight, scores);
}

Tensor gate_weight_backward(Tensor grad, Tensor weight, Tensor scores, Tensor temperature, Tensor draw,
                            int64_t kind_number) {
  check_on_cpu({&grad, &weight, &scores, &temperature, &draw});
  check_pair(weight, scores);
  check_gate_grad(grad, weight);
  const float t = checked_temperature(temperature);
  const Draw d = checked_draw(draw);
  const Kind kind = checked_kind(kind_number);
  const bool wide = scores.scalar_type() == ScalarType::Double;
  if (wide || !is_half(grad.scalar_type())) grad = as_dtype(grad, working_dtype(scores.scalar_type()));
  const auto dense = wide ? gate_weight_backward_dense<double> : gate_weight_backward_dense<float>;
  const auto run = [&](const Tensor& out, const Tensor& g, const Tensor& w, const Tensor& m) {
    dense(out, g, w, m, t, d, kind);
  };
  return run_dense(kind, torch::stable::empty_like(scores), run, grad, weight, scores);
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) {
  m.impl("gate_weight", TORCH_BOX(&ffw::cpu::gate_weight));
  m.impl("gate_weight_backward", TORCH_BOX(&ffw::cpu::gate_weight_backward));
}

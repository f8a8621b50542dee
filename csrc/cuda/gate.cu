// gate_weight and gate_weight_backward for CUDA tensors; the kernels are in gate.cuh.
#include "gate.cuh"

#include "operator.h"

namespace ffw::cuda {
namespace {

Tensor gate_weight(Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int64_t kind_number) {
  const OnDevice device({&weight, &scores, &temperature, &draw});
  check_gates(weight, scores, temperature, draw);
  const Kind kind = checked_kind(kind_number);
  const Tensor dense_draw = made_contiguous(draw);
  const ScalarType dtype = weight.scalar_type();
  const auto run = [&](const Tensor& out, const Tensor& dense_weight, const Tensor& dense_scores) {
    for_dtype(dtype, [&](auto w, auto s) {
      using Weight = decltype(w);
      using Score = decltype(s);
      launch_gate_weight<Weight, Score>({data<Weight>(out), data<Weight>(dense_weight), data<Score>(dense_scores),
                                         data<float>(temperature), data<int64_t>(dense_draw), out.numel(), false},
                                        kind, device.stream);
    });
  };
  // 16-bit scores are widened, which is a pass more, but exact.
  return run_dense(kind, torch::stable::empty_like(weight), run, weight, as_dtype(scores, working_dtype(dtype)));
}

Tensor gate_weight_backward(Tensor grad, Tensor weight, Tensor scores, Tensor temperature, Tensor draw,
                            int64_t kind_number) {
  const OnDevice device({&grad, &weight, &scores, &temperature, &draw});
  check_gates(weight, scores, temperature, draw);
  check_gate_grad(grad, weight);
  const ScalarType working = working_dtype(weight.scalar_type());
  if (scores.scalar_type() != working) {  // as in gate_weight, and their gradient is rounded back
    Tensor out = torch::stable::empty_like(scores);
    torch::stable::copy_(out, gate_weight_backward(grad, weight, as_dtype(scores, working), temperature, draw,
                                                   kind_number));
    return out;
  }
  const Kind kind = checked_kind(kind_number);
  const Tensor dense_draw = made_contiguous(draw);
  // The kernels know grads of the weight's dtype; others are rounded no further than to the working precision.
  const ScalarType dtype = grad.scalar_type() == weight.scalar_type() ? weight.scalar_type() : working;
  const auto run = [&](const Tensor& out, const Tensor& dense_grad, const Tensor& dense_weight,
                       const Tensor& dense_scores) {
    for_dtype(dtype, [&](auto w, auto s) {
      using Weight = decltype(w);
      using Score = decltype(s);
      launch_gate_weight_backward<Weight, Score>(
          {data<Score>(out), data<Weight>(dense_grad), data<Weight>(dense_weight), data<Score>(dense_scores),
           data<float>(temperature), data<int64_t>(dense_draw), out.numel(), false},
          kind, device.stream);
    });
  };
  return run_dense(kind, torch::stable::empty_like(scores), run, as_dtype(grad, dtype), as_dtype(weight, dtype),
                   scores);
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) {
  m.impl("gate_weight", TORCH_BOX(&ffw::cuda::gate_weight));
  m.impl("gate_weight_backward", TORCH_BOX(&ffw::cuda::gate_weight_backward));
}

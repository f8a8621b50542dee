// gate_weight and gate_weight_backward for CUDA tensors; the kernels are in gate.cuh.
#include "gate.cuh"

#include "operator.h"

namespace ffw::cuda {
namespace {

// Runs on dense tensors of one order and of the dtypes that kernels know: the given ones if they are, else contiguous
// copies. 16-bit scores are widened first, which is a pass more, but exact.
template <typename Run>
Tensor run_dense(Kind kind, Tensor out, std::vector<Tensor> inputs, const std::vector<ScalarType>& dtypes,
                 ScalarType out_dtype, const Run& run) {
  bool direct = out.scalar_type() == out_dtype;
  for (size_t i = 0; i < inputs.size(); ++i) {
    direct = direct && inputs[i].scalar_type() == dtypes[i] && may_run_over_memory(kind, {&out, &inputs[i]});
  }
  if (direct) {
    run(out, inputs);
    return out;
  }
  for (size_t i = 0; i < inputs.size(); ++i) inputs[i] = as_dense(inputs[i], dtypes[i]);
  const bool in_place = out.is_contiguous() && out.scalar_type() == out_dtype;
  const Tensor result = in_place ? out : torch::stable::new_empty(out, out.sizes(), out_dtype);
  run(result, inputs);
  if (!in_place) torch::stable::copy_(out, result);
  return out;
}

Tensor gate_weight(Tensor weight, Tensor scores, Tensor temperature, Tensor draw, int64_t kind_number) {
  const OnDevice device({&weight, &scores, &temperature, &draw});
  check_gates(weight, scores, temperature, draw);
  const Kind kind = checked_kind(kind_number);
  const Tensor dense_draw = made_contiguous(draw);
  const ScalarType dtype = weight.scalar_type();
  const auto run = [&](const Tensor& out, const std::vector<Tensor>& in) {
    for_dtype(dtype, [&](auto w, auto s) {
      using Weight = decltype(w);
      using Score = decltype(s);
      launch_gate_weight<Weight, Score>({data<Weight>(out), data<Weight>(in[0]), data<Score>(in[1]),
                                         data<float>(temperature), data<int64_t>(dense_draw), out.numel(), false},
                                        kind, device.stream);
    });
  };
  return run_dense(kind, torch::stable::empty_like(weight), {weight, scores}, {dtype, working_dtype(dtype)}, dtype,
                   run);
}

Tensor gate_weight_backward(Tensor grad, Tensor weight, Tensor scores, Tensor temperature, Tensor draw,
                            int64_t kind_number) {
  const OnDevice device({&grad, &weight, &scores, &temperature, &draw});
  check_gates(weight, scores, temperature, draw);
  check_gate_grad(grad, weight);
  const Kind kind = checked_kind(kind_number);
  const Tensor dense_draw = made_contiguous(draw);
  const ScalarType working = working_dtype(weight.scalar_type());
  // The kernels know grads of the weight's dtype; others are rounded no further than to the working precision.
  const ScalarType dtype = grad.scalar_type() == weight.scalar_type() ? weight.scalar_type() : working;
  const auto run = [&](const Tensor& out, const std::vector<Tensor>& in) {
    for_dtype(dtype, [&](auto w, auto s) {
      using Weight = decltype(w);
      using Score = decltype(s);
      launch_gate_weight_backward<Weight, Score>(
          {data<Score>(out), data<Weight>(in[0]), data<Weight>(in[1]), data<Score>(in[2]), data<float>(temperature),
           data<int64_t>(dense_draw), out.numel(), false},
          kind, device.stream);
    });
  };
  return run_dense(kind, torch::stable::empty_like(scores), {grad, weight, scores}, {dtype, dtype, working}, working,
                   run);
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) {
  m.impl("gate_weight", TORCH_BOX(&ffw::cuda::gate_weight));
  m.impl("gate_weight_backward", TORCH_BOX(&ffw::cuda::gate_weight_backward));
}

// gated_adam_step_ for CUDA tensors; the kernels are in gated_adam.cuh.
#include "gated_adam.cuh"

#include "operator.h"

namespace ffw::cuda {
namespace {

template <typename T>
AdamRates<T> rates_of(double beta1, double beta2, double eps, double weight_decay) {
  return {static_cast<T>(1 - beta1),        static_cast<T>(beta2),           static_cast<T>(1 - beta2),
          static_cast<T>(std::log(beta1)),  static_cast<T>(std::log(beta2)), static_cast<T>(eps),
          static_cast<T>(weight_decay)};
}

void gated_adam_step_(Tensor gated, Tensor scores, Tensor exp_avg, Tensor exp_avg_sq, Tensor movement, Tensor weight,
                      Tensor grad, Tensor temperature, Tensor next_temperature, Tensor step, Tensor lr, Tensor draw,
                      Tensor next_draw, double beta1, double beta2, double eps, double weight_decay,
                      int64_t kind_number, bool measure) {
  const OnDevice device({&gated, &scores, &exp_avg, &exp_avg_sq, &movement, &weight, &grad, &temperature,
                         &next_temperature, &step, &lr, &draw, &next_draw});
  check_adam(gated, scores, exp_avg, exp_avg_sq, movement, weight, grad);
  for (const Tensor* scalar : {&temperature, &next_temperature}) check_temperature(*scalar);
  for (const Tensor* key : {&draw, &next_draw}) check_draw(*key);
  check_scalar("step", step);
  check_scalar("lr", lr);
  const Kind kind = checked_kind(kind_number);

  // Flat buffers are contiguous and taken as they are. 16-bit scores are widened and rounded back, a pass more.
  const ScalarType dtype = weight.scalar_type(), working = working_dtype(dtype);
  InPlace new_gated(gated), new_scores(scores, working), new_exp_avg(exp_avg, working),
      new_exp_avg_sq(exp_avg_sq, working);
  const Tensor dense_weight = made_contiguous(weight), dense_grad = made_contiguous(grad);
  const Tensor dense_draw = made_contiguous(draw), dense_next_draw = made_contiguous(next_draw);
  const Tensor dense_step = as_dense(step, working), dense_lr = as_dense(lr, working);
  for_dtype(dtype, [&](auto w, auto s) {
    using Weight = decltype(w);
    using Score = decltype(s);
    const int64_t blocks = measure ? movement_blocks<Weight>(weight.numel()) : 0;
    const Tensor movements = torch::stable::new_empty(new_scores.dense(), {blocks});
    launch_gated_adam<Weight, Score>(
        {data<Weight>(new_gated.dense()), data<Score>(new_scores.dense()), data<Score>(new_exp_avg.dense()),
         data<Score>(new_exp_avg_sq.dense()), data<Weight>(dense_weight), data<Weight>(dense_grad),
         data<float>(temperature), data<float>(next_temperature), data<Score>(dense_step), data<Score>(dense_lr),
         data<int64_t>(dense_draw), data<int64_t>(dense_next_draw), blocks > 0 ? data<Score>(movements) : nullptr,
         rates_of<Score>(beta1, beta2, eps, weight_decay), weight.numel(), false},
        kind, device.stream);
    if (blocks > 0) launch_add_movement(data<double>(movement), data<const Score>(movements), blocks, device.stream);
  });
  for (InPlace* changed : {&new_gated, &new_scores, &new_exp_avg, &new_exp_avg_sq}) changed->save();
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) { m.impl("gated_adam_step_", TORCH_BOX(&ffw::cuda::gated_adam_step_)); }

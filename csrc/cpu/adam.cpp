// gated_adam_step_: straight-through gradient, Adam, and the gated weight of the new scores, one pass over memory.
#include <vector>

#include "tensors.h"

namespace ffw::cpu {
namespace {

struct Buffers {
  Array gated, scores, exp_avg, exp_avg_sq, weight, grad;
};

struct Step {
  Kind kind;
  float temperature, next_temperature;
  Draw draw, next_draw;
  bool measure;
};

// The sum of the new gates' movement if step.measure, else 0.
template <typename T>
double adam_dense(const Buffers& buffers, int64_t count, const Step& step, const Adam<T>& adam) {
  const Loops<T>& loop = loops<T>();
  const int kind = static_cast<int>(step.kind);
  const T inverse = inverse_temperature<T>(step.temperature);
  const T next_inverse = inverse_temperature<T>(step.next_temperature);
  // One sum a block, added up in order, so that the total does not depend on the number of threads.
  std::vector<double> movements(step.measure ? (count + block_size - 1) / block_size : 0);
  for_each_block(count, [&](int64_t start, int64_t n) {
    T v[block_size], m[block_size], avg[block_size], avg_sq[block_size], w[block_size], g[block_size];
    T u[block_size], next_u[block_size];
    if (has_random_slope(step.kind)) loop.uniform(step.draw, start, n, u);
    if (is_random(step.kind)) loop.uniform(step.next_draw, start, n, next_u);
    const AdamBlock<T> block = {buffers.scores.update(start, n, m),
                                buffers.exp_avg.update(start, n, avg),
                                buffers.exp_avg_sq.update(start, n, avg_sq),
                                buffers.weight.read(start, n, w),
                                buffers.grad.read(start, n, g),
                                u,
                                inverse};
    T* gated = buffers.gated.target(start, v);
    loop.adam_step[kind](block, adam, n);
    buffers.scores.write(start, n, block.scores);
    buffers.scores.update(start, n, block.scores);  // the gate is that of the scores as they are kept
    if (step.measure) {
      movements[start / block_size] =
          loop.gate_weight_and_movement[kind](block.weight, block.scores, next_u, next_inverse, gated, n);
    } else {
      loop.gate_weight[kind](block.weight, block.scores, next_u, next_inverse, gated, n);
    }
    buffers.gated.write(start, n, gated);
    buffers.exp_avg.write(start, n, block.exp_avg);
    buffers.exp_avg_sq.write(start, n, block.exp_avg_sq);
  });
  double total = 0;
  for (const double movement : movements) total += movement;
  return total;
}

void gated_adam_step_(Tensor gated, Tensor scores, Tensor exp_avg, Tensor exp_avg_sq, Tensor movement, Tensor weight,
                      Tensor grad, Tensor temperature, Tensor next_temperature, Tensor step, Tensor lr, Tensor draw,
                      Tensor next_draw, double beta1, double beta2, double eps, double weight_decay, int64_t kind,
                      bool measure) {
  check_on_cpu({&gated, &scores, &exp_avg, &exp_avg_sq, &movement, &weight, &grad, &temperature, &next_temperature,
                &step, &lr, &draw, &next_draw});
  check_adam(gated, scores, exp_avg, exp_avg_sq, movement, weight, grad);
  const Step settings = {checked_kind(kind),          checked_temperature(temperature),
                         checked_temperature(next_temperature), checked_draw(draw),
                         checked_draw(next_draw),     measure};
  const double count = checked_scalar("step", step), rate = checked_scalar("lr", lr);

  InPlace new_gated(gated), new_scores(scores), new_exp_avg(exp_avg), new_exp_avg_sq(exp_avg_sq);
  const Tensor dense_weight = made_contiguous(weight), dense_grad = made_contiguous(grad);
  const Buffers buffers = {Array(new_gated.dense()),      Array(new_scores.dense()), Array(new_exp_avg.dense()),
                           Array(new_exp_avg_sq.dense()), Array(dense_weight),       Array(dense_grad)};
  const double moved =
      scores.scalar_type() == ScalarType::Double
          ? adam_dense(buffers, weight.numel(), settings,
                       adam_of_step<double>(count, rate, beta1, beta2, eps, weight_decay))
          : adam_dense(buffers, weight.numel(), settings,
                       adam_of_step<float>(count, rate, beta1, beta2, eps, weight_decay));
  for (InPlace* changed : {&new_gated, &new_scores, &new_exp_avg, &new_exp_avg_sq}) changed->save();
  if (measure) *static_cast<double*>(movement.data_ptr()) += moved;
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) {
  m.impl("gated_adam_step_", TORCH_BOX(&ffw::cpu::gated_adam_step_));
}

// gate_weight and gate_weight_backward, the kernels: the gate evaluated or sampled and multiplied, and its
// straight-through gradient, each one pass over dense memory. Bound by memory: 16-byte loads and stores.
#pragma once

#include "device.cuh"

namespace ffw::cuda {

template <typename Weight, typename Score>
struct GateWeightArguments {
  Weight* gated;             // [count] out
  const Weight* weight;      // [count]
  const Score* scores;       // [count]
  const float* temperature;  // [1]
  const int64_t* draw;       // [3]
  int64_t count;
  bool aligned;  // all arrays begin at a multiple of 16 bytes
};

template <Kind kind, typename Weight, typename Score>
__global__ void __launch_bounds__(elementwise_threads) gate_weight_kernel(GateWeightArguments<Weight, Score> a) {
  using T = Working<Score>;
  constexpr int n = group_of<Weight>;
  const T inverse = inverse_temperature<T>(*a.temperature);
  const Draw draw = load_draw(a.draw);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * n;
  for (int64_t start = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * n; start < a.count;
       start += stride) {
    const bool whole = a.aligned && start + n <= a.count;
    T w[n], m[n], u[n];
    load(a.weight, start, a.count, whole, w);
    load(a.scores, start, a.count, whole, m);
    uniforms<kind>(draw, start, u);
#pragma unroll
    for (int i = 0; i < n; ++i) w[i] *= gate_value<kind>(m[i], inverse, u[i]);
    store(a.gated, start, a.count, whole, w);
  }
}

template <typename Weight, typename Score>
struct GateWeightBackwardArguments {
  Score* scores_grad;        // [count] out
  const Weight* grad;        // [count] of the gated weight
  const Weight* weight;      // [count]
  const Score* scores;       // [count]
  const float* temperature;  // [1]
  const int64_t* draw;       // [3]
  int64_t count;
  bool aligned;
};

template <Kind kind, typename Weight, typename Score>
__global__ void __launch_bounds__(elementwise_threads)
    gate_weight_backward_kernel(GateWeightBackwardArguments<Weight, Score> a) {
  using T = Working<Score>;
  constexpr int n = group_of<Weight>;
  const T inverse = inverse_temperature<T>(*a.temperature);
  const Draw draw = load_draw(a.draw);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * n;
  for (int64_t start = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * n; start < a.count;
       start += stride) {
    const bool whole = a.aligned && start + n <= a.count;
    T g[n], w[n], m[n], u[n];
    load(a.grad, start, a.count, whole, g);
    load(a.weight, start, a.count, whole, w);
    load(a.scores, start, a.count, whole, m);
    uniforms<kind>(draw, start, u);
#pragma unroll
    for (int i = 0; i < n; ++i) g[i] = g[i] * w[i] * gate_slope<kind>(m[i], inverse, u[i]);
    store(a.scores_grad, start, a.count, whole, g);
  }
}

template <typename Weight, typename Score>
void launch_gate_weight(GateWeightArguments<Weight, Score> a, Kind kind, cudaStream_t stream) {
  if (a.count == 0) return;
  a.aligned = on_16_bytes(a.gated) && on_16_bytes(a.weight) && on_16_bytes(a.scores);
  for_kind(kind, [&](auto k) {
    const auto kernel = gate_weight_kernel<k(), Weight, Score>;
    FFW_LAUNCH(kernel, elementwise_blocks(a.count, group_of<Weight>), elementwise_threads, 0, stream, a);
  });
}

template <typename Weight, typename Score>
void launch_gate_weight_backward(GateWeightBackwardArguments<Weight, Score> a, Kind kind, cudaStream_t stream) {
  if (a.count == 0) return;
  a.aligned = on_16_bytes(a.scores_grad) && on_16_bytes(a.grad) && on_16_bytes(a.weight) && on_16_bytes(a.scores);
  for_kind(kind, [&](auto k) {
    const auto kernel = gate_weight_backward_kernel<k(), Weight, Score>;
    FFW_LAUNCH(kernel, elementwise_blocks(a.count, group_of<Weight>), elementwise_threads, 0, stream, a);
  });
}

// Compiled in double.cu.
extern template void launch_gate_weight(GateWeightArguments<double, double>, Kind, cudaStream_t);
extern template void launch_gate_weight_backward(GateWeightBackwardArguments<double, double>, Kind, cudaStream_t);

}  // namespace ffw::cuda

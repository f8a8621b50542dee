// gated_adam_step_, the kernels: straight-through gradient, Adam, and the gated weight of the new scores, one pass over
// the flat buffers of all layers. Five arrays are read and four written, 36 bytes a weight in float32.
//
// The sum of the new gates' movement is deterministic: every block writes the sum of its own elements, and a second
// kernel of one block adds these up in order.
#pragma once

#include "device.cuh"

namespace ffw::cuda {

// The settings that Python gives as numbers; the step and the learning rate are read on the device.
template <typename T>
struct AdamRates {
  T one_minus_beta1, beta2, one_minus_beta2, log_beta1, log_beta2, eps, weight_decay;
};

template <typename Weight, typename Score>
struct GatedAdamArguments {
  Weight* gated;          // [count] out
  Score* scores;          // [count] in and out, as are the moments
  Score* exp_avg;         // [count]
  Score* exp_avg_sq;      // [count]
  const Weight* weight;   // [count]
  const Weight* grad;     // [count] of the gated weight
  const float* temperature;
  const float* next_temperature;
  const Score* step;
  const Score* lr;
  const int64_t* draw;
  const int64_t* next_draw;
  Score* movements;  // [blocks] out, or null where the movement is not asked for
  AdamRates<Score> rates;
  int64_t count;
  bool aligned;
};

__device__ __forceinline__ float exp_minus_one(float x) { return expm1f(x); }
__device__ __forceinline__ double exp_minus_one(double x) { return expm1(x); }

// adam_of_step of gate.h without FP64: 1 - beta^step is -expm1(step log(beta)), accurate to the last places of T.
template <typename T>
__device__ Adam<T> adam_of_device_step(T step, T lr, const AdamRates<T>& rates) {
  const T correction1 = -exp_minus_one(step * rates.log_beta1);
  const T correction2 = -exp_minus_one(step * rates.log_beta2);
  return {rates.one_minus_beta1,       rates.beta2, rates.one_minus_beta2,
          quotient(lr, correction1),   quotient(T(1), square_root(correction2)),
          rates.eps,                   rates.weight_decay};
}

// What all elements of a step share: worked out by one thread of each block, in shared memory.
template <typename T>
struct GatedAdamShared {
  Adam<T> adam;
  T inverse, next_inverse;
  Draw draw, next_draw;
  T a_warp[elementwise_threads / warp_size];
};

template <Kind kind, typename Weight, typename Score>
__global__ void __launch_bounds__(elementwise_threads) gated_adam_kernel(GatedAdamArguments<Weight, Score> a) {
  using T = Score;
  constexpr int n = group_of<Weight>;
  FFW_SHARED(GatedAdamShared<T>, shared);
  if (threadIdx.x == 0) {
    shared->adam = adam_of_device_step(*a.step, *a.lr, a.rates);
    shared->inverse = inverse_temperature<T>(*a.temperature);
    shared->next_inverse = inverse_temperature<T>(*a.next_temperature);
    shared->draw = load_draw(a.draw);
    shared->next_draw = load_draw(a.next_draw);
  }
  __syncthreads();
  const Adam<T> adam = shared->adam;
  const T inverse = shared->inverse, next_inverse = shared->next_inverse;
  const Draw draw = shared->draw, next_draw = shared->next_draw;

  T moved = 0;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * blockDim.x * n;
  for (int64_t start = (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) * n; start < a.count;
       start += stride) {
    const bool whole = a.aligned && start + n <= a.count;
    T g[n], w[n], m[n], avg[n], avg_sq[n], u[n];
    load(a.grad, start, a.count, whole, g);
    load(a.weight, start, a.count, whole, w);
    load(a.scores, start, a.count, whole, m);
    load(a.exp_avg, start, a.count, whole, avg);
    load(a.exp_avg_sq, start, a.count, whole, avg_sq);
    uniforms<kind>(draw, start, u);
#pragma unroll
    for (int i = 0; i < n; ++i) {
      const T gradient = g[i] * w[i] * gate_slope<kind>(m[i], inverse, u[i]);
      m[i] = adam_update(m[i], gradient, avg[i], avg_sq[i], adam);
    }
    store(a.scores, start, a.count, whole, m);
    store(a.exp_avg, start, a.count, whole, avg);
    store(a.exp_avg_sq, start, a.count, whole, avg_sq);

    uniforms<kind>(next_draw, start, u);
    if (a.movements != nullptr) {
#pragma unroll
      for (int i = 0; i < n; ++i) {
        if (start + i < a.count) moved += gate_movement<kind>(m[i], next_inverse, u[i]);
      }
    }
#pragma unroll
    for (int i = 0; i < n; ++i) w[i] *= gate_value<kind>(m[i], next_inverse, u[i]);
    store(a.gated, start, a.count, whole, w);
  }
  if (a.movements != nullptr) {  // the same for all threads of the grid
    moved = block_sum(moved, shared->a_warp);
    if (threadIdx.x == 0) a.movements[blockIdx.x] = moved;
  }
}

// movement += the sum of the blocks' movements. The only arithmetic in double precision, on one number a block.
template <typename T>
__global__ void __launch_bounds__(elementwise_threads)
    add_movement_kernel(double* movement, const T* movements, int64_t blocks) {
  FFW_SHARED(double, a_warp);
  double sum = 0;
  for (int64_t block = threadIdx.x; block < blocks; block += blockDim.x) sum += movements[block];
  sum = block_sum(sum, a_warp);
  if (threadIdx.x == 0) *movement += sum;
}

// Number of entries that `movements` must have.
template <typename Weight>
int64_t movement_blocks(int64_t count) {
  return elementwise_blocks(count, group_of<Weight>);
}

template <typename Weight, typename Score>
void launch_gated_adam(GatedAdamArguments<Weight, Score> a, Kind kind, cudaStream_t stream) {
  if (a.count == 0) return;
  a.aligned = on_16_bytes(a.gated) && on_16_bytes(a.scores) && on_16_bytes(a.exp_avg) && on_16_bytes(a.exp_avg_sq) &&
              on_16_bytes(a.weight) && on_16_bytes(a.grad);
  for_kind(kind, [&](auto k) {
    const auto kernel = gated_adam_kernel<k(), Weight, Score>;
    FFW_LAUNCH(kernel, movement_blocks<Weight>(a.count), elementwise_threads, sizeof(GatedAdamShared<Score>), stream,
               a);
  });
}

template <typename T>
void launch_add_movement(double* movement, const T* movements, int64_t blocks, cudaStream_t stream) {
  const auto kernel = add_movement_kernel<T>;
  const size_t shared = elementwise_threads / warp_size * sizeof(double);
  FFW_LAUNCH(kernel, 1, elementwise_threads, shared, stream, movement, movements, blocks);
}

// Compiled in double.cu.
extern template void launch_gated_adam(GatedAdamArguments<double, double>, Kind, cudaStream_t);
extern template void launch_add_movement(double*, const float*, int64_t, cudaStream_t);
extern template void launch_add_movement(double*, const double*, int64_t, cudaStream_t);

}  // namespace ffw::cuda

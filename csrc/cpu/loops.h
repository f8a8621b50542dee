// The inner loops of the CPU operators, compiled once for each instruction set; the best one that the machine has is
// chosen when the first operator runs. A wheel built anywhere is therefore fast here and correct everywhere.
//
// Loops work on blocks of contiguous float or double; who calls them deals with 16-bit types, strides and threads.
#pragma once

#include <cstdint>

#include "../gate.h"

namespace ffw::cpu {

constexpr int64_t block_size = 1024;  // elements a call of the gate loops; a few such blocks fit the first-level cache

// One block of gated_adam_step_: pointers to the same elements of all buffers.
template <typename T>
struct AdamBlock {
  T* scores;
  T* exp_avg;
  T* exp_avg_sq;
  const T* weight;
  const T* grad;
  const T* uniform;  // of the gates that grad was taken with; unread where the kind is not random
  T inverse;         // 1 / T of those gates
};

// One minibatch of one head of fit_linear_head_. Feature rows are gathered into x, and parameters stand in rows of
// `stride` elements, a multiple of the vector length; what lies beyond `width` is zero and stays so.
template <typename T>
struct HeadBatch {
  int64_t count, width, classes;  // samples of the batch, features, classes
  int64_t stride, x_stride;
  const T* features;  // [all samples, width]
  const int64_t* rows;
  const int64_t* labels;  // label of sample i at labels[i * label_stride]
  int64_t label_stride;
  T* weight;  // [classes, stride]
  T* weight_momentum;
  T* bias;
  T* bias_momentum;
  T* x;            // scratch [count, x_stride]
  T* error;        // scratch [classes, count_stride]: logits, then the loss's derivative by them
  T* row_scratch;  // scratch [2, count_stride]
  int64_t count_stride;
  double* losses;  // out [count]: cross-entropy of each sample
};

template <typename T>
struct Sgd {
  T lr, momentum, weight_decay;
};

// The loops of one instruction set and precision.
template <typename T>
struct Loops {
  // Uniform numbers of the elements first .. first + n, first a multiple of 4.
  void (*uniform)(const Draw& draw, int64_t first, int64_t n, T* out);
  // By kind. out = w * g(m)
  void (*gate_weight[kind_count])(const T* w, const T* m, const T* u, T inverse, T* out, int64_t n);
  // out = grad * w * dg/dm
  void (*gate_weight_backward[kind_count])(const T* grad, const T* w, const T* m, const T* u, T inverse, T* out,
                                           int64_t n);
  // The new scores and moments.
  void (*adam_step[kind_count])(const AdamBlock<T>& block, const Adam<T>& adam, int64_t n);
  // out = w * g(m), and the sum of |dg / d ln T|
  double (*gate_weight_and_movement[kind_count])(const T* w, const T* m, const T* u, T inverse, T* out, int64_t n);

  // Softmax of each of n rows of k numbers.
  void (*softmax)(const T* logits, int64_t n, int64_t k, T* out);

  int64_t lanes;  // elements of a vector
  // Gather, logits, losses and errors of the rows begin .. end of the batch.
  void (*head_errors)(const HeadBatch<T>& batch, int64_t begin, int64_t end);
  // Gradient, momentum and update of the columns begin .. end (multiples of the vector length) of the weight.
  void (*head_update)(const HeadBatch<T>& batch, const Sgd<T>& sgd, int64_t begin, int64_t end);
  void (*head_update_bias)(const HeadBatch<T>& batch, const Sgd<T>& sgd);
};

// Conversions between 16-bit storage and the float that is computed with.
struct Conversions {
  void (*widen_bfloat16)(const uint16_t* in, float* out, int64_t n);
  void (*narrow_bfloat16)(const float* in, uint16_t* out, int64_t n);
  void (*widen_half)(const uint16_t* in, float* out, int64_t n);
  void (*narrow_half)(const float* in, uint16_t* out, int64_t n);
};

struct InstructionSet {
  const char* name;
  Loops<float> single_precision;
  Loops<double> double_precision;
  Conversions conversions;
  void (*tanh)(float* values, int64_t n);  // in place
};

extern const InstructionSet baseline;  // what the compiler may assume anyway: SSE2 on x86-64, NEON on aarch64
#if defined(__x86_64__) && defined(__GNUC__)
#define FFW_HAS_X86_LOOPS 1
extern const InstructionSet avx2;
extern const InstructionSet avx512;
#endif

// The one in use: the best of this machine, or a lesser one named by the environment's FFW_FAST_CPU_CAPABILITY.
const InstructionSet& instruction_set();

template <typename T>
const Loops<T>& loops();

}  // namespace ffw::cpu

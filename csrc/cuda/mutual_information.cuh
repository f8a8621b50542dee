// mutual_information of bias labels and the private heads' predictions over one batch, and its gradient by the logits:
// the kernels. Batches are small, so these are bound by latency: one launch each, no scratch memory, no atomics.
#pragma once

#include "device.cuh"

namespace ffw::cuda {

constexpr unsigned information_threads = 256;
constexpr int64_t largest_information_chunk = 256;     // samples whose predictions are kept at a time
constexpr size_t information_chunk_bytes = 32 * 1024;  // and their memory at most

template <typename T>
constexpr T joint_floor = static_cast<T>(1e-15);  // ops.JOINT_FLOOR

template <typename Logit>
struct InformationArguments {
  Working<Logit>* information;  // [heads] out
  Working<Logit>* joint;        // [heads, classes, classes] out
  const Logit* logits;          // [n, heads, classes]
  const int64_t* labels;        // [n, heads]
  int64_t n;
  int heads, classes, chunk;
  Working<Logit> inverse_log_classes;
};

template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

// The largest of one sample's logits, and one over the sum of their exponentials relative to it.
template <typename Logit, typename T>
__device__ __forceinline__ void softmax_scale(const Logit* logits, int classes, T& largest, T& inverse_sum) {
  largest = widen(logits[0]);
  for (int c = 1; c < classes; ++c) largest = larger(largest, static_cast<T>(widen(logits[c])));
  T sum = 0;
  for (int c = 0; c < classes; ++c) sum += decay(widen(logits[c]) - largest);
  inverse_sum = quotient(T(1), sum);
}

// sums[i]: of row i of a joint [classes, classes], sums[classes + i]: of column i.
template <typename T>
__device__ __forceinline__ void marginals(const T* joint, int classes, T* sums) {
  for (int i = threadIdx.x; i < 2 * classes; i += blockDim.x) {
    const bool column = i >= classes;
    const T* entry = column ? joint + (i - classes) : joint + static_cast<int64_t>(i) * classes;
    T sum = 0;
    for (int k = 0; k < classes; ++k) sum += entry[static_cast<int64_t>(k) * (column ? classes : 1)];
    sums[i] = sum;
  }
}

// One block a head. A thread owns entries of the joint and walks through the samples in order, chunk by chunk. A label
// out of range makes the joint and the information NaN: a kernel cannot raise.
template <typename Logit>
__global__ void __launch_bounds__(information_threads) mutual_information_kernel(InformationArguments<Logit> a) {
  using T = Working<Logit>;
  FFW_SHARED(T, shared);
  T* const probabilities = shared;                            // [chunk, classes]
  T* const sums = probabilities + a.chunk * a.classes;        // [2, classes]
  T* const a_warp = sums + 2 * a.classes;                     // [warps]
  int* const chunk_labels = reinterpret_cast<int*>(a_warp + information_threads / warp_size);  // [chunk]
  const int head = blockIdx.x, entries = a.classes * a.classes;
  T* const joint = a.joint + static_cast<int64_t>(head) * entries;

  for (int64_t begin = 0; begin < a.n; begin += a.chunk) {
    const int rows = static_cast<int>(a.n - begin < a.chunk ? a.n - begin : a.chunk);
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      const int64_t at = (begin + row) * a.heads + head;
      const int64_t label = a.labels[at];
      const bool valid = label >= 0 && label < a.classes;
      chunk_labels[row] = valid ? static_cast<int>(label) : 0;
      T largest, inverse_sum;
      softmax_scale(a.logits + at * a.classes, a.classes, largest, inverse_sum);
      if (!valid) inverse_sum = static_cast<T>(NAN);
      for (int c = 0; c < a.classes; ++c) {
        probabilities[row * a.classes + c] = decay(widen(a.logits[at * a.classes + c]) - largest) * inverse_sum;
      }
    }
    __syncthreads();
    const bool last = begin + rows == a.n;
    for (int entry = threadIdx.x; entry < entries; entry += blockDim.x) {
      const int label = entry / a.classes, prediction = entry % a.classes;
      T sum = 0;
      for (int row = 0; row < rows; ++row) {
        if (chunk_labels[row] == label) sum += probabilities[row * a.classes + prediction];
      }
      if (begin > 0) sum += joint[entry];
      // A comparison that keeps NaN.
      joint[entry] = last ? quotient(sum < joint_floor<T> ? joint_floor<T> : sum, static_cast<T>(a.n)) : sum;
    }
    __syncthreads();
  }

  marginals(joint, a.classes, sums);
  __syncthreads();
  T information = 0;
  for (int entry = threadIdx.x; entry < entries; entry += blockDim.x) {
    const T independent = sums[entry / a.classes] * sums[a.classes + entry % a.classes];
    information += joint[entry] * logarithm(quotient(joint[entry], larger(independent, joint_floor<T>)));
  }
  information = block_sum(information, a_warp);
  if (threadIdx.x == 0) a.information[head] = information * a.inverse_log_classes;
}

template <typename Logit>
struct InformationBackwardArguments {
  Logit* logits_grad;           // [n, heads, classes] out
  const Working<Logit>* grad;   // [heads]
  const Logit* logits;          // [n, heads, classes]
  const int64_t* labels;        // [n, heads]
  const Working<Logit>* joint;  // [heads, classes, classes]
  int64_t n;
  int heads, classes;
  Working<Logit> inverse_log_classes;
};

// terms[i], of row i: the sum over its columns of joint / row sum, terms[classes + i] likewise of column i.
template <typename T>
__device__ __forceinline__ void clamp_terms(const T* joint, int classes, const T* sums, T* terms) {
  for (int i = threadIdx.x; i < 2 * classes; i += blockDim.x) {
    const bool column = i >= classes;
    const int own = column ? i - classes : i;
    T sum = 0;
    for (int k = 0; k < classes; ++k) {
      const int b = column ? k : own, p = column ? own : k;
      const bool free = !(sums[b] * sums[classes + p] < joint_floor<T>);
      if (free) sum += quotient(joint[static_cast<int64_t>(b) * classes + p], sums[i]);
    }
    terms[i] = sum;
  }
}

// A block takes one head and 256 samples, a thread each. The derivative of the MI by the joint's entry (b, p) is
// (log(q / (row column)) + 1 - row term - column term) / log K, zero where the entry's own clamp holds.
template <typename Logit>
__global__ void __launch_bounds__(information_threads)
    mutual_information_backward_kernel(InformationBackwardArguments<Logit> a) {
  using T = Working<Logit>;
  FFW_SHARED(T, sums);                   // [2, classes]
  T* const terms = sums + 2 * a.classes;  // [2, classes]
  const int head = static_cast<int>(blockIdx.x % a.heads);
  const T* const joint = a.joint + static_cast<int64_t>(head) * a.classes * a.classes;
  marginals(joint, a.classes, sums);
  __syncthreads();
  clamp_terms(joint, a.classes, sums, terms);
  __syncthreads();

  const int64_t sample = static_cast<int64_t>(blockIdx.x / a.heads) * blockDim.x + threadIdx.x;
  if (sample >= a.n) return;
  const int64_t at = sample * a.heads + head;
  const int64_t label = a.labels[at];
  const bool valid = label >= 0 && label < a.classes;
  const T* const row = joint + (valid ? label : 0) * a.classes;
  const T row_sum = sums[valid ? label : 0], row_term = terms[valid ? label : 0];
  const Logit* const logits = a.logits + at * a.classes;
  const T count = static_cast<T>(a.n);
  const T scale = valid ? quotient(a.grad[head], count) * a.inverse_log_classes : static_cast<T>(NAN);
  const auto slope = [&](int p) {
    const T independent = larger(row_sum * sums[a.classes + p], joint_floor<T>);
    const T full = (logarithm(quotient(row[p], independent)) + 1 - row_term - terms[a.classes + p]) * scale;
    const bool clamped = row[p] * count < joint_floor<T> * T(1.0001);  // up to the rounding of / n and * n
    return clamped && valid ? T(0) : full;
  };
  T largest, inverse_sum;
  softmax_scale(logits, a.classes, largest, inverse_sum);
  T inner = 0;
  for (int p = 0; p < a.classes; ++p) inner += decay(widen(logits[p]) - largest) * inverse_sum * slope(p);
  for (int p = 0; p < a.classes; ++p) {
    const T probability = decay(widen(logits[p]) - largest) * inverse_sum;
    narrow(probability * (slope(p) - inner), a.logits_grad[at * a.classes + p]);
  }
}

// Bytes of shared memory; `chunk` is as large as there is memory for.
template <typename T>
size_t information_bytes(int classes, int chunk) {
  return sizeof(T) * (static_cast<size_t>(chunk) * classes + 2 * classes + information_threads / warp_size) +
         sizeof(int) * chunk;
}

template <typename Logit>
void launch_mutual_information(InformationArguments<Logit> a, cudaStream_t stream) {
  using T = Working<Logit>;
  const int64_t fitting = information_chunk_bytes / (sizeof(T) * a.classes);
  a.chunk = static_cast<int>(a.n < largest_information_chunk ? a.n : largest_information_chunk);
  if (a.chunk > fitting) a.chunk = fitting > 1 ? static_cast<int>(fitting) : 1;
  const auto kernel = mutual_information_kernel<Logit>;
  const size_t bytes = information_bytes<T>(a.classes, a.chunk);
  allow_shared_memory(kernel, bytes);
  FFW_LAUNCH(kernel, a.heads, information_threads, bytes, stream, a);
}

template <typename Logit>
void launch_mutual_information_backward(const InformationBackwardArguments<Logit>& a, cudaStream_t stream) {
  const auto kernel = mutual_information_backward_kernel<Logit>;
  const size_t bytes = 4 * sizeof(Working<Logit>) * a.classes;
  const int64_t blocks = (a.n + information_threads - 1) / information_threads * a.heads;
  allow_shared_memory(kernel, bytes);
  FFW_LAUNCH(kernel, blocks, information_threads, bytes, stream, a);
}

// Compiled in double.cu.
extern template void launch_mutual_information(InformationArguments<double>, cudaStream_t);
extern template void launch_mutual_information_backward(const InformationBackwardArguments<double>&, cudaStream_t);

}  // namespace ffw::cuda

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

// The largest of one sample's logits, and one over the sum of their exponentials relative to it.
template <typename Logit, typename T>
__device__ __forceinline__ void softmax_scale(const Logit* logits, int classes, T& largest, T& inverse_sum) {
  largest = largest_of(logits, classes);
  T sum = 0;
  for (int c = 0; c < classes; ++c) sum += decay(widen(logits[c]) - largest);
  inverse_sum = quotient(T(1), sum);
}

// The joints of some heads, each [classes, stride].
template <typename Entry>
struct Joints {
  Entry* entries;
  int heads, classes, stride;
  __device__ __forceinline__ Entry* row(int head, int64_t label) const {
    return entries + (static_cast<int64_t>(head) * classes + label) * stride;
  }
};

// Samples of one head that lie in shared memory.
template <typename T>
struct HeadSamples {
  const int* labels;
  const T* probabilities;
  int rows, label_step, step;  // the last two: from sample to sample
};

// Adds samples to a row of a joint, those of its label, by one warp: they are found by vote, and its lanes take the
// predictions. The samples come in order, so the sum is always the same. At the end `count`, of all samples, makes a
// distribution of it; before it is 0.
template <typename T>
__device__ __forceinline__ void add_to_row(T* row, int classes, int label, const HeadSamples<T>& samples, bool first,
                                           T count) {
  const int lane = threadIdx.x % warp_size;
  for (int begin = 0; begin < classes; begin += warp_size) {  // as often for all lanes, who vote
    const int prediction = begin + lane;
    const bool inside = prediction < classes;
    T sum = 0;
    for (int start = 0; start < samples.rows; start += warp_size) {
      const int own = start + lane;
      const bool mine = own < samples.rows && samples.labels[own * samples.label_step] == label;
      for (unsigned rest = __ballot_sync(all_lanes, mine); rest != 0; rest &= rest - 1) {
        const int sample = start + __ffs(rest) - 1;
        if (inside) sum += samples.probabilities[sample * samples.step + prediction];
      }
    }
    if (inside && !first) sum += row[prediction];
    // A comparison that keeps NaN.
    if (count > 0) sum = quotient(sum < joint_floor<T> ? joint_floor<T> : sum, count);
    if (inside) row[prediction] = sum;
  }
}

// sums [heads, 2, classes]: of each joint's rows, and of its columns.
template <typename Entry, typename T>
__device__ __forceinline__ void marginals(const Joints<Entry>& joints, T* sums) {
  const int classes = joints.classes;
  for (int i = threadIdx.x; i < joints.heads * 2 * classes; i += blockDim.x) {
    const int head = i / (2 * classes), own = i % (2 * classes);
    const bool column = own >= classes;
    const Entry* const entry = column ? joints.row(head, 0) + (own - classes) : joints.row(head, own);
    T sum = 0;
#pragma unroll 4
    for (int k = 0; k < classes; ++k) sum += entry[static_cast<int64_t>(k) * (column ? joints.stride : 1)];
    sums[i] = sum;
  }
}

// terms [heads, 2, classes], of each row: the sum over its columns of joint / row sum, without clamped entries; of each
// column likewise.
template <typename Entry, typename T>
__device__ __forceinline__ void clamp_terms(const Joints<Entry>& joints, const T* sums, T* terms) {
  const int classes = joints.classes;
  for (int i = threadIdx.x; i < joints.heads * 2 * classes; i += blockDim.x) {
    const int head = i / (2 * classes), own = i % (2 * classes);
    const bool column = own >= classes;
    const Entry* const entry = column ? joints.row(head, 0) + (own - classes) : joints.row(head, own);
    const T* const others = sums + head * 2 * classes + (column ? 0 : classes);
    const T own_sum = sums[i];
    T sum = 0;
#pragma unroll 4
    for (int k = 0; k < classes; ++k) {
      const bool free = !(own_sum * others[k] < joint_floor<T>);
      if (free) sum += entry[static_cast<int64_t>(k) * (column ? joints.stride : 1)];
    }
    terms[i] = quotient(sum, own_sum);
  }
}

template <typename T>
__device__ __forceinline__ T log_ratio(T entry, T row_sum, T column_sum) {
  return logarithm(quotient(entry, larger(row_sum * column_sum, joint_floor<T>)));
}

// Derivative of the MI by an entry of a joint of `count` samples, times `scale`; zero where the entry's own clamp holds.
template <typename T>
__device__ __forceinline__ T entry_slope(T entry, T ratio, T row_term, T column_term, T count, T scale) {
  const bool clamped = entry * count < joint_floor<T> * T(1.0001);  // up to the rounding of / n and * n
  return clamped ? T(0) : (ratio + 1 - row_term - column_term) * scale;
}

// From the slopes by a sample's probabilities to those by its logits; all three take and give class by class.
template <typename T, typename Probability, typename Slope, typename Save>
__device__ __forceinline__ void softmax_gradient(int classes, const Probability& probability, const Slope& slope,
                                                 const Save& save) {
  const T inner = sum_in_parts<T>(classes, [&](int c) { return probability(c) * slope(c); });
  for (int c = 0; c < classes; ++c) save(c, probability(c) * (slope(c) - inner));
}

// One block a head, which walks through the samples chunk by chunk; a warp owns rows of the joint. A label out of range
// makes the joint and the information NaN: a kernel cannot raise.
template <typename Logit>
__global__ void __launch_bounds__(information_threads) mutual_information_kernel(InformationArguments<Logit> a) {
  using T = Working<Logit>;
  FFW_SHARED(T, shared);
  T* const probabilities = shared;                            // [chunk, classes]
  T* const sums = probabilities + a.chunk * a.classes;        // [2, classes]
  T* const a_warp = sums + 2 * a.classes;                     // [warps]
  int* const chunk_labels = reinterpret_cast<int*>(a_warp + information_threads / warp_size);  // [chunk]
  const int head = blockIdx.x, entries = a.classes * a.classes;
  const Joints<T> joints = {a.joint + static_cast<int64_t>(head) * entries, 1, a.classes, a.classes};

  for (int64_t begin = 0; begin < a.n; begin += a.chunk) {
    const int rows = static_cast<int>(a.n - begin < a.chunk ? a.n - begin : a.chunk);
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      const int64_t at = (begin + row) * a.heads + head;
      const int64_t label = a.labels[at];
      const bool valid = label >= 0 && label < a.classes;
      chunk_labels[row] = valid ? static_cast<int>(label) : 0;
      softmax_row(a.logits + at * a.classes, a.classes, label, T(1), T(0), probabilities + row * a.classes);
    }
    __syncthreads();
    const T count = begin + rows == a.n ? static_cast<T>(a.n) : T(0);
    const int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
    for (int label = warp; label < a.classes; label += warps) {
      add_to_row(joints.row(0, label), a.classes, label, {chunk_labels, probabilities, rows, 1, a.classes}, begin == 0,
                 count);
    }
    __syncthreads();
  }

  marginals(joints, sums);
  __syncthreads();
  T information = 0;
  for (int entry = threadIdx.x; entry < entries; entry += blockDim.x) {
    const T q = joints.entries[entry];
    information += q * log_ratio(q, sums[entry / a.classes], sums[a.classes + entry % a.classes]);
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

// A block takes one head and 256 samples, a thread each. The derivative of the MI by the joint's entry (b, p) is
// (log(q / (row column)) + 1 - row term - column term) / log K, zero where the entry's own clamp holds.
template <typename Logit>
__global__ void __launch_bounds__(information_threads)
    mutual_information_backward_kernel(InformationBackwardArguments<Logit> a) {
  using T = Working<Logit>;
  FFW_SHARED(T, sums);                   // [2, classes]
  T* const terms = sums + 2 * a.classes;  // [2, classes]
  const int head = static_cast<int>(blockIdx.x % a.heads);
  const int64_t entries = static_cast<int64_t>(a.classes) * a.classes;
  const Joints<const T> joints = {a.joint + head * entries, 1, a.classes, a.classes};
  marginals(joints, sums);
  __syncthreads();
  clamp_terms(joints, sums, terms);
  __syncthreads();

  const int64_t sample = static_cast<int64_t>(blockIdx.x / a.heads) * blockDim.x + threadIdx.x;
  if (sample >= a.n) return;
  const int64_t at = sample * a.heads + head;
  const int64_t label = a.labels[at];
  const bool valid = label >= 0 && label < a.classes;
  const T* const row = joints.row(0, valid ? label : 0);
  const T row_sum = sums[valid ? label : 0], row_term = terms[valid ? label : 0];
  const Logit* const logits = a.logits + at * a.classes;
  const T count = static_cast<T>(a.n), scale = quotient(a.grad[head], count) * a.inverse_log_classes;
  const auto slope = [&](int p) {
    const T ratio = log_ratio(row[p], row_sum, sums[a.classes + p]);
    return valid ? entry_slope(row[p], ratio, row_term, terms[a.classes + p], count, scale) : static_cast<T>(NAN);
  };
  T largest, inverse_sum;
  softmax_scale(logits, a.classes, largest, inverse_sum);
  const auto probability = [&](int p) { return decay(widen(logits[p]) - largest) * inverse_sum; };
  softmax_gradient<T>(a.classes, probability, slope,
                      [&](int p, T gradient) { narrow(gradient, a.logits_grad[at * a.classes + p]); });
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

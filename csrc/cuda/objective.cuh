// objective, the kernel: cross-entropy, mutual information, and the gradient of their weighted sum, of one minibatch.
// Minibatches are small, so it is bound by latency: one launch of one block, whose phases have a barrier after each:
//
//   stage          logits come to shared memory, all loads of a thread under way at once
//   rows           a thread takes a row of logits: probabilities of a head, or errors of the task
//   joints         a warp takes a row of a head's joint distribution
//   sums, terms    a thread takes a row or a column of a joint
//   slopes         a thread takes entries of the joints, which become the slopes of the information
//   gradients      a thread takes a head's row of probabilities, which becomes the gradient by its logits
//
// A minibatch that does not fit into shared memory comes in chunks: the first three phases for each, and the gradients
// on a second way through them, from the last one, which is still there, to the first. Joints that do not fit are kept
// in global memory. Nothing depends on the order in which warps run.
#pragma once

#include <algorithm>
#include <stdexcept>
#include <string>

#include "mutual_information.cuh"

namespace ffw::cuda {

template <typename T>
constexpr unsigned largest_objective_threads = sizeof(T) == 4 ? 1024 : 512;

constexpr int64_t largest_objective_chunk = 512;  // samples
constexpr int64_t joint_chunk = 32;               // samples that there must be room for beside joints in shared memory
constexpr int staged_at_a_time = 3;               // loads of one thread

template <typename Logit>
struct ObjectiveArguments {
  using T = Working<Logit>;
  T* losses;                   // [3] out
  Logit* by_logits;            // [n, targets] out
  Logit* by_head_logits;       // [n, heads, classes] out
  const Logit* logits;         // [n, targets]
  const int64_t* labels;       // [n]
  const Logit* head_logits;    // [n, heads, classes]
  const int64_t* bias_labels;  // [n, heads]
  const T* importance;         // [heads, targets, classes], or null: 1
  const int64_t* aligned;      // [targets], or null: every sample counts
  T* joints;                   // scratch of joint_entries(), or null where those are in shared memory
  int64_t n;
  int targets, heads, classes, chunk;
  T alpha, gamma;
  T information_scale, slope_scale;  // share / log K; gamma share / log K
};

// Shared memory -------------------------------------------------------------------------------------------------------

// Rows so far apart that those of neighbouring threads begin in different banks.
__host__ __device__ inline int row_stride(int width) { return width | 1; }

inline int64_t joint_entries(int64_t heads, int64_t classes) {
  return heads * classes * row_stride(static_cast<int>(classes));
}

template <typename T>
struct ObjectiveMemory {
  Joints<T> joints;  // at last the slopes
  T *sums, *terms;   // [heads, 2, classes]
  T *errors_of_warps, *information_of_warps;
  T* head_rows;      // [chunk, heads, row_stride(classes)]: logits, probabilities, gradient
  T* task_rows;      // [chunk, row_stride(targets)]: logits, errors
  int* labels;       // [chunk, heads]: of the biases; `uncounted` where the sample does not count
  unsigned* counts;  // [heads]: how many samples do, with `aligned` alone
};

constexpr int uncounted = -1, unknown = -2;  // of labels; `unknown` are those out of range

template <typename Logit>
size_t objective_bytes(const ObjectiveArguments<Logit>& a, int64_t chunk, bool joints_are_shared) {
  const size_t heads = a.heads, a_head = heads * row_stride(a.classes);
  const size_t numbers = (joints_are_shared ? joint_entries(a.heads, a.classes) : 0) + 4 * heads * a.classes +
                         2 * largest_objective_threads<Working<Logit>> / warp_size +
                         chunk * (a_head + row_stride(a.targets));
  return sizeof(Working<Logit>) * numbers + sizeof(int) * (chunk + 1) * heads;
}

template <bool joints_are_shared, typename Logit, typename T>
__device__ __forceinline__ ObjectiveMemory<T> objective_memory(const ObjectiveArguments<Logit>& a, T* shared) {
  const int stride = row_stride(a.classes), warps = largest_objective_threads<T> / warp_size;
  ObjectiveMemory<T> memory;
  memory.joints = {joints_are_shared ? shared : a.joints, a.heads, a.classes, stride};
  memory.sums = shared + (joints_are_shared ? a.heads * a.classes * stride : 0);
  memory.terms = memory.sums + 2 * a.heads * a.classes;
  memory.errors_of_warps = memory.terms + 2 * a.heads * a.classes;
  memory.information_of_warps = memory.errors_of_warps + warps;
  memory.head_rows = memory.information_of_warps + warps;
  memory.task_rows = memory.head_rows + a.chunk * a.heads * stride;
  memory.labels = reinterpret_cast<int*>(memory.task_rows + a.chunk * row_stride(a.targets));
  memory.counts = reinterpret_cast<unsigned*>(memory.labels + a.chunk * a.heads);
  return memory;
}

// Rows that lie densely in global memory and row_stride() apart in shared memory.
template <typename Stored, typename T>
struct Rows {
  Stored* stored;
  T* shared;
  int width, count;  // of the numbers in a row, and in all of them
  __device__ __forceinline__ T& at(int i) const {
    // i / width, far quicker than a division: exact for all that shared memory has room for
    const int row = static_cast<int>((static_cast<float>(i) + 0.5f) * quotient(1.0f, static_cast<float>(width)));
    return shared[i + row * (row_stride(width) - width)];
  }
};

// Samples begin .. begin + rows of a minibatch.
template <typename Logit, typename T>
struct ObjectiveChunk {
  const ObjectiveArguments<Logit>& a;
  const ObjectiveMemory<T>& memory;
  int64_t begin;
  int rows;

  __device__ __forceinline__ ObjectiveChunk(const ObjectiveArguments<Logit>& a, const ObjectiveMemory<T>& memory,
                                            int64_t begin)
      : a(a), memory(memory), begin(begin), rows(static_cast<int>(a.n - begin < a.chunk ? a.n - begin : a.chunk)) {}
  __device__ __forceinline__ int head_rows() const { return rows * a.heads; }
  template <typename Stored>
  __device__ __forceinline__ Rows<Stored, T> of_heads(Stored* stored) const {
    return {stored + begin * a.heads * a.classes, memory.head_rows, a.classes, head_rows() * a.classes};
  }
  template <typename Stored>
  __device__ __forceinline__ Rows<Stored, T> of_task(Stored* stored) const {
    return {stored + begin * a.targets, memory.task_rows, a.targets, rows * a.targets};
  }
};

template <typename Stored, typename T>
__device__ __forceinline__ void stage(const Rows<Stored, T>& first, const Rows<Stored, T>& second) {
  const int count = first.count + second.count, step = blockDim.x;
  for (int begin = threadIdx.x; begin < count; begin += staged_at_a_time * step) {
    T values[staged_at_a_time];
#pragma unroll
    for (int k = 0; k < staged_at_a_time; ++k) {
      const int i = begin + k * step;
      const Stored* const from = i < first.count ? first.stored + i : second.stored + (i - first.count);
      values[k] = i < count ? widen(*from) : T(0);
    }
#pragma unroll
    for (int k = 0; k < staged_at_a_time; ++k) {
      const int i = begin + k * step;
      if (i < count) (i < first.count ? first.at(i) : second.at(i - first.count)) = values[k];
    }
  }
}

template <typename Stored, typename T>
__device__ __forceinline__ void save(const Rows<Stored, T>& rows) {
  for (int i = threadIdx.x; i < rows.count; i += blockDim.x) narrow(rows.at(i), rows.stored[i]);
}

// Phases --------------------------------------------------------------------------------------------------------------

__device__ __forceinline__ bool is_within(int64_t label, int end) { return label >= 0 && label < end; }

// The label that the chunk's `item`th row goes with: the heads' rows come first, then the task's.
template <typename Logit, typename T>
__device__ __forceinline__ int64_t label_of_row(const ObjectiveChunk<Logit, T>& chunk, int item) {
  const int heads = chunk.head_rows();
  return item < heads ? chunk.a.bias_labels[chunk.begin * chunk.a.heads + item]
                      : chunk.a.labels[chunk.begin + (item - heads)];
}

template <typename Logit, typename T>
__device__ __forceinline__ int bias_label(const ObjectiveChunk<Logit, T>& chunk, int item, int64_t label) {
  const ObjectiveArguments<Logit>& a = chunk.a;
  if (!is_within(label, a.classes)) return unknown;
  if (a.aligned != nullptr) {
    const int64_t target = a.labels[chunk.begin + item / a.heads];
    if (!is_within(target, a.targets)) return unknown;
    if (a.aligned[target] == label) return uncounted;
  }
  return static_cast<int>(label);
}

// Keeps the bias label of a head's row, and counts it; returns it, or -1 if it or the target is out of range.
template <typename Logit, typename T>
__device__ __forceinline__ int64_t keep_bias_label(const ObjectiveChunk<Logit, T>& chunk, int item, int64_t given) {
  const int label = bias_label(chunk, item, given);
  chunk.memory.labels[item] = label == unknown ? 0 : label;
  if (chunk.a.aligned != nullptr && label != uncounted) {
    atomicAdd(chunk.memory.counts + item % chunk.a.heads, 1u);  // whole numbers: the order does not matter
  }
  return label == unknown ? -1 : given;
}

// Importance of a sample, a product over its biases.
template <typename Logit, typename T = Working<Logit>>
__device__ __forceinline__ T weight_of(const ObjectiveArguments<Logit>& a, int64_t sample, int64_t target) {
  T weight = 1;
  if (a.importance == nullptr || !is_within(target, a.targets)) return weight;
  for (int head = 0; head < a.heads; ++head) {
    const int64_t label = a.bias_labels[sample * a.heads + head], row = static_cast<int64_t>(head) * a.targets + target;
    weight *= is_within(label, a.classes) ? a.importance[row * a.classes + label] : static_cast<T>(NAN);
  }
  return weight;
}

// Stages a chunk. Its heads' rows of logits become probabilities and, if asked for, those of the task the gradient by
// them; returns the thread's part of the cross-entropy. A label out of range makes the row NaN, and so its loss.
template <typename Logit, typename T>
__device__ __forceinline__ T prepare(const ObjectiveChunk<Logit, T>& chunk, bool with_task) {
  const ObjectiveArguments<Logit>& a = chunk.a;
  const int heads = chunk.head_rows(), items = heads + (with_task ? chunk.rows : 0), own = threadIdx.x;
  const int64_t own_label = own < items ? label_of_row(chunk, own) : 0;  // on its way together with the logits
  Rows<const Logit, T> task = chunk.of_task(a.logits);
  if (!with_task) task.count = 0;
  stage(chunk.of_heads(a.head_logits), task);
  __syncthreads();
  T cross_entropy = 0;
  for (int item = own; item < items; item += blockDim.x) {
    int64_t label = item == own ? own_label : label_of_row(chunk, item);
    T* row = chunk.memory.head_rows + item * row_stride(a.classes);
    T weight = 0, scale = 1;
    const bool of_head = item < heads;
    if (of_head) {
      label = keep_bias_label(chunk, item, label);
    } else {
      row = chunk.memory.task_rows + (item - heads) * row_stride(a.targets);
      weight = weight_of(a, chunk.begin + (item - heads), label);
      scale = quotient(weight * a.alpha, static_cast<T>(a.n));
    }
    const T loss = softmax_row(row, of_head ? a.classes : a.targets, label, scale, of_head ? T(0) : scale, row);
    if (!of_head) cross_entropy += weight * loss;
  }
  return cross_entropy;
}

// How many samples count for a head, at least 1.
template <typename Logit, typename T>
__device__ __forceinline__ T count_of(const ObjectiveArguments<Logit>& a, const ObjectiveMemory<T>& memory, int head) {
  if (a.aligned == nullptr) return static_cast<T>(a.n);
  return memory.counts[head] == 0 ? T(1) : static_cast<T>(memory.counts[head]);
}

// Calls run(head, label) for each row of the joints, by a warp.
template <typename T, typename Run>
__device__ __forceinline__ void for_joint_rows(const Joints<T>& joints, const Run& run) {
  const int warps = blockDim.x / warp_size;
  for (int item = threadIdx.x / warp_size; item < joints.heads * joints.classes; item += warps) {
    run(item / joints.classes, item % joints.classes);
  }
}

template <typename Logit, typename T>
__device__ __forceinline__ void add_to_joints(const ObjectiveChunk<Logit, T>& chunk) {
  const ObjectiveArguments<Logit>& a = chunk.a;
  const ObjectiveMemory<T>& memory = chunk.memory;
  const int stride = memory.joints.stride;
  const bool last = chunk.begin + chunk.rows == a.n;
  for_joint_rows(memory.joints, [&](int head, int label) {
    add_to_row(memory.joints.row(head, label), a.classes, label,
               {memory.labels + head, memory.head_rows + head * stride, chunk.rows, a.heads, a.heads * stride},
               chunk.begin == 0, last ? count_of(a, memory, head) : T(0));
  });
}

// Entries of the joints become the slopes of gamma MI; returns the thread's part of the heads' information.
template <typename Logit, typename T>
__device__ __forceinline__ T slopes(const ObjectiveArguments<Logit>& a, const ObjectiveMemory<T>& memory) {
  T information = 0;
  for_joint_rows(memory.joints, [&](int head, int label) {
    T* const row = memory.joints.row(head, label);
    const T* const sums = memory.sums + head * 2 * a.classes;
    const T* const terms = memory.terms + head * 2 * a.classes;
    const bool any = a.aligned == nullptr || memory.counts[head] > 0;
    const T count = count_of(a, memory, head), scale = quotient(a.slope_scale, count);
    for (int p = threadIdx.x % warp_size; p < a.classes; p += warp_size) {
      const T ratio = log_ratio(row[p], sums[label], sums[a.classes + p]);
      if (any) information += row[p] * ratio;
      row[p] = entry_slope(row[p], ratio, terms[label], terms[a.classes + p], count, scale);
    }
  });
  return information;
}

// Probabilities of the heads' rows become the gradient by their logits.
template <typename Logit, typename T>
__device__ __forceinline__ void gradients(const ObjectiveChunk<Logit, T>& chunk) {
  const Joints<T>& joints = chunk.memory.joints;
  for (int item = threadIdx.x; item < chunk.head_rows(); item += blockDim.x) {
    T* const row = chunk.memory.head_rows + item * joints.stride;
    const int label = chunk.memory.labels[item];
    const bool counts = label != uncounted;
    const T* const slope = joints.row(item % joints.heads, counts ? label : 0);
    softmax_gradient<T>(
        joints.classes, [&](int c) { return row[c]; }, [&](int c) { return counts ? slope[c] : T(0); },
        [&](int c, T gradient) { row[c] = gradient; });
  }
}

// By a whole warp.
template <typename Logit, typename T>
__device__ __forceinline__ void write_losses(const ObjectiveArguments<Logit>& a, const ObjectiveMemory<T>& memory) {
  const T cross_entropy = quotient(sum_of_warps(memory.errors_of_warps), static_cast<T>(a.n));
  const T information = sum_of_warps(memory.information_of_warps) * a.information_scale;
  if (threadIdx.x % warp_size != 0) return;
  a.losses[0] = a.alpha * cross_entropy + a.gamma * information;
  a.losses[1] = cross_entropy;
  a.losses[2] = information;
}

template <typename Logit, bool joints_are_shared>
__global__ void __launch_bounds__(largest_objective_threads<Working<Logit>>)
    objective_kernel(ObjectiveArguments<Logit> a) {
  using T = Working<Logit>;
  FFW_SHARED(T, shared);
  const ObjectiveMemory<T> memory = objective_memory<joints_are_shared>(a, shared);
  for (int head = threadIdx.x; head < a.heads; head += blockDim.x) memory.counts[head] = 0;

  T cross_entropy = 0;
  int64_t begin = 0;
  for (;; begin += a.chunk) {
    const ObjectiveChunk<Logit, T> chunk(a, memory, begin);
    cross_entropy += prepare(chunk, true);
    __syncthreads();
    add_to_joints(chunk);
    save(chunk.of_task(a.by_logits));
    __syncthreads();
    if (begin + chunk.rows == a.n) break;
  }

  keep_warp_sum(cross_entropy, memory.errors_of_warps);
  marginals(memory.joints, memory.sums);
  __syncthreads();
  clamp_terms(memory.joints, memory.sums, memory.terms);
  __syncthreads();
  keep_warp_sum(slopes(a, memory), memory.information_of_warps);
  __syncthreads();
  if (threadIdx.x >= blockDim.x - warp_size) write_losses(a, memory);  // a warp without gradients, if there is one

  for (bool is_there = true; begin >= 0; begin -= a.chunk, is_there = false) {
    const ObjectiveChunk<Logit, T> chunk(a, memory, begin);
    // No barriers here: a thread stages the numbers that it saved before, and has the same rows as in gradients().
    if (!is_there) prepare(chunk, false);
    gradients(chunk);
    __syncthreads();
    save(chunk.of_heads(a.by_head_logits));
  }
}

// The launch ----------------------------------------------------------------------------------------------------------

// Whether the joints have room in shared memory; else the kernel needs them in global memory.
template <typename Logit>
bool joints_fit(const ObjectiveArguments<Logit>& a) {
  return objective_bytes(a, a.n < joint_chunk ? a.n : joint_chunk, true) <= largest_shared_memory();
}

// A warp for every row of the joints, a thread for every row of logits, few logits for a thread to stage.
template <typename Logit>
unsigned objective_threads(const ObjectiveArguments<Logit>& a) {
  constexpr int64_t most = largest_objective_threads<Working<Logit>>;
  const int64_t heads = a.heads, numbers = a.chunk * (heads * a.classes + a.targets);
  const int64_t wanted = std::max({heads * a.classes * warp_size, a.chunk * (heads + 1), numbers / staged_at_a_time});
  return static_cast<unsigned>(std::min(wanted + warp_size - 1, most) / warp_size * warp_size);
}

template <typename Logit>
void launch_objective(ObjectiveArguments<Logit> a, cudaStream_t stream) {
  const bool shared = a.joints == nullptr;
  const size_t fixed = objective_bytes(a, 0, shared), a_sample = objective_bytes(a, 1, shared) - fixed;
  const size_t limit = largest_shared_memory();
  if (fixed + a_sample > limit) {
    throw std::invalid_argument("an objective of " + std::to_string(a.targets) + " classes and " +
                                std::to_string(a.heads) + " heads of " + std::to_string(a.classes) +
                                " does not fit the shared memory");
  }
  const int64_t fitting = static_cast<int64_t>((limit - fixed) / a_sample);
  const int64_t most = a.n < largest_objective_chunk ? a.n : largest_objective_chunk;
  a.chunk = static_cast<int>(most < fitting ? most : fitting);
  const size_t bytes = objective_bytes(a, a.chunk, shared);
  const auto launch = [&](auto joints_are_shared) {
    const auto kernel = objective_kernel<Logit, joints_are_shared()>;
    allow_shared_memory(kernel, bytes);
    FFW_LAUNCH(kernel, 1, objective_threads(a), bytes, stream, a);
  };
  shared ? launch(std::true_type()) : launch(std::false_type());
}

extern template void launch_objective(ObjectiveArguments<double>, cudaStream_t);  // compiled in double.cu

}  // namespace ffw::cuda

// fit_linear_head_, the kernel: whole epochs of softmax regression by SGD with momentum in one launch, plateau rule
// included. One block a head; weights, momentum, and the errors of a minibatch stay in shared memory from the first
// step to the last, features are read from the caches. A step has three phases with a barrier after each:
//
//   logits   a warp takes 4 samples x 8 classes, its lanes share the features
//   errors   a thread takes a sample: softmax, loss, error
//   update   a warp takes 32 features x 4 classes, a lane each feature, and sums over the samples
//
// Whatever does not fit into shared memory stays where it is: first the momentum, then the weights too. The 163 KB of
// an A100 hold both up to about K D = 19000 in float32 (512 features and 37 classes, or 1900 and 10), the weights alone
// up to twice that. Refused are only heads of more than some 6000 classes, whose errors do not fit.
//
// Heads share the plateau, so their blocks wait for one another once an epoch; with several heads the launch is a
// cooperative one. Nothing depends on the order in which blocks or warps run.
#pragma once

#include <stdexcept>
#include <string>

#include "device.cuh"

namespace ffw::cuda {

template <typename T>
constexpr unsigned largest_head_threads = sizeof(T) == 4 ? 512 : 256;

constexpr int row_tile = 4, class_tile = 8;  // of the logits: one sum a lane
constexpr int update_classes = 4;            // of the update: one 16-byte load of errors a sample
constexpr int64_t largest_chunk = 256;       // samples whose errors are kept at a time, a multiple of 4

enum class Placement { shared, weight_shared, global };

template <typename T>
struct HeadArguments {
  T* weight;             // [heads, classes, width]
  T* bias;               // [heads, classes]
  T* weight_momentum;    // as weight
  T* bias_momentum;      // as bias
  double* plateau;       // [3]: best loss, failures since, whether reached
  double* losses;        // [epochs] out
  T* totals;             // [epochs, heads] scratch, with several heads
  unsigned* arrivals;    // [1] scratch, zero, with several heads
  const T* features;     // [samples, width]
  const int64_t* labels;  // [samples, heads]
  const int64_t* order;   // [epochs, epoch_size]
  int64_t samples, epochs, epoch_size, batch_size;
  int width, classes, heads, chunk;
  T lr, momentum, weight_decay;
  T keep;           // 1 - threshold
  T inverse_count;  // 1 / (samples heads)
  int64_t patience;
};

// Shared memory of one head ------------------------------------------------------------------------------------------

template <typename T>
struct HeadState {
  T total, correction;  // sum of the epoch's losses, Neumaier's algorithm
  int stopped;
};

// Errors of four classes lie in one 16-byte pack.
__host__ __device__ inline int padded_classes(int classes) {
  return (classes + update_classes - 1) / update_classes * update_classes;
}

template <typename T>
struct HeadMemory {
  T* errors;         // [chunk, padded_classes], first logits, then errors; padded with zeros
  int64_t* offsets;  // [chunk]: where the sample's features begin
  HeadState<T>* state;
  T* losses;         // [chunk]
  T *bias, *bias_momentum;      // [classes]
  T *weight, *weight_momentum;  // [classes, width]
};

template <typename T>
size_t head_shared_bytes(int width, int classes, int chunk, Placement placement) {
  const size_t parameters = static_cast<size_t>(classes) * width;
  const size_t arrays = placement == Placement::shared ? 2 : placement == Placement::weight_shared ? 1 : 0;
  const size_t errors = static_cast<size_t>(chunk) * padded_classes(classes);
  return sizeof(T) * (errors + chunk + 2 * classes + arrays * parameters) + sizeof(int64_t) * chunk +
         sizeof(HeadState<T>);
}

template <Placement placement, typename T>
__device__ __forceinline__ HeadMemory<T> head_memory(const HeadArguments<T>& a, T* shared) {
  const int64_t parameters = static_cast<int64_t>(a.classes) * a.width;
  HeadMemory<T> memory;
  memory.errors = shared;
  memory.offsets = reinterpret_cast<int64_t*>(memory.errors + a.chunk * padded_classes(a.classes));
  memory.state = reinterpret_cast<HeadState<T>*>(memory.offsets + a.chunk);
  memory.losses = reinterpret_cast<T*>(memory.state + 1);
  memory.bias = memory.losses + a.chunk;
  memory.bias_momentum = memory.bias + a.classes;
  T* const parameters_begin = memory.bias_momentum + a.classes;
  if constexpr (placement == Placement::global) {
    memory.weight = a.weight + blockIdx.x * parameters;
  } else {
    memory.weight = parameters_begin;
  }
  if constexpr (placement == Placement::shared) {
    memory.weight_momentum = parameters_begin + parameters;
  } else {
    memory.weight_momentum = a.weight_momentum + blockIdx.x * parameters;
  }
  return memory;
}

template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// The block's head, between global memory and where it is worked on.
template <Placement placement, bool save, typename T>
__device__ __forceinline__ void move_parameters(const HeadArguments<T>& a, const HeadMemory<T>& memory) {
  const auto move = [](T* shared, T* global, int count) {
    save ? copy(global, shared, count) : copy(shared, global, count);
  };
  const int parameters = a.classes * a.width;
  const int64_t head = blockIdx.x;
  move(memory.bias, a.bias + head * a.classes, a.classes);
  move(memory.bias_momentum, a.bias_momentum + head * a.classes, a.classes);
  if constexpr (placement != Placement::global) move(memory.weight, a.weight + head * parameters, parameters);
  if constexpr (placement == Placement::shared) {
    move(memory.weight_momentum, a.weight_momentum + head * parameters, parameters);
  }
}

// float64 memory from float arithmetic, without an instruction of the FP64 unit ---------------------------------------
// Rounded to the nearest; numbers too small for a normal float become 0.

__device__ __forceinline__ void read_real(const double* from, float& out) {
  const uint64_t bits = *reinterpret_cast<const uint64_t*>(from);
  const uint32_t sign = static_cast<uint32_t>(bits >> 63) << 31;
  const int exponent = static_cast<int>(bits >> 52 & 0x7ff) - 1023 + 127;
  const uint64_t fraction = bits & 0xfffffffffffffull;
  uint32_t result = (static_cast<uint32_t>(exponent) << 23) + static_cast<uint32_t>((fraction + (1u << 28)) >> 29);
  if (exponent <= 0) result = 0;
  if (exponent >= 255) result = exponent == 1151 && fraction != 0 ? 0x7fc00000u : 0x7f800000u;  // 1151: inf or NaN
  out = bits_as<float>(sign | result);
}

__device__ __forceinline__ void write_real(double* to, float x) {
  const uint32_t bits = bits_as<uint32_t>(x);
  const uint32_t exponent = bits >> 23 & 0xff;
  uint64_t wide = (static_cast<uint64_t>(exponent + 1023 - 127) << 52) + (static_cast<uint64_t>(bits & 0x7fffff) << 29);
  if (exponent == 0) wide = 0;
  if (exponent == 255) wide |= 0x7ffull << 52;
  *reinterpret_cast<uint64_t*>(to) = static_cast<uint64_t>(bits >> 31) << 63 | wide;
}

__device__ __forceinline__ void read_real(const double* from, double& out) { out = *from; }
__device__ __forceinline__ void write_real(double* to, double x) { *to = x; }

// The rule of ffw_fast/plateau.py; thread 0 of every block keeps one, all blocks' are the same.
template <typename T>
struct HeadPlateau {
  T best, failures;

  __device__ __forceinline__ bool reached(T loss, const HeadArguments<T>& a) {
    if (loss <= a.keep * best) {
      best = loss;
      failures = 0;
    } else {
      failures += 1;
    }
    return failures > static_cast<T>(a.patience);
  }
};

// A step --------------------------------------------------------------------------------------------------------------

// Of 32 values a lane: after it, lane l holds the sum over all lanes of their value l. 31 shuffles instead of 160.
template <typename T>
__device__ __forceinline__ T transposed_sum(T (&values)[32]) {
  const unsigned lane = threadIdx.x % warp_size;
#pragma unroll
  for (int half = 16; half > 0; half /= 2) {
    const bool upper = lane & half;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const T kept = upper ? values[i + half] : values[i];
      const T given = upper ? values[i] : values[i + half];
      values[i] = kept + __shfl_xor_sync(all_lanes, given, half);
    }
  }
  return values[0];
}

// Logits of 4 samples from `row` and 8 classes from `class_begin`, by one warp.
template <typename T>
__device__ __forceinline__ void logits_tile(const HeadArguments<T>& a, const HeadMemory<T>& memory,
                                            const int64_t* order, int rows, int row, int class_begin) {
  const int lane = threadIdx.x % warp_size;
  const T* x[row_tile];  // the last sample stands in for those beyond it, an index out of range for the first
#pragma unroll
  for (int r = 0; r < row_tile; ++r) {
    const int64_t sample = order[row + r < rows ? row + r : rows - 1];
    x[r] = a.features + (sample >= 0 && sample < a.samples ? sample : 0) * a.width;
  }
  const T* weight = memory.weight + static_cast<int64_t>(class_begin) * a.width;
  T sums[row_tile * class_tile] = {};
  for (int begin = 0; begin < a.width; begin += warp_size) {  // as often for all lanes, who shuffle after it
    const int feature = begin + lane;
    const bool inside = feature < a.width;
    T values[row_tile];
#pragma unroll
    for (int r = 0; r < row_tile; ++r) values[r] = inside ? x[r][feature] : T(0);
#pragma unroll
    for (int c = 0; c < class_tile; ++c) {
      if (class_begin + c < a.classes) {
        const T w = inside ? weight[static_cast<int64_t>(c) * a.width + feature] : T(0);
#pragma unroll
        for (int r = 0; r < row_tile; ++r) sums[r * class_tile + c] += values[r] * w;
      }
    }
  }
  const T sum = transposed_sum(sums);
  const int target_row = row + lane / class_tile, target_class = class_begin + lane % class_tile;
  if (target_row < rows && target_class < a.classes) {
    memory.errors[target_row * padded_classes(a.classes) + target_class] = sum + memory.bias[target_class];
  }
}

// The logits of one sample become its errors (softmax minus one-hot, over the batch's size). A label or a sample
// number out of range makes its loss NaN, which the caller reports: a kernel cannot raise.
template <typename T>
__device__ __forceinline__ void errors_of_row(const HeadArguments<T>& a, const HeadMemory<T>& memory,
                                              const int64_t* order, int row, T inverse_batch) {
  const int64_t sample = order[row];
  const bool known = sample >= 0 && sample < a.samples;
  memory.offsets[row] = (known ? sample : 0) * a.width;
  const int64_t label = known ? a.labels[sample * a.heads + blockIdx.x] : -1;
  T* const values = memory.errors + row * padded_classes(a.classes);
  memory.losses[row] = softmax_row(values, a.classes, label, inverse_batch, inverse_batch, values);
  for (int c = a.classes; c < padded_classes(a.classes); ++c) values[c] = 0;
}

// One parameter's part of a step. A minibatch of several chunks adds up in the momentum before it is applied.
template <typename T>
__device__ __forceinline__ void sgd(const HeadArguments<T>& a, T& value, T& momentum, T gradient, bool first,
                                    bool last) {
  const T updated = first ? a.momentum * momentum + gradient + a.weight_decay * value : momentum + gradient;
  momentum = updated;
  if (last) value -= a.lr * updated;
}

// The weights of 32 features from `feature_begin` and 4 classes from `class_begin`, by one warp.
template <typename T>
__device__ __forceinline__ void update_tile(const HeadArguments<T>& a, const HeadMemory<T>& memory, int rows,
                                            int feature_begin, int class_begin, bool first, bool last) {
  const int feature = feature_begin + static_cast<int>(threadIdx.x % warp_size);
  if (feature >= a.width) return;
  const int stride = padded_classes(a.classes);
  T sums[update_classes] = {};
#pragma unroll 4
  for (int row = 0; row < rows; ++row) {
    const T x = a.features[memory.offsets[row] + feature];
    const auto error = *reinterpret_cast<const Pack<T, update_classes>*>(memory.errors + row * stride + class_begin);
#pragma unroll
    for (int c = 0; c < update_classes; ++c) sums[c] += error.value[c] * x;
  }
#pragma unroll
  for (int c = 0; c < update_classes; ++c) {
    if (class_begin + c < a.classes) {
      const int64_t at = static_cast<int64_t>(class_begin + c) * a.width + feature;
      sgd(a, memory.weight[at], memory.weight_momentum[at], sums[c], first, last);
    }
  }
}

// The sum over the samples of values[row * stride], in every lane of a warp.
template <typename T>
__device__ __forceinline__ T sum_of_rows(const T* values, int rows, int stride) {
  T sum = 0;
  for (int begin = 0; begin < rows; begin += warp_size) {
    const int row = begin + static_cast<int>(threadIdx.x % warp_size);
    sum += row < rows ? values[row * stride] : T(0);
  }
  return warp_sum(sum);
}

template <typename T>
__device__ __forceinline__ void add_loss(HeadState<T>* state, T loss) {
  const T total = state->total, sum = total + loss;
  state->correction += absolute(total) >= absolute(loss) ? (total - sum) + loss : (loss - sum) + total;
  state->total = sum;
}

// The warps of a block share the tiles of the weights, the biases, and the sum of the losses.
template <typename T>
__device__ __forceinline__ void update(const HeadArguments<T>& a, const HeadMemory<T>& memory, int rows, bool first,
                                       bool last) {
  const int stride = padded_classes(a.classes);
  const int class_tiles = stride / update_classes;
  const int tiles = (a.width + static_cast<int>(warp_size) - 1) / static_cast<int>(warp_size) * class_tiles;
  const int warps = blockDim.x / warp_size, lane = threadIdx.x % warp_size;
  for (int item = threadIdx.x / warp_size; item < tiles + a.classes + 1; item += warps) {
    if (item < tiles) {
      update_tile(a, memory, rows, item / class_tiles * static_cast<int>(warp_size),
                  item % class_tiles * update_classes, first, last);
    } else if (item < tiles + a.classes) {
      const int c = item - tiles;
      const T gradient = sum_of_rows(memory.errors + c, rows, stride);
      if (lane == 0) sgd(a, memory.bias[c], memory.bias_momentum[c], gradient, first, last);
    } else {
      const T loss = sum_of_rows(memory.losses, rows, 1);
      if (lane == 0) add_loss(memory.state, loss);
    }
  }
}

// One minibatch, in chunks of as many samples as there is memory for errors.
template <typename T>
__device__ __forceinline__ void head_step(const HeadArguments<T>& a, const HeadMemory<T>& memory,
                                          const int64_t* order, int64_t batch) {
  const T inverse_batch = quotient(T(1), static_cast<T>(batch));
  const int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
  const int class_tiles = (a.classes + class_tile - 1) / class_tile;
  for (int64_t begin = 0; begin < batch; begin += a.chunk) {
    const int rows = static_cast<int>(batch - begin < a.chunk ? batch - begin : a.chunk);
    const int tiles = (rows + row_tile - 1) / row_tile * class_tiles;
    for (int tile = warp; tile < tiles; tile += warps) {
      logits_tile(a, memory, order + begin, rows, tile / class_tiles * row_tile, tile % class_tiles * class_tile);
    }
    __syncthreads();
    for (int row = threadIdx.x; row < rows; row += blockDim.x) {
      errors_of_row(a, memory, order + begin, row, inverse_batch);
    }
    __syncthreads();
    update(a, memory, rows, begin == 0, begin + rows == batch);
    __syncthreads();
  }
}

// The sum of all heads' losses in one epoch, by thread 0 of every block: a barrier of all blocks.
template <typename T>
__device__ __forceinline__ T total_of_heads(const HeadArguments<T>& a, int64_t epoch, T total) {
  if (a.heads == 1) return total;
  T* const totals = a.totals + epoch * a.heads;
  totals[blockIdx.x] = total;
  __threadfence();
  atomicAdd(a.arrivals, 1u);
  while (atomicAdd(a.arrivals, 0u) < static_cast<unsigned>((epoch + 1) * a.heads)) __nanosleep(64);
  __threadfence();
  T sum = 0;
  for (int head = 0; head < a.heads; ++head) sum += __ldcg(totals + head);  // not from a line that is older
  return sum;
}

template <Placement placement, typename T>
__global__ void __launch_bounds__(largest_head_threads<T>) fit_linear_head_kernel(HeadArguments<T> a) {
  FFW_SHARED(T, shared);
  const HeadMemory<T> memory = head_memory<placement>(a, shared);
  HeadState<T>* const state = memory.state;
  HeadPlateau<T> plateau = {};
  if (threadIdx.x == 0) {
    read_real(a.plateau, plateau.best);
    read_real(a.plateau + 1, plateau.failures);
    state->total = state->correction = 0;
    state->stopped = 0;
  }
  move_parameters<placement, false>(a, memory);
  __syncthreads();
  int64_t epoch = 0;
  for (bool stopped = false; epoch < a.epochs && !stopped; ++epoch) {
    const int64_t* order = a.order + epoch * a.epoch_size;
    for (int64_t start = 0; start < a.epoch_size; start += a.batch_size) {
      const int64_t rest = a.epoch_size - start;
      head_step(a, memory, order + start, rest < a.batch_size ? rest : a.batch_size);
    }
    if (threadIdx.x == 0) {
      const T loss = total_of_heads(a, epoch, state->total + state->correction) * a.inverse_count;
      state->total = state->correction = 0;
      state->stopped = plateau.reached(loss, a);
      if (blockIdx.x == 0) write_real(a.losses + epoch, loss);
    }
    __syncthreads();
    stopped = state->stopped;
  }
  move_parameters<placement, true>(a, memory);
  if (blockIdx.x != 0) return;
  if (threadIdx.x == 0) {
    write_real(a.plateau, plateau.best);
    write_real(a.plateau + 1, plateau.failures);
    if (state->stopped) write_real(a.plateau + 2, T(1));
  }
#pragma unroll 1
  for (int64_t rest = epoch + threadIdx.x; rest < a.epochs; rest += blockDim.x) {
    write_real(a.losses + rest, static_cast<T>(NAN));
  }
}

// The launch ----------------------------------------------------------------------------------------------------------

template <typename T>
unsigned head_threads(const HeadArguments<T>& a) {
  const int64_t tiles = (a.chunk / row_tile) * ((a.classes + class_tile - 1) / class_tile);
  const int64_t updates = (a.width + 31) / 32 * (padded_classes(a.classes) / update_classes) + a.classes + 1;
  const int64_t wanted = (tiles > updates ? tiles : updates) * warp_size;
  return static_cast<unsigned>(wanted < largest_head_threads<T> ? wanted : largest_head_threads<T>);
}

template <typename T>
void launch_fit_linear_head(HeadArguments<T> a, cudaStream_t stream) {
  const int64_t batch = a.batch_size < a.epoch_size ? a.batch_size : a.epoch_size;
  a.chunk = static_cast<int>((batch < largest_chunk ? batch : largest_chunk) + 3) / 4 * 4;
  const size_t limit = largest_shared_memory();
  const auto bytes = [&](Placement placement) { return head_shared_bytes<T>(a.width, a.classes, a.chunk, placement); };
  while (a.chunk > 4 && bytes(Placement::global) > limit) a.chunk = a.chunk / 2 / 4 * 4;  // very many classes
  if (bytes(Placement::global) > limit) {
    throw std::invalid_argument("a head of " + std::to_string(a.classes) + " classes does not fit the shared memory");
  }
  const auto launch = [&](auto placement) {
    const auto kernel = fit_linear_head_kernel<placement(), T>;
    allow_shared_memory(kernel, bytes(placement()));
    if (a.heads == 1) {
      FFW_LAUNCH(kernel, 1, head_threads(a), bytes(placement()), stream, a);
    } else {
      FFW_LAUNCH_TOGETHER(kernel, a.heads, head_threads(a), bytes(placement()), stream, a);
    }
  };
  if (bytes(Placement::shared) <= limit) {
    launch(std::integral_constant<Placement, Placement::shared>());
  } else if (bytes(Placement::weight_shared) <= limit) {
    launch(std::integral_constant<Placement, Placement::weight_shared>());
  } else {
    launch(std::integral_constant<Placement, Placement::global>());
  }
}

extern template void launch_fit_linear_head(HeadArguments<double>, cudaStream_t);  // compiled in double.cu

}  // namespace ffw::cuda

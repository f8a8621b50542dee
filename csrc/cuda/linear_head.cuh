// fit_linear_head_, the kernel: whole epochs of softmax regression by SGD with momentum in one launch, plateau rule
// included. One block a head; weights, momentum, and the features of a minibatch's samples are in shared memory while
// they are worked on. A minibatch is done in chunks of as many samples as fit, in small heads one. While a chunk is
// worked on, asynchronous copies bring the features and labels of the next one into a second buffer, and the numbers of
// the samples after that: nothing waits for global memory but the first chunk. A chunk has three phases with a barrier
// after each:
//
//   logits   sums over the features, one for each sample and class
//   errors   four lanes take a sample: softmax, loss, errors
//   update   sums over the samples, one for each feature and class, and a lane to each class's bias
//
// The two kinds of sums have the same form. A lane keeps 8 x 5 of them (samples or features, by classes) over a slice
// of what is summed over, so that an element loaded from shared memory is used 5 or 8 times; 8, 16 or 32 lanes beside
// one another hold the slices of the same sums and add them up, in an order that depends on the sizes alone.
//
// The length of a buffer's row leaves 2 of 4 packs of 16 bytes. With it the 8 lanes whose packs are loaded together
// read from different banks in both kinds of sums: packs s of rows s ^ r, and packs p ^ (s / 4) of rows s.
//
// Where shared memory does not suffice for all, the features are read where they are, by the same loops; then the
// momentum is left there too, and at last the weights. The 163 KB of an A100 hold all up to some 600 features and 10
// classes, weights and momentum up to K D = 20000 in float32, the weights alone up to twice that. Refused are only
// heads of more than some 13000 classes, of which the errors of one sample do not fit.
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

constexpr int sum_rows = 8, sum_classes = 5;  // sums of a lane: samples or features, by classes
constexpr int row_lanes = 4;                  // of one sample's softmax
constexpr int smallest_chunk = 24;            // samples; shorter chunks cost more than they save

template <typename T>
constexpr int pack_size = 16 / sizeof(T);

// What is in shared memory: rows of features, weights and momentum; weights and momentum; weights; none of these.
enum class Placement { shared, parameters_shared, weight_shared, global };
__host__ __device__ constexpr bool has_rows(Placement placement) { return placement == Placement::shared; }
__host__ __device__ constexpr bool has_weight(Placement placement) { return placement != Placement::global; }
__host__ __device__ constexpr bool has_momentum(Placement placement) {
  return placement == Placement::shared || placement == Placement::parameters_shared;
}

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
  int64_t samples;
  int epochs, epoch_size, batch_size, width, classes, heads;
  T lr, momentum, weight_decay;
  T keep;           // 1 - threshold
  T inverse_count;  // 1 / (samples heads)
  int64_t patience;
  // Set by the launch:
  int chunk;      // samples
  bool whole;     // rows of features and weights are whole packs that begin at multiples of 16 bytes
  int log_lanes;  // so many threads copy one row, as a power of 2
  int logits_slices, update_slices;  // so many lanes share a sum
};

// Shared memory of one head ------------------------------------------------------------------------------------------

template <typename T>
struct HeadState {
  T total, correction;  // sum of the epoch's losses, Neumaier's algorithm
  T best, failures;     // of the plateau, in every block the same
  int stopped;
};

// Elements from one row to the next in shared memory, of weights and of features. What is missing to whole packs is
// zero.
template <typename T>
__host__ __device__ inline int row_stride(int width) {
  return (width + pack_size<T> - 1) / pack_size<T> * pack_size<T>;
}

template <typename T>
__host__ __device__ inline int buffer_stride(int width) {
  return (((width + pack_size<T> - 1) / pack_size<T> + 1) / 4 * 4 + 2) * pack_size<T>;
}

__host__ __device__ inline int tiles_of_classes(int classes) { return (classes + sum_classes - 1) / sum_classes; }

// Elements from one sample's errors to the next: odd, for lanes that each read another sample's. Behind the errors
// stands the sample's loss; the last tile of classes reads on without harm.
__host__ __device__ inline int error_stride(int classes) {
  const int tiled = tiles_of_classes(classes) * sum_classes;
  return (tiled > classes ? tiled : classes + 1) | 1;
}

template <typename T>
struct HeadMemory {
  T* rows;           // [2, chunk, buffer_stride]: the samples' features,
  int64_t* offsets;  // or [2, chunk]: where they begin in global memory
  T *weight, *weight_momentum;  // [classes, row_stride], in global memory [classes, width]
  int64_t* samples;  // [2, chunk]: numbers of the samples of the next chunk and of the one after it, by turns
  int64_t* labels;   // [2, chunk]: of this chunk and of the next one, -1 for a sample out of range
  HeadState<T>* state;
  T* errors;                // [chunk, error_stride], first logits, then errors
  T *bias, *bias_momentum;  // [classes]
};

template <typename T>
size_t head_bytes_a_sample(int width, int classes, Placement placement) {
  return (has_rows(placement) ? 2 * sizeof(T) * buffer_stride<T>(width) : 2 * sizeof(int64_t)) + 4 * sizeof(int64_t) +
         sizeof(T) * error_stride(classes);
}

// All that does not depend on the number of samples in a chunk.
template <typename T>
size_t head_bytes(int width, int classes, Placement placement) {
  const size_t arrays = has_weight(placement) + has_momentum(placement);
  return sizeof(T) * (arrays * classes * row_stride<T>(width) + 2 * static_cast<size_t>(classes)) +
         sizeof(HeadState<T>);
}

template <Placement placement, typename T>
__device__ __forceinline__ HeadMemory<T> head_memory(const HeadArguments<T>& a, T* shared) {
  const int64_t parameters = static_cast<int64_t>(a.classes) * a.width;
  const int padded_parameters = a.classes * row_stride<T>(a.width);
  HeadMemory<T> memory = {};
  T* free = shared;
  if constexpr (has_rows(placement)) {
    memory.rows = free;
    free += 2 * a.chunk * buffer_stride<T>(a.width);
  }
  if constexpr (has_weight(placement)) {
    memory.weight = free;
    free += padded_parameters;
  } else {
    memory.weight = a.weight + blockIdx.x * parameters;
  }
  if constexpr (has_momentum(placement)) {
    memory.weight_momentum = free;
    free += padded_parameters;
  } else {
    memory.weight_momentum = a.weight_momentum + blockIdx.x * parameters;
  }
  memory.samples = reinterpret_cast<int64_t*>(free);
  memory.labels = memory.samples + 2 * a.chunk;
  int64_t* numbers_end = memory.labels + 2 * a.chunk;
  if constexpr (!has_rows(placement)) {
    memory.offsets = numbers_end;
    numbers_end += 2 * a.chunk;
  }
  memory.state = reinterpret_cast<HeadState<T>*>(numbers_end);
  memory.errors = reinterpret_cast<T*>(memory.state + 1);
  memory.bias = memory.errors + a.chunk * error_stride(a.classes);
  memory.bias_momentum = memory.bias + a.classes;
  return memory;
}

// Rows to shared memory, row number r from from(r), by 2^log_lanes threads beside one another each. `thread`: of the
// `threads` that take part.
template <int n, typename T, typename From>
__device__ __forceinline__ void copy_rows_by(T* to, int stride, int rows, int width, int thread, int threads,
                                             int log_lanes, const From& from) {
  const int first = (thread & ((1 << log_lanes) - 1)) * n, step = n << log_lanes;
#pragma unroll 1
  for (int row = thread >> log_lanes; row < rows; row += threads >> log_lanes) {
    T* to_part = to + row * stride + first;
    const T* from_part = from(row) + first;
#pragma unroll 2
    for (int at = first; at < width; at += step, to_part += step, from_part += step) {
      copy_async<n * sizeof(T)>(to_part, from_part);
    }
  }
}

template <typename T, typename From>
__device__ __forceinline__ void copy_rows(const HeadArguments<T>& a, T* to, int stride, int rows, int thread,
                                          int threads, int log_lanes, const From& from) {
  a.whole ? copy_rows_by<pack_size<T>>(to, stride, rows, a.width, thread, threads, log_lanes, from)
          : copy_rows_by<1>(to, stride, rows, a.width, thread, threads, log_lanes, from);
}

template <typename T>
__device__ __forceinline__ void clear_padding(T* rows, int stride, int count, int width) {
  const int padding = row_stride<T>(width) - width;
  for (int i = threadIdx.x; i < count * padding; i += blockDim.x) rows[i / padding * stride + width + i % padding] = 0;
}

template <typename T>
__device__ __forceinline__ void copy(T* to, const T* from, int count) {
  for (int i = threadIdx.x; i < count; i += blockDim.x) to[i] = from[i];
}

// The block's head to where it is worked on; weights are there after wait_for_copies().
template <Placement placement, typename T>
__device__ __forceinline__ void load_parameters(const HeadArguments<T>& a, const HeadMemory<T>& memory) {
  const int64_t first_class = static_cast<int64_t>(blockIdx.x) * a.classes;
  const int stride = row_stride<T>(a.width);
  const auto load_rows = [&](T* to, const T* from) {
    copy_rows(a, to, stride, a.classes, threadIdx.x, blockDim.x, 5,
              [&](int c) { return from + (first_class + c) * a.width; });
  };
  if constexpr (has_weight(placement)) {
    clear_padding(memory.weight, stride, a.classes, a.width);
    load_rows(memory.weight, a.weight);
  }
  if constexpr (has_momentum(placement)) load_rows(memory.weight_momentum, a.weight_momentum);
  copy(memory.bias, a.bias + first_class, a.classes);
  copy(memory.bias_momentum, a.bias_momentum + first_class, a.classes);
}

template <Placement placement, typename T>
__device__ __forceinline__ void save_parameters(const HeadArguments<T>& a, const HeadMemory<T>& memory) {
  const int64_t first_class = static_cast<int64_t>(blockIdx.x) * a.classes;
  const auto save_rows = [&](T* to, const T* from) {
    const int lane = threadIdx.x % warp_size, warps = blockDim.x / warp_size;
    for (int c = threadIdx.x / warp_size; c < a.classes; c += warps) {
      for (int feature = lane; feature < a.width; feature += warp_size) {
        to[(first_class + c) * a.width + feature] = from[c * row_stride<T>(a.width) + feature];
      }
    }
  };
  if constexpr (has_weight(placement)) save_rows(a.weight, memory.weight);
  if constexpr (has_momentum(placement)) save_rows(a.weight_momentum, memory.weight_momentum);
  copy(a.bias + first_class, memory.bias, a.classes);
  copy(a.bias_momentum + first_class, memory.bias_momentum, a.classes);
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

// The rule of ffw_fast/plateau.py.
template <typename T>
__device__ __forceinline__ bool reached_plateau(const HeadArguments<T>& a, HeadState<T>* state, T loss) {
  if (loss <= a.keep * state->best) {
    state->best = loss;
    state->failures = 0;
  } else {
    state->failures += 1;
  }
  return state->failures > static_cast<T>(a.patience);
}

// Chunks --------------------------------------------------------------------------------------------------------------

// Part of a minibatch; none has no rows.
template <typename T>
struct Chunk {
  int rows;
  bool first, last, ends_epoch;  // first, last: of its minibatch
  T inverse_batch;               // one over the minibatch's size
};

// The chunks of all epochs, one after another.
template <typename T>
struct ChunkWalk {
  const int64_t* order;                    // where the next chunk's samples stand
  int epochs, epoch_rest, batch_rest;      // what is left of all, of this epoch, and of this minibatch
  T inverse_batch;

  __device__ __forceinline__ explicit ChunkWalk(const HeadArguments<T>& a)
      : order(a.order), epochs(a.epochs), epoch_rest(a.epoch_size), batch_rest(0), inverse_batch(0) {}

  __device__ __forceinline__ Chunk<T> next(const HeadArguments<T>& a) {
    Chunk<T> chunk = {};
    if (epochs == 0) return chunk;
    if (batch_rest == 0) {
      batch_rest = a.batch_size < epoch_rest ? a.batch_size : epoch_rest;
      inverse_batch = quotient(T(1), static_cast<T>(batch_rest));
      chunk.first = true;
    }
    chunk.rows = a.chunk < batch_rest ? a.chunk : batch_rest;
    chunk.inverse_batch = inverse_batch;
    order += chunk.rows, batch_rest -= chunk.rows, epoch_rest -= chunk.rows;
    chunk.last = batch_rest == 0;
    chunk.ends_epoch = epoch_rest == 0;
    if (chunk.ends_epoch) epoch_rest = a.epoch_size, --epochs;
    return chunk;
  }
};

// The threads that bring what comes next: the upper half of the warps, which have no tile of sums in small heads.
struct Fetchers {
  int thread, threads;  // thread < 0: none of them

  __device__ __forceinline__ Fetchers() {
    const int first = blockDim.x / warp_size / 2 * warp_size;
    thread = static_cast<int>(threadIdx.x) - first, threads = static_cast<int>(blockDim.x) - first;
  }
};

// The numbers of a chunk's samples, by the fetchers.
__device__ __forceinline__ void fetch_samples(int64_t* to, const int64_t* order, int rows) {
  const Fetchers by;
  for (int row = by.thread; row < rows; row += by.threads) copy_async<sizeof(int64_t)>(to + row, order + row);
}

// Features and labels of the samples whose numbers are in that buffer, by the fetchers. A sample out of range reads the
// first one's.
template <Placement placement, typename T>
__device__ __forceinline__ void fetch_rows(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer,
                                           int rows) {
  const Fetchers by;
  const int64_t* const samples = memory.samples + buffer * a.chunk;
  const auto known = [&](int64_t sample) { return static_cast<uint64_t>(sample) < static_cast<uint64_t>(a.samples); };
  const auto offset = [&](int row) {
    const int64_t sample = samples[row];
    return (known(sample) ? sample : 0) * a.width;
  };
  if constexpr (has_rows(placement)) {
    const int stride = buffer_stride<T>(a.width);
    copy_rows(a, memory.rows + buffer * a.chunk * stride, stride, rows, by.thread, by.threads, a.log_lanes,
              [&](int row) { return a.features + offset(row); });
  }
#pragma unroll 1
  for (int row = by.thread; row < rows; row += by.threads) {
    int64_t* const label = memory.labels + buffer * a.chunk + row;
    const int64_t sample = samples[row];
    if (known(sample)) {
      copy_async<sizeof(int64_t)>(label, a.labels + sample * a.heads + blockIdx.x);
    } else {
      *label = -1;
    }
    if constexpr (!has_rows(placement)) memory.offsets[buffer * a.chunk + row] = offset(row);
  }
}

// A chunk's row of features.
template <Placement placement, typename T>
__device__ __forceinline__ const T* features_of_row(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer,
                                                    int row) {
  if constexpr (has_rows(placement)) {
    return memory.rows + (buffer * a.chunk + row) * buffer_stride<T>(a.width);
  } else {
    return a.features + memory.offsets[buffer * a.chunk + row];
  }
}

// Calls run(std::bool_constant) with whether a chunk's rows of features are whole packs, where they are read.
template <Placement placement, typename T, typename Run>
__device__ __forceinline__ void with_whole(const HeadArguments<T>& a, const Run& run) {
  if constexpr (has_rows(placement)) {
    run(std::true_type());
  } else {
    a.whole ? run(std::true_type()) : run(std::false_type());
  }
}

// Sums ----------------------------------------------------------------------------------------------------------------

template <typename T>
using Sums = T[sum_rows][sum_classes];

// A warp's tile of sums, and a lane's place in it: the slice that it sums over, and the first of the tile's rows that
// its 8 rows of sums stand for. Register k of a lane stands for row k ^ swap. Where swap is not zero, two lanes that
// are about to halve their rows hold in the same registers what each keeps, and what each gives.
template <int slices>
struct TileLane {
  static constexpr int rows = sum_rows * warp_size / slices;  // of the tile
  int slice, first_row;

  __device__ __forceinline__ TileLane() {
    const int lane = threadIdx.x % warp_size;
    slice = lane % slices, first_row = lane / slices * sum_rows;
  }
  // The row whose sums it holds in the end, and whether it is the one to write them.
  __device__ __forceinline__ int own_row() const { return first_row + slice % sum_rows; }
  __device__ __forceinline__ bool writes() const { return slice < sum_rows; }
};

// Lanes whose numbers differ by `half` give each other the sums of half of their rows.
template <int half, bool swapped, typename T>
__device__ __forceinline__ void halve_rows(Sums<T>& sums) {
  const unsigned lane = threadIdx.x % warp_size;
  const bool upper = !swapped && lane & half;
#pragma unroll
  for (int i = 0; i < half; ++i) {
#pragma unroll
    for (int c = 0; c < sum_classes; ++c) {
      const T kept = upper ? sums[i + half][c] : sums[i][c];
      const T given = upper ? sums[i][c] : sums[i + half][c];
      sums[i][c] = kept + __shfl_xor_sync(all_lanes, given, half);
    }
  }
}

// Of sums over a slice, held by `slices` lanes beside one another: after it, a lane's register 0 holds the whole sums
// of its own row. 35 shuffles for 8 slices, 5 more whenever these are doubled. `swaps`: the bits of a slice's number
// that are those of its lane's swap.
template <int slices, int swaps, typename T>
__device__ __forceinline__ void add_slices(Sums<T>& sums) {
  static_assert(sum_rows == 8, "halved three times");
  halve_rows<4, (swaps & 4) != 0, T>(sums);
  halve_rows<2, (swaps & 2) != 0, T>(sums);
  halve_rows<1, (swaps & 1) != 0, T>(sums);
#pragma unroll
  for (int distance = sum_rows; distance < slices; distance *= 2) {
#pragma unroll
    for (int c = 0; c < sum_classes; ++c) sums[0][c] += __shfl_xor_sync(all_lanes, sums[0][c], distance);
  }
}

template <int slices>
__host__ __device__ __forceinline__ int tiles_of_sums(int rows, int classes) {
  return (rows + TileLane<slices>::rows - 1) / TileLane<slices>::rows * tiles_of_classes(classes);
}

// The number of slices that promises the shortest time: a tile takes a lane's share of `length` and `overhead`, and the
// four parts of a multiprocessor take one tile each at a time.
inline int best_slices(int rows, int classes, int length, int overhead) {
  const auto time = [&](int slices, int tiles) {
    return static_cast<int64_t>((tiles + 3) / 4) * ((length + slices - 1) / slices + overhead);
  };
  const int64_t few = time(8, tiles_of_sums<8>(rows, classes)), more = time(16, tiles_of_sums<16>(rows, classes)),
                most = time(32, tiles_of_sums<32>(rows, classes));
  return most <= more && most <= few ? 32 : more <= few ? 16 : 8;
}

// Calls run(std::integral_constant<int, slices>).
template <typename Run>
__device__ __forceinline__ void for_slices(int slices, const Run& run) {
  switch (slices) {
    case 32: return run(std::integral_constant<int, 32>());
    case 16: return run(std::integral_constant<int, 16>());
    default: return run(std::integral_constant<int, 8>());
  }
}

__host__ __device__ __forceinline__ int at_most(int value, int largest) { return value < largest ? value : largest; }

// A step --------------------------------------------------------------------------------------------------------------

// Logits of a tile of samples from `row_begin` and 5 classes from `class_begin`, by one warp. The last sample and class
// stand in for those beyond them.
template <int slices, Placement placement, typename T>
__device__ __forceinline__ void logits_tile(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer,
                                            int rows, int row_begin, int class_begin) {
  const TileLane<slices> lane;
  const T* x[sum_rows];
  int weight[sum_classes];  // where a class's begin
#pragma unroll
  for (int r = 0; r < sum_rows; ++r) {
    const int row = row_begin + lane.first_row + (r ^ lane.slice % sum_rows);
    x[r] = features_of_row<placement>(a, memory, buffer, at_most(row, rows - 1));
  }
#pragma unroll
  for (int c = 0; c < sum_classes; ++c) {
    weight[c] = at_most(class_begin + c, a.classes - 1) * (has_weight(placement) ? row_stride<T>(a.width) : a.width);
  }
  Sums<T> sums = {};
  with_whole<placement>(a, [&](auto whole) {
    constexpr bool packs = decltype(whole)::value;
    constexpr int n = packs ? pack_size<T> : 1;
#pragma unroll 1
    for (int begin = lane.slice * n; begin < a.width; begin += slices * n) {
      T w[sum_classes][n];
#pragma unroll
      for (int c = 0; c < sum_classes; ++c) load(memory.weight + weight[c], begin, a.width, packs, w[c]);
#pragma unroll
      for (int r = 0; r < sum_rows; ++r) {
        T values[n];
        load(x[r], begin, a.width, packs, values);
#pragma unroll
        for (int i = 0; i < n; ++i) {
#pragma unroll
          for (int c = 0; c < sum_classes; ++c) sums[r][c] += values[i] * w[c][i];
        }
      }
    }
  });
  add_slices<slices, 7, T>(sums);
  const int row = row_begin + lane.own_row();
  if (!lane.writes() || row >= rows) return;
#pragma unroll
  for (int c = 0; c < sum_classes; ++c) {
    if (class_begin + c < a.classes) {
      memory.errors[row * error_stride(a.classes) + class_begin + c] = sums[0][c] + memory.bias[class_begin + c];
    }
  }
}

template <Placement placement, typename T>
__device__ __forceinline__ void logits(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer, int rows) {
  const int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
  const int class_tiles = tiles_of_classes(a.classes);
  for_slices(a.logits_slices, [&](auto number) {
    constexpr int slices = decltype(number)::value;
    for (int tile = warp; tile < tiles_of_sums<slices>(rows, a.classes); tile += warps) {
      logits_tile<slices, placement>(a, memory, buffer, rows, tile / class_tiles * TileLane<slices>::rows,
                                     tile % class_tiles * sum_classes);
    }
  });
}

// The largest and the sum over the lanes of one sample, in each of them.
template <typename T>
__device__ __forceinline__ T largest_of_row(T x) {
#pragma unroll
  for (int distance = row_lanes / 2; distance > 0; distance /= 2) {
    const T other = __shfl_xor_sync(all_lanes, x, distance);
    x = other > x ? other : x;
  }
  return x;
}

template <typename T>
__device__ __forceinline__ T sum_of_row(T x) {
#pragma unroll
  for (int distance = row_lanes / 2; distance > 0; distance /= 2) x += __shfl_xor_sync(all_lanes, x, distance);
  return x;
}

// Logits become errors (softmax minus one-hot, over the batch's size) and a loss. A label or a sample number out of
// range makes the loss NaN, which the caller reports: a kernel cannot raise.
template <typename T>
__device__ __forceinline__ void errors(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer, int rows,
                                       T inverse_batch) {
  const int part = threadIdx.x % row_lanes;
  for (int begin = 0; begin < rows; begin += blockDim.x / row_lanes) {  // as often for all lanes, who shuffle
    const int row = begin + static_cast<int>(threadIdx.x) / row_lanes;
    const int classes = row < rows ? a.classes : 0;
    const int64_t label = row < rows ? memory.labels[buffer * a.chunk + row] : -1;
    const bool valid = label >= 0 && label < a.classes;
    T* const values = memory.errors + row * error_stride(a.classes);
    T largest = static_cast<T>(-INFINITY), picked = 0, sum = 0;
#pragma unroll 1
    for (int c = part; c < classes; c += row_lanes) {
      largest = values[c] > largest ? values[c] : largest;
      if (c == label) picked = values[c];
    }
    largest = largest_of_row(largest);
#pragma unroll 1
    for (int c = part; c < classes; c += row_lanes) {
      values[c] = decay(values[c] - largest);
      sum += values[c];
    }
    sum = sum_of_row(sum);
    const T scale = valid ? quotient(inverse_batch, sum) : static_cast<T>(NAN);
#pragma unroll 1
    for (int c = part; c < classes; c += row_lanes) {
      values[c] = values[c] * scale - (c == label ? inverse_batch : T(0));
    }
    if (row < rows && part == (valid ? static_cast<int>(label) % row_lanes : 0)) {
      values[a.classes] = valid ? logarithm(sum) - (picked - largest) : static_cast<T>(NAN);
    }
  }
}

// One parameter's part of a step. A minibatch of several chunks adds up in the momentum before it is applied.
template <typename T>
__device__ __forceinline__ void sgd(const HeadArguments<T>& a, T& value, T& momentum, T gradient, bool first,
                                    bool last) {
  const T updated = first ? a.momentum * momentum + gradient + a.weight_decay * value : momentum + gradient;
  momentum = updated;
  if (last) value -= a.lr * updated;
}

// The weights of a tile of features from `feature_begin` and 5 classes from `class_begin`, by one warp.
template <int slices, Placement placement, typename T>
__device__ __forceinline__ void update_tile(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer,
                                            const Chunk<T>& chunk, int feature_begin, int class_begin) {
  constexpr int n = pack_size<T>;
  const TileLane<slices> lane;
  const int stride = error_stride(a.classes);
  int first[sum_rows / n];  // elements of packs; the last one stands in for those beyond it
#pragma unroll
  for (int i = 0; i < sum_rows / n; ++i) {
    const int feature = feature_begin + lane.first_row + (i * n ^ (lane.slice & 4));
    first[i] = at_most(feature, row_stride<T>(a.width) - n);
  }
  Sums<T> sums = {};
  with_whole<placement>(a, [&](auto whole) {
    constexpr bool packs = decltype(whole)::value;
#pragma unroll 2
    for (int row = lane.slice; row < chunk.rows; row += slices) {
      const T* const features = features_of_row<placement>(a, memory, buffer, row);
      const T* const errors = memory.errors + row * stride + class_begin;
      T x[sum_rows];
#pragma unroll
      for (int i = 0; i < sum_rows / n; ++i) {
        T pack[n];
        load(features, first[i], a.width, packs, pack);
#pragma unroll
        for (int k = 0; k < n; ++k) x[i * n + k] = pack[k];
      }
#pragma unroll
      for (int c = 0; c < sum_classes; ++c) {
        const T error = errors[c];
#pragma unroll
        for (int i = 0; i < sum_rows; ++i) sums[i][c] += error * x[i];
      }
    }
  });
  add_slices<slices, 4, T>(sums);
  const int feature = feature_begin + lane.own_row();
  if (!lane.writes() || feature >= a.width) return;
#pragma unroll
  for (int c = 0; c < sum_classes; ++c) {
    if (class_begin + c < a.classes) {
      const int64_t row = class_begin + c;
      const int64_t at = row * (has_weight(placement) ? row_stride<T>(a.width) : a.width) + feature;
      const int64_t momentum_at = row * (has_momentum(placement) ? row_stride<T>(a.width) : a.width) + feature;
      sgd(a, memory.weight[at], memory.weight_momentum[momentum_at], sums[0][c], chunk.first, chunk.last);
    }
  }
}

template <typename T>
__device__ __forceinline__ void add_loss(HeadState<T>* state, T loss) {
  const T total = state->total, sum = total + loss;
  state->correction += absolute(total) >= absolute(loss) ? (total - sum) + loss : (loss - sum) + total;
  state->total = sum;
}

// The bias of a class, and the sum of the losses, which stand like one more class's errors, from the errors' column.
template <typename T>
__device__ __forceinline__ void update_column(const HeadArguments<T>& a, const HeadMemory<T>& memory,
                                              const Chunk<T>& chunk, int column) {
  constexpr int n = 4;  // sums beside one another
  const int stride = error_stride(a.classes);
  const T* const values = memory.errors + column;
  T sums[n] = {};
  int row = 0;
#pragma unroll 4
  for (; row + n <= chunk.rows; row += n) {
#pragma unroll
    for (int i = 0; i < n; ++i) sums[i] += values[(row + i) * stride];
  }
#pragma unroll 1
  for (; row < chunk.rows; ++row) sums[0] += values[row * stride];
  const T sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  if (column < a.classes) {
    sgd(a, memory.bias[column], memory.bias_momentum[column], sum, chunk.first, chunk.last);
  } else {
    add_loss(memory.state, sum);
  }
}

// The first warps of a block take the tiles of the weights, the last ones the columns of the errors, a lane each.
template <Placement placement, typename T>
__device__ __forceinline__ void update(const HeadArguments<T>& a, const HeadMemory<T>& memory, int buffer,
                                       const Chunk<T>& chunk) {
  const int warp = threadIdx.x / warp_size, warps = blockDim.x / warp_size;
  const int class_tiles = tiles_of_classes(a.classes);
  for_slices(a.update_slices, [&](auto number) {
    constexpr int slices = decltype(number)::value;
    for (int tile = warp; tile < tiles_of_sums<slices>(a.width, a.classes); tile += warps) {
      update_tile<slices, placement>(a, memory, buffer, chunk, tile / class_tiles * TileLane<slices>::rows,
                                     tile % class_tiles * sum_classes);
    }
  });
#pragma unroll 1
  for (int column = blockDim.x - 1 - threadIdx.x; column <= a.classes; column += blockDim.x) {
    update_column(a, memory, chunk, column);
  }
}

// The sum of all heads' losses in one epoch, by thread 0 of every block: a barrier of all blocks.
template <typename T>
__device__ __forceinline__ T total_of_heads(const HeadArguments<T>& a, int epoch, T total) {
  if (a.heads == 1) return total;
  T* const totals = a.totals + static_cast<int64_t>(epoch) * a.heads;
  totals[blockIdx.x] = total;
  __threadfence();
  atomicAdd(a.arrivals, 1u);
  while (atomicAdd(a.arrivals, 0u) < (epoch + 1u) * a.heads) __nanosleep(64);
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
  if (threadIdx.x == 0) {
    read_real(a.plateau, state->best);
    read_real(a.plateau + 1, state->failures);
    state->total = state->correction = 0;
    state->stopped = 0;
  }
  load_parameters<placement>(a, memory);
  if constexpr (has_rows(placement)) clear_padding(memory.rows, buffer_stride<T>(a.width), 2 * a.chunk, a.width);
  ChunkWalk<T> walk(a);
  Chunk<T> current = {}, next = {};  // at first the pipeline is empty
  int epoch = 0;
  bool stopped = false;
  for (int buffer = 0; epoch < a.epochs && !stopped; buffer ^= 1) {
    const int64_t* const order = walk.order;
    const Chunk<T> after = walk.next(a);
    if (Fetchers().thread >= 0) {
      fetch_rows<placement>(a, memory, buffer ^ 1, next.rows);
      fetch_samples(memory.samples + buffer * a.chunk, order, after.rows);
    }
    if (current.rows > 0) {
      logits<placement>(a, memory, buffer, current.rows);
      __syncthreads();
      errors(a, memory, buffer, current.rows, current.inverse_batch);
      __syncthreads();
      update<placement>(a, memory, buffer, current);
    }
    wait_for_copies();
    __syncthreads();
    if (current.ends_epoch) {
      if (threadIdx.x == 0) {
        const T loss = total_of_heads(a, epoch, state->total + state->correction) * a.inverse_count;
        state->total = state->correction = 0;
        state->stopped = reached_plateau(a, state, loss);
        if (blockIdx.x == 0) write_real(a.losses + epoch, loss);
      }
      __syncthreads();
      stopped = state->stopped;
      ++epoch;
    }
    current = next, next = after;
  }
  save_parameters<placement>(a, memory);
  if (blockIdx.x != 0) return;
  if (threadIdx.x == 0) {
    write_real(a.plateau, state->best);
    write_real(a.plateau + 1, state->failures);
    if (state->stopped) write_real(a.plateau + 2, T(1));
  }
#pragma unroll 1
  for (int rest = epoch + static_cast<int>(threadIdx.x); rest < a.epochs; rest += blockDim.x) {
    write_real(a.losses + rest, static_cast<T>(NAN));
  }
}

// The launch ----------------------------------------------------------------------------------------------------------

template <typename T>
unsigned head_threads(const HeadArguments<T>& a) {
  const auto tiles = [&](int64_t rows) { return (rows + sum_rows - 1) / sum_rows * tiles_of_classes(a.classes); };
  const int64_t softmaxes = (int64_t{a.chunk} * row_lanes + warp_size - 1) / warp_size;
  int64_t warps = tiles(a.width) + 1;  // one for the biases
  if (warps < tiles(a.chunk)) warps = tiles(a.chunk);
  if (warps < softmaxes) warps = softmaxes;
  const int64_t wanted = warps * warp_size;
  return static_cast<unsigned>(wanted < largest_head_threads<T> ? wanted : largest_head_threads<T>);
}

// The most samples a buffer that fit into so much shared memory, but at most all of a minibatch.
template <typename T>
int fitting_samples(const HeadArguments<T>& a, Placement placement, size_t limit) {
  const size_t fixed = head_bytes<T>(a.width, a.classes, placement);
  if (fixed > limit) return 0;
  const size_t fitting = (limit - fixed) / head_bytes_a_sample<T>(a.width, a.classes, placement);
  return fitting < static_cast<size_t>(a.batch_size) ? static_cast<int>(fitting) : a.batch_size;
}

template <typename T>
void launch_fit_linear_head(HeadArguments<T> a, cudaStream_t stream) {
  if (a.batch_size > a.epoch_size) a.batch_size = a.epoch_size;
  a.whole = a.width % pack_size<T> == 0 && on_16_bytes(a.features) && on_16_bytes(a.weight) &&
            on_16_bytes(a.weight_momentum);
  const size_t limit = largest_shared_memory();
  const auto launch = [&](auto placement) {
    const int fitting = fitting_samples(a, placement(), limit);
    const int smallest = placement() == Placement::global ? 1 : smallest_chunk;
    if (fitting < (smallest < a.batch_size ? smallest : a.batch_size)) return false;
    const int chunks = (a.batch_size - 1) / fitting + 1;
    const int even = (a.batch_size - 1) / chunks + 1;
    a.chunk = at_most((even + sum_rows - 1) / sum_rows * sum_rows, fitting);
    const size_t bytes = head_bytes<T>(a.width, a.classes, placement()) +
                         a.chunk * head_bytes_a_sample<T>(a.width, a.classes, placement());
    const int packs = row_stride<T>(a.width) / pack_size<T>;
    a.logits_slices = best_slices(a.chunk, a.classes, packs, 2);  // what else a tile needs is worth two packs
    a.update_slices = best_slices(a.width, a.classes, a.chunk, 4);
    const unsigned threads = head_threads(a);
    for (a.log_lanes = 2; a.log_lanes < 5 && a.chunk << (a.log_lanes + 2) <= static_cast<int>(threads);) ++a.log_lanes;
    const auto kernel = fit_linear_head_kernel<placement(), T>;
    allow_shared_memory(kernel, bytes);
    if (a.heads == 1) {
      FFW_LAUNCH(kernel, 1, threads, bytes, stream, a);
    } else {
      FFW_LAUNCH_TOGETHER(kernel, a.heads, threads, bytes, stream, a);
    }
    return true;
  };
  if (launch(std::integral_constant<Placement, Placement::shared>()) ||
      launch(std::integral_constant<Placement, Placement::parameters_shared>()) ||
      launch(std::integral_constant<Placement, Placement::weight_shared>()) ||
      launch(std::integral_constant<Placement, Placement::global>())) {
    return;
  }
  throw std::invalid_argument("a head of " + std::to_string(a.classes) + " classes does not fit the shared memory");
}

extern template void launch_fit_linear_head(HeadArguments<double>, cudaStream_t);  // compiled in double.cu

}  // namespace ffw::cuda

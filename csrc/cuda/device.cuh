// What all CUDA kernels share: 16-byte packs of elements in memory, uniform numbers, sums over a warp or a block, and
// the launch. No PyTorch. The same text compiles under nvcc and, for tests without a GPU, under a plain C++ compiler
// that was given an emulation header first, which defines FFW_EMULATION and the words of CUDA that are used here.
#pragma once

#include <cstddef>
#include <type_traits>

#include "../gate.h"

#if !defined(FFW_EMULATION)

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_pipeline.h>
#include <cuda_runtime.h>

#include <stdexcept>
#include <string>

// All shared memory is dynamic: a kernel names it once and the launch says how many bytes there are.
#define FFW_SHARED(T, name)                                             \
  extern __shared__ __align__(16) unsigned char ffw_shared_memory[];    \
  T* const name = reinterpret_cast<T*>(ffw_shared_memory)

#define FFW_LAUNCH(kernel, blocks, threads, shared, stream, ...)                            \
  do {                                                                                      \
    (kernel)<<<static_cast<unsigned>(blocks), threads, shared, stream>>>(__VA_ARGS__);      \
    ffw::cuda::check_cuda(cudaGetLastError());                                              \
  } while (false)

// As FFW_LAUNCH, but all blocks run at the same time, so that they may wait for one another.
#define FFW_LAUNCH_TOGETHER(kernel, blocks, threads, shared, stream, ...)                        \
  do {                                                                                           \
    cudaLaunchAttribute together;                                                                \
    together.id = cudaLaunchAttributeCooperative;                                                \
    together.val.cooperative = 1;                                                                \
    cudaLaunchConfig_t config = {};                                                              \
    config.gridDim = dim3(static_cast<unsigned>(blocks));                                        \
    config.blockDim = dim3(threads);                                                             \
    config.dynamicSmemBytes = shared;                                                            \
    config.stream = stream;                                                                      \
    config.attrs = &together;                                                                    \
    config.numAttrs = 1;                                                                         \
    ffw::cuda::check_cuda(cudaLaunchKernelEx(&config, kernel, __VA_ARGS__));                     \
  } while (false)

namespace ffw::cuda {

inline void check_cuda(cudaError_t status) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // or the check behind the next launch, which has nothing to do with this, would find it again
  throw std::runtime_error(std::string("CUDA error: ") + cudaGetErrorString(status));
}

// Bytes of shared memory that one block may ask for on the current device.
inline size_t largest_shared_memory() {
  int device = 0, bytes = 0;
  check_cuda(cudaGetDevice(&device));
  check_cuda(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return static_cast<size_t>(bytes);
}

// Of more than what every kernel may have without being asked.
template <typename Kernel>
void allow_shared_memory(Kernel kernel, size_t bytes) {
  if (bytes <= 48 * 1024) return;
  check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(bytes)));
}

// A copy of 4, 8 or 16 bytes from global to shared memory, both addresses multiples of that. It goes on by itself: the
// thread sees it after wait_for_copies(), other threads after a barrier behind that.
template <int bytes>
__device__ __forceinline__ void copy_async(void* shared, const void* global) {
  __pipeline_memcpy_async(shared, global, bytes);
}

__device__ __forceinline__ void wait_for_copies() {
  __pipeline_commit();
  __pipeline_wait_prior(0);
}

}  // namespace ffw::cuda

#endif

namespace ffw::cuda {

constexpr unsigned warp_size = 32;
constexpr unsigned all_lanes = 0xffffffffu;

// The precision that a stored type is computed with.
template <typename Stored>
struct WorkingType {
  using type = float;
};
template <>
struct WorkingType<double> {
  using type = double;
};
template <typename Stored>
using Working = typename WorkingType<Stored>::type;

__device__ __forceinline__ float widen(float x) { return x; }
__device__ __forceinline__ double widen(double x) { return x; }
__device__ __forceinline__ float widen(__half x) { return __half2float(x); }
__device__ __forceinline__ float widen(__nv_bfloat16 x) { return __bfloat162float(x); }

// To the stored type, to the nearest, ties to even.
__device__ __forceinline__ void narrow(float x, float& out) { out = x; }
__device__ __forceinline__ void narrow(double x, double& out) { out = x; }
__device__ __forceinline__ void narrow(float x, __half& out) { out = __float2half_rn(x); }
__device__ __forceinline__ void narrow(float x, __nv_bfloat16& out) { out = __float2bfloat16_rn(x); }

// Elementwise kernels -----------------------------------------------------------------------------------------------
// A thread takes `group` consecutive elements at a time: 16 bytes of the narrowest array, and whole blocks of four
// uniform numbers.

constexpr unsigned elementwise_threads = 256;
constexpr int64_t largest_elementwise_grid = 2048;  // more elements are walked through by the same blocks

template <typename Weight>
constexpr int group_of = sizeof(Weight) == 2 ? 8 : 4;

// A function of the number of elements alone, so that sums over blocks are the same on every device.
inline int64_t elementwise_blocks(int64_t count, int group) {
  const int64_t a_block = static_cast<int64_t>(elementwise_threads) * group;
  const int64_t blocks = (count + a_block - 1) / a_block;
  return blocks < largest_elementwise_grid ? blocks : largest_elementwise_grid;
}

template <typename Stored, int n>
struct alignas(16) Pack {
  Stored value[n];
};

// The elements start .. start + n of an array. `whole`: all of them exist and the array begins at a multiple of
// 16 bytes, so they come by 16-byte loads. Else those below `count` come one by one, and zeros for the others.
template <int n, typename Stored, typename T>
__device__ __forceinline__ void load(const Stored* array, int64_t start, int64_t count, bool whole, T (&out)[n]) {
  constexpr int a_pack = 16 / sizeof(Stored);
  if (whole) {
#pragma unroll
    for (int first = 0; first < n; first += a_pack) {
      const auto pack = *reinterpret_cast<const Pack<Stored, a_pack>*>(array + start + first);
#pragma unroll
      for (int i = 0; i < a_pack; ++i) out[first + i] = widen(pack.value[i]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) out[i] = start + i < count ? widen(array[start + i]) : T(0);
  }
}

template <int n, typename Stored, typename T>
__device__ __forceinline__ void store(Stored* array, int64_t start, int64_t count, bool whole, const T (&values)[n]) {
  constexpr int a_pack = 16 / sizeof(Stored);
  if (whole) {
#pragma unroll
    for (int first = 0; first < n; first += a_pack) {
      Pack<Stored, a_pack> pack;
#pragma unroll
      for (int i = 0; i < a_pack; ++i) narrow(values[first + i], pack.value[i]);
      *reinterpret_cast<Pack<Stored, a_pack>*>(array + start + first) = pack;
    }
  } else {
#pragma unroll
    for (int i = 0; i < n; ++i) {
      if (start + i < count) narrow(values[i], array[start + i]);
    }
  }
}

inline bool on_16_bytes(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

__device__ __forceinline__ Draw load_draw(const int64_t* draw) { return {draw[0], draw[1], draw[2]}; }

// The uniform numbers of the elements start .. start + n, start a multiple of 4; zeros for kinds that read none.
template <Kind kind, int n, typename T>
__device__ __forceinline__ void uniforms(const Draw& draw, int64_t start, T (&out)[n]) {
#pragma unroll
  for (int quad = 0; quad < n / 4; ++quad) {
    if constexpr (is_random(kind)) {
      const Words words = philox4x32(philox_block(draw, start / 4 + quad), draw.number, draw.seed);
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * quad + i] = uniform_of_word(words.word[i]);
    } else {
#pragma unroll
      for (int i = 0; i < 4; ++i) out[4 * quad + i] = T(0);
    }
  }
}

// Calls run(std::integral_constant<Kind, kind>) for a kind that is known at run time only.
template <typename Run>
void for_kind(Kind kind, const Run& run) {
  switch (kind) {
    case Kind::ffw: return run(std::integral_constant<Kind, Kind::ffw>());
    case Kind::hard: return run(std::integral_constant<Kind, Kind::hard>());
    case Kind::bernoulli: return run(std::integral_constant<Kind, Kind::bernoulli>());
    case Kind::concrete: return run(std::integral_constant<Kind, Kind::concrete>());
  }
}

// Sums --------------------------------------------------------------------------------------------------------------

// The sum of term(i) over 0 .. count, by one thread. Sums of parts lose less by rounding than one long sum.
template <typename T, typename Term>
__device__ __forceinline__ T sum_in_parts(int count, const Term& term) {
  constexpr int part = 8;
  T sum = 0;
  for (int begin = 0; begin < count; begin += part) {
    const int end = count - begin < part ? count : begin + part;
    T part_sum = 0;
#pragma unroll 2
    for (int i = begin; i < end; ++i) part_sum += term(i);
    sum += part_sum;
  }
  return sum;
}

// The sum over the lanes of a warp, in every lane.
template <typename T>
__device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) x += __shfl_xor_sync(all_lanes, x, distance);
  return x;
}

// The sum over a warp's threads for sum_of_warps, which comes after a barrier. `a_warp`: shared, one entry a warp.
template <typename T>
__device__ __forceinline__ void keep_warp_sum(T x, T* a_warp) {
  x = warp_sum(x);
  if (threadIdx.x % warp_size == 0) a_warp[threadIdx.x / warp_size] = x;
}

// By a whole warp, in every lane of it.
template <typename T>
__device__ __forceinline__ T sum_of_warps(const T* a_warp) {
  const unsigned lane = threadIdx.x % warp_size;
  return warp_sum(lane < blockDim.x / warp_size ? a_warp[lane] : T(0));
}

// The sum over the threads of a block, in thread 0, always in the same order.
template <typename T>
__device__ __forceinline__ T block_sum(T x, T* a_warp) {
  keep_warp_sum(x, a_warp);
  __syncthreads();
  return threadIdx.x < warp_size ? sum_of_warps(a_warp) : T(0);
}

// Softmax -----------------------------------------------------------------------------------------------------------

template <typename T>
__device__ __forceinline__ T larger(T a, T b) {
  return a > b ? a : b;
}

template <typename Logit>
__device__ __forceinline__ Working<Logit> largest_of(const Logit* logits, int classes) {
  Working<Logit> largest = widen(logits[0]);
  for (int c = 1; c < classes; ++c) largest = larger(largest, widen(logits[c]));
  return largest;
}

// The exponentials of a row of logits relative to its largest, and their sum; `out` may be the row itself.
template <typename Logit, typename T>
__device__ __forceinline__ T exponentials(const Logit* logits, int classes, T largest, T* out) {
  return sum_in_parts<T>(classes, [&](int c) { return out[c] = decay(widen(logits[c]) - largest); });
}

// softmax(logits) * scale - (hit, of the label), which is a sample's probabilities or, if hit = scale, its errors;
// returns the cross-entropy. All are NaN for a label out of range: a kernel cannot raise. `out` may be the logits.
template <typename Logit, typename T>
__device__ __forceinline__ T softmax_row(const Logit* logits, int classes, int64_t label, T scale, T hit, T* out) {
  const bool valid = label >= 0 && label < classes;
  const T largest = largest_of(logits, classes), picked = widen(logits[valid ? label : 0]) - largest;
  const T sum = exponentials(logits, classes, largest, out);
  const T factor = valid ? quotient(scale, sum) : static_cast<T>(NAN);
  for (int c = 0; c < classes; ++c) out[c] = out[c] * factor - (c == label ? hit : T(0));
  return valid ? logarithm(sum) - picked : static_cast<T>(NAN);
}

}  // namespace ffw::cuda

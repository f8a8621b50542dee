// What all CPU operators do with tensors before the loops run: checks of memory that is at hand, and 16-bit storage.
// PyTorch is used through its stable ABI only.
#pragma once

#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "../checks.h"
#include "../memory.h"
#include "loops.h"

namespace ffw::cpu {

// Checks ------------------------------------------------------------------------------------------------------------

void check_on_cpu(std::initializer_list<const Tensor*> tensors);
float checked_temperature(const Tensor& temperature);
Draw checked_draw(const Tensor& draw);
double checked_scalar(const char* name, const Tensor& tensor);
// Of contiguous int64 numbers that all are in [0, end).
const int64_t* checked_indices(const char* name, const Tensor& indices, int64_t end);

// Memory ------------------------------------------------------------------------------------------------------------

// A tensor's dense memory, read and written a block at a time in the precision that is computed with: float for
// 16-bit storage, else its own.
class Array {
 public:
  explicit Array(const Tensor& tensor)
      : data_(static_cast<char*>(tensor.data_ptr())), dtype_(tensor.scalar_type()) {}

  // The elements start .. start + n: in place where that is possible, else widened into the buffer.
  template <typename T>
  const T* read(int64_t start, int64_t n, T* buffer) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_half(dtype_)) {
        const Conversions& convert = instruction_set().conversions;
        (dtype_ == ScalarType::Half ? convert.widen_half : convert.widen_bfloat16)(halves(start), buffer, n);
        return buffer;
      }
    }
    return reinterpret_cast<const T*>(data_) + start;
  }

  // As read(), for elements that will be written: follow with write().
  template <typename T>
  T* update(int64_t start, int64_t n, T* buffer) const {
    return const_cast<T*>(read(start, n, buffer));
  }

  // Where to compute elements whose old values do not matter: follow with write().
  template <typename T>
  T* target(int64_t start, T* buffer) const {
    return is_half(dtype_) ? buffer : reinterpret_cast<T*>(data_) + start;
  }

  // Stores what update() or target() had given out.
  template <typename T>
  void write(int64_t start, int64_t n, const T* values) const {
    if constexpr (sizeof(T) == sizeof(float)) {
      if (is_half(dtype_)) {
        const Conversions& convert = instruction_set().conversions;
        (dtype_ == ScalarType::Half ? convert.narrow_half : convert.narrow_bfloat16)(values, halves(start), n);
      }
    }
  }

 private:
  uint16_t* halves(int64_t start) const { return reinterpret_cast<uint16_t*>(data_) + start; }

  char* data_;
  ScalarType dtype_;
};

// Threads -----------------------------------------------------------------------------------------------------------

constexpr int64_t blocks_a_thread = 16;  // fewer are not worth waking another thread for

// run(start, n) for every block of `count` elements, on all threads. Which thread runs a block changes nothing.
template <typename F>
void for_each_block(int64_t count, const F& run) {
  const int64_t blocks = (count + block_size - 1) / block_size;
  torch::stable::parallel_for(0, blocks, blocks_a_thread, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block) {
      const int64_t start = block * block_size;
      run(start, count - start < block_size ? count - start : block_size);
    }
  });
}

}  // namespace ffw::cpu

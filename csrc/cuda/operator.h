// What all CUDA operators do with tensors before they launch: checks, the device and its current stream. PyTorch
// is used through its stable ABI only. Nothing here reads device memory or waits for the device, so every operator can
// be captured in a CUDA graph.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <initializer_list>

#include "../checks.h"
#include "../memory.h"
#include "device.cuh"

#if !defined(FFW_OPERATORS)  // an emulation registers its operators elsewhere
#define FFW_OPERATORS(m) STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CUDA, m)
#endif

namespace ffw::cuda {

// Checks ------------------------------------------------------------------------------------------------------------

inline void check_gates(const Tensor& weight, const Tensor& scores, const Tensor& temperature, const Tensor& draw) {
  check_pair(weight, scores);
  check_temperature(temperature);
  check_draw(draw);
}

inline int checked_size(const char* name, int64_t size) {
  check_value(size >= 0 && size < (int64_t{1} << 30), name, " must be below 2**30, got ", size);
  return static_cast<int>(size);
}

inline void check_information_classes(int64_t classes) {
  check_value(classes <= 4096, "mutual information of at most 4096 classes, got ", classes);
}

// The device --------------------------------------------------------------------------------------------------------

// Makes the tensors' device the current one while it lives; `stream` is the one PyTorch works on there.
#if defined(FFW_EMULATION)
struct OnDevice {
  explicit OnDevice(std::initializer_list<const Tensor*>) {}
  cudaStream_t stream = nullptr;
};
#else
class OnDevice {
 public:
  explicit OnDevice(std::initializer_list<const Tensor*> tensors) : guard_(checked_device(tensors)) {
    void* current = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(checked_device(tensors), &current));
    stream = static_cast<cudaStream_t>(current);
  }
  cudaStream_t stream;

 private:
  static int32_t checked_device(std::initializer_list<const Tensor*> tensors) {
    const int32_t device = (*tensors.begin())->get_device_index();
    for (const Tensor* tensor : tensors) {
      check_type(tensor->is_cuda() && tensor->get_device_index() == device, "expected all tensors on cuda:", device);
    }
    return device;
  }
  torch::stable::accelerator::DeviceGuard guard_;
};
#endif

// Memory ------------------------------------------------------------------------------------------------------------

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls run(Weight(), Score()) with the stored types of weights beside working scores.
template <typename Run>
void for_dtype(ScalarType weight, const Run& run) {
  switch (weight) {
    case ScalarType::Float: return run(float(), float());
    case ScalarType::Half: return run(__half(), float());
    case ScalarType::BFloat16: return run(__nv_bfloat16(), float());
    default: return run(double(), double());
  }
}

}  // namespace ffw::cuda

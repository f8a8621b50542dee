// fft_conv2d and fft_conv2d_backward: the steps of an FFT convolution, their memory and their threads. The
// equations stand in fft_conv.h, the loops in fft_conv.inl.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <memory>
#include <new>
#include <optional>
#include <tuple>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "fft_conv.h"
#include "fft_conv_geometry.h"
#include "tensors.h"

namespace ffw::cpu {
namespace {

constexpr int64_t largest_kernel = 11;
constexpr int64_t largest_image = 240;
constexpr int64_t batch_chunk = 128;  // images at a time where their spectrum is not kept: bounds the memory

const FftLoops& fft_loops() {
#if FFW_HAS_X86_LOOPS
  if (&instruction_set() == &avx512) return fft_avx512;
  if (&instruction_set() == &avx2) return fft_avx2;
#endif
  return fft_baseline;
}

// Memory ----------------------------------------------------------------------------------------------------

constexpr size_t large_page = size_t(2) << 20;
constexpr uintptr_t small_page = 4096;

// Transforms touch a page or more at each step, and fresh small pages cost more than what is computed into
// them. A hint: it changes nothing but speed.
void prefer_large_pages([[maybe_unused]] void* memory, [[maybe_unused]] size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  if (bytes < large_page) return;
  const uintptr_t start = reinterpret_cast<uintptr_t>(memory);
  const uintptr_t begin = (start + small_page - 1) / small_page * small_page;
  const uintptr_t end = (start + bytes) / small_page * small_page;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#endif
}

struct Free {
  void operator()(void* memory) const { std::free(memory); }
};

// Scratch memory that a thread keeps from call to call: the kernel clears fresh memory at the price of a
// transform.
class Workspace {
 public:
  // Uninitialised; what was reserved before is lost.
  float* reserve(int64_t floats) {
    const size_t bytes = (static_cast<size_t>(floats) * sizeof(float) / large_page + 1) * large_page;
    if (bytes > size_) {
      memory_.reset();
      size_ = 0;
      memory_.reset(std::aligned_alloc(large_page, bytes));
      if (memory_ == nullptr) throw std::bad_alloc();
      size_ = bytes;
      prefer_large_pages(memory_.get(), bytes);
    }
    return static_cast<float*>(memory_.get());
  }

 private:
  std::unique_ptr<void, Free> memory_;
  size_t size_ = 0;
};

thread_local Workspace spectra_workspace;  // of the thread that calls the operator
thread_local Workspace loop_workspace;     // of each thread that runs its loops

// aten::new_empty_strided, for which the stable headers have no function.
Tensor new_empty_strided(const Tensor& like, const std::vector<int64_t>& sizes,
                         const std::vector<int64_t>& strides) {
  using torch::headeronly::IntHeaderOnlyArrayRef;
  using torch::stable::detail::from;
  std::array<StableIValue, 7> stack = {from(like),
                                       from(IntHeaderOnlyArrayRef(sizes)),
                                       from(IntHeaderOnlyArrayRef(strides)),
                                       from(std::nullopt),
                                       from(std::nullopt),
                                       from(std::nullopt),
                                       from(std::nullopt)};
  TORCH_ERROR_CODE_CHECK(
      torch_call_dispatcher("aten::new_empty_strided", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// [images, channels, height, width] in memory order CHWN. No view of another tensor, so that what follows may
// overwrite it.
Tensor new_batch_innermost(const Tensor& like, int64_t images, int64_t channels, const Geometry& g) {
  const int64_t row = g.width * images;
  Tensor tensor =
      new_empty_strided(like, {images, channels, g.height, g.width}, {1, g.height * row, row, images});
  prefer_large_pages(tensor.data_ptr(), tensor.numel() * sizeof(float));
  return tensor;
}

// Steps -----------------------------------------------------------------------------------------------------
// Work is split by entries or by frequencies, none of which reads another's result: no number depends on the
// threads.

void transform(const Arrays& arrays, const Spectrum& spectrum, int64_t frequencies) {
  const FftLoops& loop = fft_loops();
  torch::stable::parallel_for(0, spectrum.entries / (2 * loop.lanes), 1, [&](int64_t first, int64_t last) {
    loop.forward(arrays, spectrum, first, last, loop_workspace.reserve(loop.transform_scratch(arrays)));
  });
  for (int64_t frequency = 1; frequency <= frequencies; ++frequency) {
    float* const end = spectrum.data + frequency * spectrum.frequency_stride;
    std::fill(end - frequency_gap, end, 0.0f);
  }
}

void transform_back(const Spectrum& spectrum, const Arrays& arrays, float scale, const float* bias) {
  const FftLoops& loop = fft_loops();
  torch::stable::parallel_for(0, spectrum.entries / (2 * loop.lanes), 1, [&](int64_t first, int64_t last) {
    float* const scratch = loop_workspace.reserve(loop.transform_scratch(arrays));
    loop.inverse(spectrum, arrays, scale, bias, first, last, scratch);
  });
}

void multiply(const Product& product, int64_t frequencies) {
  if (product.columns == 0) return;
  const FftLoops& loop = fft_loops();
  torch::stable::parallel_for(0, frequencies, 1, [&](int64_t first, int64_t last) {
    loop.multiply(product, first, last, loop_workspace.reserve(loop.multiply_scratch(product)));
  });
}

// Zeros in the entries from `first` on, in every frequency: what is left there would reach, through rounding,
// the entry that it is transformed together with.
void clear_padding(const Spectrum& spectrum, int64_t first, int64_t frequencies) {
  for (int64_t frequency = 0; frequency < frequencies; ++frequency) {
    float* const re = spectrum.data + frequency * spectrum.frequency_stride;
    float* const im = re + spectrum.entries;
    std::fill(re + first, im, 0.0f);
    std::fill(im + first, im + spectrum.entries, 0.0f);
  }
}

// Images in whole vectors; the rest of a channel's padding is read by no one.
int64_t used_batch(int64_t images) {
  const int64_t lanes = fft_loops().lanes;
  return (images + lanes - 1) / lanes * lanes;
}

// y^ = w^ x^
Product output_product(const Geometry& g, const Spectrum& w, const Spectrum& x, const Spectrum& y,
                       int64_t images) {
  const int64_t row = Geometry::padded_batch(images);
  return {g.outputs, g.inputs, used_batch(images), {w, g.inputs, 1, false}, {x, row, 1, false}, y, row};
}

// dx^ = w^* dy^
Product input_product(const Geometry& g, const Spectrum& w, const Spectrum& dy, const Spectrum& dx,
                      int64_t images) {
  const int64_t row = Geometry::padded_batch(images);
  return {g.inputs, g.outputs, used_batch(images), {w, 1, g.inputs, true}, {dy, row, 1, false}, dx, row};
}

// dw^ = dy^ x^*
Product weight_product(const Geometry& g, const Spectrum& dy, const Spectrum& x, const Spectrum& dw,
                       int64_t images) {
  const int64_t row = Geometry::padded_batch(images);
  return {g.outputs, images, g.inputs, {dy, row, 1, false}, {x, 1, row, true}, dw, g.inputs};
}

// Checks ----------------------------------------------------------------------------------------------------

void check_float(const char* name, const Tensor& tensor) {
  check_type(tensor.scalar_type() == ScalarType::Float, name, " must be torch.float32, got ",
             dtype_text(tensor.scalar_type()));
}

void check_weight(const Tensor& weight) {
  check_value(weight.dim() == 4 && weight.size(0) > 0 && weight.size(1) > 0,
              "weight must be (outputs, inputs, height, width), got ", shape_text(weight));
  check_float("weight", weight);
  for (const int64_t size : {weight.size(2), weight.size(3)}) {
    check_value(size % 2 == 1 && size <= largest_kernel, "kernel sizes must be odd and at most ",
                largest_kernel, ", got a weight ", shape_text(weight));
  }
}

void check_images(const char* name, const Tensor& images, const Tensor& weight, int64_t channels) {
  check_value(images.dim() == 4 && images.size(1) == channels && images.size(2) > 0 && images.size(3) > 0,
              name, " must be (images, ", channels, ", height, width) for a weight ", shape_text(weight),
              ", got ", shape_text(images));
  check_float(name, images);
  for (const int64_t size : {images.size(2), images.size(3)}) {
    check_value(size <= largest_image, name, " must be at most ", largest_image,
                " pixels high and wide, got ", shape_text(images));
  }
}

void check_bias(const Tensor& bias, const Tensor& weight) {
  check_on_cpu({&bias});
  check_value(bias.dim() == 1 && bias.size(0) == weight.size(0), "bias must have shape (", weight.size(0),
              ",), got ", shape_text(bias));
  check_float("bias", bias);
}

float* checked_spectrum(const char* name, const Tensor& spectrum, int64_t size) {
  check_on_cpu({&spectrum});
  check_float(name, spectrum);
  check_value(spectrum.dim() == 1 && spectrum.size(0) == size && spectrum.is_contiguous(), name,
              " must have shape (", size, ",), got ", shape_text(spectrum));
  float* const data = static_cast<float*>(spectrum.data_ptr());
  prefer_large_pages(data, size * sizeof(float));
  return data;
}

// Operators -------------------------------------------------------------------------------------------------

Tensor fft_conv2d(Tensor x, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> x_spectrum,
                  std::optional<Tensor> weight_spectrum) {
  check_on_cpu({&x, &weight});
  check_weight(weight);
  check_images("x", x, weight, weight.size(1));
  if (bias.has_value()) {
    check_bias(*bias, weight);
    bias = made_contiguous(*bias);
  }
  weight = made_contiguous(weight);
  const Geometry g(x.size(2), x.size(3), weight);
  const int64_t images = x.size(0), chunk = x_spectrum.has_value() ? images : std::min(images, batch_chunk);
  const int64_t x_size = g.spectrum_size(Geometry::image_entries(g.inputs, chunk));
  const int64_t y_size = g.spectrum_size(Geometry::image_entries(g.outputs, chunk));
  const int64_t weight_size = g.spectrum_size(g.kernel_entries());

  float* const y_data = spectra_workspace.reserve(y_size + x_size + weight_size);
  float* const x_data = x_spectrum ? checked_spectrum("x_spectrum", *x_spectrum, x_size) : y_data + y_size;
  float* const weight_data = weight_spectrum
                                 ? checked_spectrum("weight_spectrum", *weight_spectrum, weight_size)
                                 : y_data + y_size + x_size;
  const float* const bias_data = bias ? static_cast<const float*>(bias->data_ptr()) : nullptr;
  const Spectrum w = Geometry::spectrum(weight_data, g.kernel_entries());
  transform(g.kernel_arrays(weight), w, g.frequencies());
  Tensor y = new_batch_innermost(x, images, g.outputs, g);
  for (int64_t first = 0; first < images; first += chunk) {
    const int64_t count = std::min(chunk, images - first);
    const Spectrum x_hat = Geometry::spectrum(x_data, Geometry::image_entries(g.inputs, count));
    const Spectrum y_hat = Geometry::spectrum(y_data, Geometry::image_entries(g.outputs, count));
    transform(g.image_arrays(x, first, count), x_hat, g.frequencies());
    multiply(output_product(g, w, x_hat, y_hat, count), g.frequencies());
    transform_back(y_hat, g.image_arrays(y, first, count), g.scale(), bias_data);
  }
  return y;
}

using Gradients = std::tuple<Tensor, Tensor>;

// The gradient of x takes the weight's spectrum, that of the weight x's: one that is not given is not wanted.
Gradients fft_conv2d_backward(Tensor grad, Tensor weight, std::optional<Tensor> x_spectrum,
                              std::optional<Tensor> weight_spectrum) {
  check_on_cpu({&grad, &weight});
  check_weight(weight);
  check_images("grad", grad, weight, weight.size(0));
  const Geometry g(grad.size(2), grad.size(3), weight);
  const int64_t images = grad.size(0), frequencies = g.frequencies();
  const int64_t x_entries = Geometry::image_entries(g.inputs, images), w_entries = g.kernel_entries();
  const int64_t x_size = g.spectrum_size(x_entries), w_size = g.spectrum_size(w_entries);
  const int64_t dy_entries = Geometry::image_entries(g.outputs, images),
                dy_size = g.spectrum_size(dy_entries);
  Tensor dx = new_batch_innermost(grad, weight_spectrum ? images : 0, g.inputs, g);
  const std::vector<int64_t> sizes = {x_spectrum ? g.outputs : 0, g.inputs, g.kernel_height, g.kernel_width};
  Tensor dw = torch::stable::new_empty(weight, sizes);

  // One result at a time, in the same memory.
  float* const dy_data =
      spectra_workspace.reserve(dy_size + std::max(weight_spectrum ? x_size : 0, x_spectrum ? w_size : 0));
  const Spectrum dy_hat = Geometry::spectrum(dy_data, dy_entries);
  transform(g.image_arrays(grad, 0, images), dy_hat, frequencies);
  if (weight_spectrum) {
    float* const w_data = checked_spectrum("weight_spectrum", *weight_spectrum, w_size);
    const Spectrum dx_hat = Geometry::spectrum(dy_data + dy_size, x_entries);
    multiply(input_product(g, Geometry::spectrum(w_data, w_entries), dy_hat, dx_hat, images), frequencies);
    transform_back(dx_hat, g.image_arrays(dx, 0, images), g.scale(), nullptr);
  }
  if (x_spectrum) {
    float* const x_data = checked_spectrum("x_spectrum", *x_spectrum, x_size);
    const Spectrum dw_hat = Geometry::spectrum(dy_data + dy_size, w_entries);
    clear_padding(dw_hat, g.outputs * g.inputs, frequencies);
    multiply(weight_product(g, dy_hat, Geometry::spectrum(x_data, x_entries), dw_hat, images), frequencies);
    transform_back(dw_hat, g.kernel_arrays(dw), g.scale(), nullptr);
  }
  return {dx, dw};
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) {
  m.impl("fft_conv2d", TORCH_BOX(&ffw::cpu::fft_conv2d));
  m.impl("fft_conv2d_backward", TORCH_BOX(&ffw::cpu::fft_conv2d_backward));
}

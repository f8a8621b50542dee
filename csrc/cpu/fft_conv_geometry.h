// All about one FFT convolution that follows from its shapes: transform lengths and passes, and where arrays
// and spectra lie.
#pragma once

#include <cstdint>
#include <vector>

#include "fft_conv.h"
#include "tensors.h"

namespace ffw::cpu {

// A transform of one length: its passes and their twiddle factors.
class Transform {
 public:
  explicit Transform(int64_t length);

  // The shortest length from `least` on that is a product of 2, 3 and 5.
  static int64_t good_length(int64_t least);

  int64_t length() const { return length_; }
  // Element i of `count` at position (first + step i) mod length, no element from position `extent` on.
  Axis axis(int64_t count, int64_t first, int64_t step, int64_t extent) const;

 private:
  void add_pass(int64_t radix, int64_t rest);

  int64_t length_;
  std::vector<int64_t> radix_;
  std::vector<std::vector<float>> twiddles_;
};

class Geometry {
 public:
  // Of images height x width and a weight (outputs, inputs, kernel height, kernel width).
  Geometry(int64_t height, int64_t width, const Tensor& weight);

  // How many frequencies are kept: of f and -f one.
  int64_t frequencies() const;

  // `images` images from `first` on of a tensor (N, channels, height, width) of any strides.
  Arrays image_arrays(const Tensor& tensor, int64_t first, int64_t images) const;
  // The kernels of a contiguous weight: tap t at position k / 2 - t.
  Arrays kernel_arrays(const Tensor& weight) const;

  static int64_t padded_batch(int64_t images);
  static int64_t image_entries(int64_t channels, int64_t images);
  int64_t kernel_entries() const;

  // Floats of a whole spectrum of so many entries.
  int64_t spectrum_size(int64_t entries) const;
  static Spectrum spectrum(float* data, int64_t entries);

  // What an inverse transform of a product is multiplied by: two spectra are twice too large, and the
  // transforms themselves multiply by the number of frequencies.
  float scale() const;

  const int64_t height, width, outputs, inputs, kernel_height, kernel_width;

 private:
  Transform rows_, columns_;
};

}  // namespace ffw::cpu

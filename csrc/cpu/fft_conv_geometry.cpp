// Transform lengths, twiddle factors and memory layout of the FFT convolution: see fft_conv_geometry.h.
#include "fft_conv_geometry.h"

#include <algorithm>
#include <cmath>

namespace ffw::cpu {
namespace {

constexpr double pi = 3.14159265358979323846;

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// From one frequency to the next is an odd number of cache lines, so that the frequencies of one entry, which
// a transform writes together, spread over the whole cache.
int64_t frequency_stride(int64_t entries) { return 2 * entries + frequency_gap; }

int64_t transform_length(int64_t size, int64_t kernel) {
  return Transform::good_length(std::max(size + kernel / 2, kernel));  // the kernel itself must fit, too
}

// Few passes; the powers of two last, for the last pass has no twiddle factors and is best a large one.
int64_t next_radix(int64_t rest) {
  for (const int64_t radix : {5, 3}) {
    if (rest % radix == 0) return radix;
  }
  int64_t twos = 0;
  while ((rest >> twos) % 2 == 0) ++twos;
  if (twos % 3 == 0) return 8;
  return twos == 1 ? 2 : 4;
}

}  // namespace

Transform::Transform(int64_t length) : length_(length) {
  for (int64_t rest = length; rest > 1; rest /= radix_.back()) add_pass(next_radix(rest), rest);
}

void Transform::add_pass(int64_t radix, int64_t rest) {
  std::vector<float> factors;
  for (int64_t p = 0; p < rest / radix; ++p) {
    for (int64_t j = 1; j < radix; ++j) {
      const double angle = -2 * pi * static_cast<double>(p * j % rest) / static_cast<double>(rest);
      factors.push_back(static_cast<float>(std::cos(angle)));
      factors.push_back(static_cast<float>(std::sin(angle)));
    }
  }
  radix_.push_back(radix);
  twiddles_.push_back(std::move(factors));
}

int64_t Transform::good_length(int64_t least) {
  for (int64_t length = std::max<int64_t>(2, least);; ++length) {
    int64_t rest = length;
    for (const int64_t prime : {2, 3, 5}) {
      while (rest % prime == 0) rest /= prime;
    }
    if (rest == 1) return length;
  }
}

Axis Transform::axis(int64_t count, int64_t first, int64_t step, int64_t extent) const {
  Axis axis = {length_, count, first, step, extent, static_cast<int64_t>(radix_.size()), {}, {}};
  for (size_t i = 0; i < radix_.size(); ++i) {
    axis.radix[i] = radix_[i];
    axis.twiddles[i] = twiddles_[i].data();
  }
  return axis;
}

Geometry::Geometry(int64_t image_height, int64_t image_width, const Tensor& weight)
    : height(image_height),
      width(image_width),
      outputs(weight.size(0)),
      inputs(weight.size(1)),
      kernel_height(weight.size(2)),
      kernel_width(weight.size(3)),
      rows_(transform_length(height, kernel_height)),
      columns_(transform_length(width, kernel_width)) {}

int64_t Geometry::frequencies() const {
  const int64_t y = rows_.length(), x = columns_.length();
  const int64_t self_conjugate = (y % 2 == 0 ? 2 : 1) * (x % 2 == 0 ? 2 : 1);
  return (y * x + self_conjugate) / 2;
}

Arrays Geometry::image_arrays(const Tensor& tensor, int64_t first, int64_t images) const {
  Arrays arrays;
  arrays.data = static_cast<float*>(tensor.data_ptr()) + first * tensor.stride(0);
  arrays.groups = tensor.size(1);
  arrays.group_size = images;
  arrays.padded_size = padded_batch(images);
  arrays.group_stride = tensor.stride(1);
  arrays.entry_stride = tensor.stride(0);
  arrays.row_stride = tensor.stride(2);
  arrays.column_stride = tensor.stride(3);
  arrays.rows = rows_.axis(height, 0, 1, height);
  arrays.columns = columns_.axis(width, 0, 1, width);
  return arrays;
}

Arrays Geometry::kernel_arrays(const Tensor& weight) const {
  Arrays arrays;
  arrays.data = static_cast<float*>(weight.data_ptr());
  arrays.groups = 1;
  arrays.group_size = outputs * inputs;
  arrays.padded_size = kernel_entries();
  arrays.group_stride = 0;
  arrays.entry_stride = kernel_height * kernel_width;
  arrays.row_stride = kernel_width;
  arrays.column_stride = 1;
  arrays.rows = rows_.axis(kernel_height, kernel_height / 2, -1, rows_.length());
  arrays.columns = columns_.axis(kernel_width, kernel_width / 2, -1, columns_.length());
  return arrays;
}

int64_t Geometry::padded_batch(int64_t images) { return round_up(images, batch_multiple); }

int64_t Geometry::image_entries(int64_t channels, int64_t images) {
  return round_up(channels * padded_batch(images), entry_multiple);
}

int64_t Geometry::kernel_entries() const { return round_up(outputs * inputs, entry_multiple); }

int64_t Geometry::spectrum_size(int64_t entries) const { return frequencies() * frequency_stride(entries); }

Spectrum Geometry::spectrum(float* data, int64_t entries) {
  return {data, entries, frequency_stride(entries)};
}

float Geometry::scale() const {
  return static_cast<float>(0.25 / static_cast<double>(rows_.length() * columns_.length()));
}

}  // namespace ffw::cpu

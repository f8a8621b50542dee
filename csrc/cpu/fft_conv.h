// FFT convolution on the CPU: what its operators (fft_conv.cpp) and the loops of each instruction set
// (fft_conv.inl) share.
//
// A stride-1 'same' convolution is a circular one of length L >= H + k / 2 in each dimension: what wraps
// around falls on outputs that nobody reads (the full result, of length H + k - 1, is needed only in its
// middle). In the spectrum it is one complex matrix product for each frequency f, with kernels w'[(k / 2 - t)
// mod L] = w[t]:
//
//   y^[f] = w^[f] x^[f]         (K x N) = (K x C) (C x N)
//   dx^[f] = w^[f]* dy^[f]      (C x N) = (K x C)* (K x N)
//   dw^[f] = dy^[f] x^[f]*      (K x C) = (K x N) (C x N)*
//
// Everything is vectorised over entries that a transform treats alike: images of one channel (memory order
// CHWN), or kernels. Two vectors of real arrays are transformed as one complex array, z = a + i b, and
// separated afterwards,
//   2 a^[f] = z^[f] + conj z^[-f],   2 b^[f] = (z^[f] - conj z^[-f]) / i,
// and of f and -f, whose values are conjugate, one is kept: half of the L_y L_x frequencies, and a few. The
// factor 2 is never divided out: the inverse transform's scale takes it up.
#pragma once

#include <cstdint>

#include "loops.h"

namespace ffw::cpu {

constexpr int64_t most_passes = 8;  // of a transform of up to 256 points
constexpr int64_t batch_multiple =
    16;  // a channel's images are padded to whole vectors of every instruction set
constexpr int64_t entry_multiple = 32;  // and all entries of a spectrum to whole pairs of vectors
constexpr int64_t frequency_gap = 16;   // floats between the entries of one frequency and the next

// How one dimension of an array lies in a transform: element i at position (first + step i) mod length.
struct Axis {
  int64_t length;  // of the transform
  int64_t count;   // of the array
  int64_t first, step;
  int64_t extent;  // positions from here on hold no element
  int64_t passes;  // Stockham passes of radix 2, 3, 4, 5 or 8 whose product is the length
  int64_t radix[most_passes];
  const float*
      twiddles[most_passes];  // of each pass: exp(-2 pi i p j / n), p major, j = 1 .. radix - 1, re and im
};

// A set of real arrays (rows x columns), for instance images: `groups` times `group_size` of them.
struct Arrays {
  float* data;
  int64_t groups, group_size, padded_size;  // entry e is array e % padded_size of group e / padded_size
  int64_t group_stride, entry_stride, row_stride, column_stride;
  Axis rows, columns;
};

// Their spectra: [frequency][re, im][entry], and a gap of zeros after each frequency. Frequencies (k_y, k_x)
// are ordered by k_x = 0 .. L_x / 2, then by k_y; where -k_x is k_x, only k_y = 0 .. L_y / 2 are kept.
struct Spectrum {
  float* data;
  int64_t entries;           // groups * padded_size, rounded up
  int64_t frequency_stride;  // floats from one frequency to the next
};

// out(m, n) = sum over r of a(m, r) b(r, n), complex, for each frequency.
struct Operand {
  Spectrum spectrum;
  int64_t row_stride, column_stride;  // of the entries
  bool conjugate;
};

struct Product {
  int64_t rows, depth, columns;  // extents of m, r, n
  Operand a, b;
  Spectrum out;
  int64_t out_row_stride;
};

struct FftLoops {
  int64_t lanes;
  // Spectra of the entries [2 lanes first, 2 lanes last).
  void (*forward)(const Arrays& arrays, const Spectrum& spectrum, int64_t first, int64_t last,
                  float* scratch);
  // The arrays of these entries: scale * inverse transform + bias[group].
  void (*inverse)(const Spectrum& spectrum, const Arrays& arrays, float scale, const float* bias,
                  int64_t first, int64_t last, float* scratch);
  // Floats of scratch memory that both need.
  int64_t (*transform_scratch)(const Arrays& arrays);

  // Products of the frequencies [first, last).
  void (*multiply)(const Product& product, int64_t first, int64_t last, float* scratch);
  int64_t (*multiply_scratch)(const Product& product);
};

extern const FftLoops fft_baseline;
#if FFW_HAS_X86_LOOPS
extern const FftLoops fft_avx2;
extern const FftLoops fft_avx512;
#endif

}  // namespace ffw::cpu

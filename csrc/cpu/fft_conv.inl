// The loops of the FFT convolution. Included once for each instruction set, by a file that defines what
// loops.inl asks for, and FFW_TILE_ROWS, the rows of a register tile of the matrix product. As there,
// everything is static or in FFW_ISA and the standard library is not used.

#if FFW_VECTOR_BYTES >= 32
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#define FFW_LOOP FFW_TARGET static
#define FFW_HELPER FFW_TARGET static inline __attribute__((always_inline))
#if defined(__clang__)
#define FFW_UNROLL _Pragma("unroll")
#else
#define FFW_UNROLL _Pragma("GCC unroll 16")  // keeps arrays of vectors in registers
#endif

namespace ffw::cpu {
namespace FFW_ISA {

// Vectors ---------------------------------------------------------------------------------------------------

constexpr int64_t lanes = FFW_VECTOR_BYTES / sizeof(float);
typedef float Vector __attribute__((vector_size(FFW_VECTOR_BYTES)));
typedef float Unaligned __attribute__((vector_size(FFW_VECTOR_BYTES), aligned(sizeof(float)), may_alias));

FFW_HELPER Vector load(const float* from) { return *reinterpret_cast<const Unaligned*>(from); }
FFW_HELPER void store(float* to, Vector value) { *reinterpret_cast<Unaligned*>(to) = value; }
FFW_HELPER Vector splat(float value) { return value - Vector{}; }

// a * b + c
FFW_HELPER Vector multiply_add(Vector a, Vector b, Vector c) {
#if FFW_VECTOR_BYTES == 64
  return reinterpret_cast<Vector>(_mm512_fmadd_ps(a, b, c));
#elif FFW_VECTOR_BYTES == 32
  return reinterpret_cast<Vector>(_mm256_fmadd_ps(a, b, c));
#elif defined(__aarch64__)
  return reinterpret_cast<Vector>(vfmaq_f32(c, a, b));
#else
  return a * b + c;
#endif
}

struct Complex {
  Vector re, im;
};

FFW_HELPER Complex operator+(Complex a, Complex b) { return {a.re + b.re, a.im + b.im}; }
FFW_HELPER Complex operator-(Complex a, Complex b) { return {a.re - b.re, a.im - b.im}; }
FFW_HELPER Complex by_minus_i(Complex a) { return {a.im, -a.re}; }
FFW_HELPER Complex scaled(Complex a, float factor) { return {a.re * factor, a.im * factor}; }
FFW_HELPER Complex plus_scaled(Complex a, Complex b, float factor) {
  return {multiply_add(splat(factor), b.re, a.re), multiply_add(splat(factor), b.im, a.im)};
}
FFW_HELPER Complex times(Complex a, float re, float im) {
  const Vector r = splat(re), i = splat(im);
  return {multiply_add(a.re, r, -(a.im * i)), multiply_add(a.im, r, a.re * i)};
}

// Transforms of one dimension -------------------------------------------------------------------------------

// Where a complex vector is: element i at re[i * stride] and im[i * stride]. With re and im exchanged, the
// same passes compute the inverse transform, because conj z = i times z with its parts exchanged.
struct View {
  float* re;
  float* im;
  int64_t stride;

  FFW_HELPER Complex get(const View& v, int64_t i) {
    return {load(v.re + i * v.stride), load(v.im + i * v.stride)};
  }
  FFW_HELPER void set(const View& v, int64_t i, Complex value) {
    store(v.re + i * v.stride, value.re);
    store(v.im + i * v.stride, value.im);
  }
};

FFW_HELPER View exchanged(const View& view) { return {view.im, view.re, view.stride}; }

template <int radix>
struct Butterfly;  // apply(x): the discrete Fourier transform of `radix` numbers, in place

template <>
struct Butterfly<2> {
  FFW_HELPER void apply(Complex* x) {
    const Complex a = x[0], b = x[1];
    x[0] = a + b;
    x[1] = a - b;
  }
};

template <>
struct Butterfly<3> {
  FFW_HELPER void apply(Complex* x) {
    constexpr float sine = 0.866025403784438646764f;  // of 2 pi / 3
    const Complex sum = x[1] + x[2], difference = scaled(by_minus_i(x[1] - x[2]), sine);
    const Complex middle = plus_scaled(x[0], sum, -0.5f);
    x[0] = x[0] + sum;
    x[1] = middle + difference;
    x[2] = middle - difference;
  }
};

template <>
struct Butterfly<4> {
  FFW_HELPER void apply(Complex* x) {
    const Complex a = x[0] + x[2], b = x[0] - x[2], c = x[1] + x[3], d = by_minus_i(x[1] - x[3]);
    x[0] = a + c;
    x[1] = b + d;
    x[2] = a - c;
    x[3] = b - d;
  }
};

template <>
struct Butterfly<5> {
  FFW_HELPER void apply(Complex* x) {
    constexpr float cosine1 = 0.309016994374947424102f,
                    cosine2 = -0.809016994374947424102f;  // of 2 pi / 5, 4 pi / 5
    constexpr float sine1 = 0.951056516295153572116f, sine2 = 0.587785252292473129169f;
    const Complex a = x[1] + x[4], b = x[2] + x[3];
    const Complex c = by_minus_i(x[1] - x[4]), d = by_minus_i(x[2] - x[3]);
    const Complex even1 = plus_scaled(plus_scaled(x[0], a, cosine1), b, cosine2);
    const Complex even2 = plus_scaled(plus_scaled(x[0], a, cosine2), b, cosine1);
    const Complex odd1 = plus_scaled(scaled(c, sine1), d, sine2);
    const Complex odd2 = plus_scaled(scaled(c, sine2), d, -sine1);
    x[0] = x[0] + a + b;
    x[1] = even1 + odd1;
    x[2] = even2 + odd2;
    x[3] = even2 - odd2;
    x[4] = even1 - odd1;
  }
};

template <>
struct Butterfly<8> {
  FFW_HELPER void apply(Complex* x) {
    constexpr float half_root = 0.707106781186547524401f;
    Complex even[4] = {x[0], x[2], x[4], x[6]}, odd[4] = {x[1], x[3], x[5], x[7]};
    Butterfly<4>::apply(even);
    Butterfly<4>::apply(odd);
    const Complex b = odd[1], d = odd[3];
    odd[1] = scaled(Complex{b.re + b.im, b.im - b.re}, half_root);
    odd[2] = by_minus_i(odd[2]);
    odd[3] = scaled(Complex{d.im - d.re, -d.re - d.im}, half_root);
    FFW_UNROLL
    for (int j = 0; j < 4; ++j) {
      x[j] = even[j] + odd[j];
      x[j + 4] = even[j] - odd[j];
    }
  }
};

// One Stockham pass over `rest` * radix * done elements: inputs from in_count on are zero, outputs from
// out_count on are not wanted.
template <int radix>
FFW_LOOP void pass(const View& in, const View& out, const float* twiddles, int64_t rest, int64_t done,
                   int64_t in_count, int64_t out_count) {
  for (int64_t p = 0; p < rest; ++p) {
    const float* twiddle = twiddles + 2 * (radix - 1) * p;
    for (int64_t q = 0; q < done; ++q) {
      Complex x[radix];
      FFW_UNROLL
      for (int j = 0; j < radix; ++j) {
        const int64_t i = q + done * (p + rest * j);
        x[j] = i < in_count ? View::get(in, i) : Complex{};
      }
      Butterfly<radix>::apply(x);
      if (p > 0) {
        FFW_UNROLL
        for (int j = 1; j < radix; ++j) x[j] = times(x[j], twiddle[2 * j - 2], twiddle[2 * j - 1]);
      }
      FFW_UNROLL
      for (int j = 0; j < radix; ++j) {
        const int64_t i = q + done * (radix * p + j);
        if (i < out_count) View::set(out, i, x[j]);
      }
    }
  }
}

FFW_LOOP void run_pass(int64_t radix, const View& in, const View& out, const float* twiddles, int64_t rest,
                       int64_t done, int64_t in_count, int64_t out_count) {
  const auto run = radix == 8   ? pass<8>
                   : radix == 5 ? pass<5>
                   : radix == 4 ? pass<4>
                   : radix == 3 ? pass<3>
                                : pass<2>;
  run(in, out, twiddles, rest, done, in_count, out_count);
}

// Contiguous complex numbers in scratch memory, re and im of each side by side.
FFW_HELPER View scratch_view(float* memory) { return {memory, memory + lanes, 2 * lanes}; }

FFW_LOOP void transform(const Axis& axis, const View& in, const View& out, int64_t in_count,
                        int64_t out_count, float* scratch) {
  View from = in;
  int64_t rest = axis.length, done = 1;
  for (int64_t index = 0; index < axis.passes; ++index) {
    const bool is_last = index + 1 == axis.passes;
    const View to = is_last ? out : scratch_view(scratch + (index & 1) * 2 * lanes * axis.length);
    const int64_t radix = axis.radix[index];
    rest /= radix;
    run_pass(radix, from, to, axis.twiddles[index], rest, done, index == 0 ? in_count : axis.length,
             is_last ? out_count : axis.length);
    done *= radix;
    from = to;
  }
}

// Transforms of two dimensions ------------------------------------------------------------------------------

// One vector of arrays: entry `lane` at data + lane * entry_stride. Lanes from `valid` on are padding.
struct Bundle {
  float* data;
  int64_t valid, group;
};

FFW_HELPER Bundle bundle(const Arrays& arrays, int64_t index) {
  const int64_t entry = index * lanes, group = entry / arrays.padded_size, first = entry % arrays.padded_size;
  if (group >= arrays.groups) return {arrays.data, 0, 0};
  const int64_t left = arrays.group_size - first;
  float* data = arrays.data + group * arrays.group_stride + first * arrays.entry_stride;
  return {data, left < 0 ? 0 : left < lanes ? left : lanes, group};
}

FFW_HELPER void scatter(float* to, int64_t stride, int64_t valid, Vector value) {
  if (valid == lanes && stride == 1) {
    store(to, value);
    return;
  }
  float values[lanes];
  store(values, value);
  for (int64_t lane = 0; lane < valid; ++lane) to[lane * stride] = values[lane];
}

FFW_HELPER int64_t position(const Axis& axis, int64_t i) {
  const int64_t at = axis.first + axis.step * i;
  return at < 0 ? at + axis.length : at;
}

FFW_HELPER int64_t negative(int64_t frequency, int64_t length) {
  return frequency == 0 ? 0 : length - frequency;
}

// The frequencies of column kx that are kept: all, or half of them where -kx is the same column.
FFW_HELPER int64_t kept_frequencies(int64_t kx, const Axis& rows, const Axis& columns) {
  return negative(kx, columns.length) == kx ? rows.length / 2 + 1 : rows.length;
}

// Transforms step through memory by hundreds of bytes and more, which no hardware foresees, and the cores
// wait for stores in order: so lines are asked for while the row or column before them is computed. Two
// adjacent vectors.
FFW_HELPER void prefetch_to_read(const float* vectors) {
  __builtin_prefetch(vectors, 0);
  __builtin_prefetch(vectors + 2 * lanes - 1, 0);
}
FFW_HELPER void prefetch_to_write(const float* vectors) {
  __builtin_prefetch(vectors, 1);
  __builtin_prefetch(vectors + 2 * lanes - 1, 1);
}

// Scratch memory: a grid of rows.length x columns.length numbers, two columns, and two buffers of
// `transform`. A row of the grid is one number longer than it need be, for rows at distances of a power of
// two share few cache lines.
struct Scratch {
  float* grid;
  int64_t row_stride;
  float *first_column, *second_column, *buffers;
};

FFW_HELPER Scratch divided(float* memory, const Arrays& arrays) {
  const int64_t number = 2 * lanes, rows = arrays.rows.length, columns = arrays.columns.length;
  const int64_t longest = rows > columns ? rows : columns;
  const int64_t row_stride = number * (columns + 1);
  float* const first = memory + rows * row_stride;
  return {memory, row_stride, first, first + number * longest, first + 2 * number * longest};
}

FFW_LOOP int64_t transform_scratch(const Arrays& arrays) {
  const int64_t rows = arrays.rows.length, columns = arrays.columns.length;
  return 2 * lanes * (rows * (columns + 1) + 4 * (rows > columns ? rows : columns));
}

FFW_HELPER View grid_row(const Scratch& scratch, int64_t y) {
  return scratch_view(scratch.grid + y * scratch.row_stride);
}

FFW_HELPER View grid_column(const Scratch& scratch, int64_t x) {
  float* top = scratch.grid + 2 * lanes * x;
  return {top, top + lanes, scratch.row_stride};
}

// Element (y, x) of a bundle to re or im of row position x.
FFW_HELPER void gather_row(const Arrays& arrays, const Bundle& bundle, int64_t y, float* row) {
  const float* from = bundle.data + y * arrays.row_stride;
  const Axis& axis = arrays.columns;
  if (bundle.valid == lanes && arrays.entry_stride == 1) {
    for (int64_t x = 0; x < axis.count; ++x) {
      store(row + position(axis, x) * 2 * lanes, load(from + x * arrays.column_stride));
    }
    return;
  }
  for (int64_t lane = 0; lane < bundle.valid; ++lane) {  // padding lanes stay zero
    for (int64_t x = 0; x < axis.count; ++x) {
      row[position(axis, x) * 2 * lanes + lane] = from[lane * arrays.entry_stride + x * arrays.column_stride];
    }
  }
}

// Transforms the rows of two bundles, as real and imaginary part, into the grid.
FFW_LOOP void forward_rows(const Arrays& arrays, const Bundle& a, const Bundle& b, const Scratch& scratch) {
  const View row = scratch_view(scratch.first_column);
  for (int64_t i = 0; i < 2 * lanes * arrays.columns.length; ++i) scratch.first_column[i] = 0;
  for (int64_t y = 0; y < arrays.rows.count; ++y) {
    if (y + 1 < arrays.rows.count) {
      for (int64_t x = 0; x < arrays.columns.count; ++x) {
        prefetch_to_read(a.data + (y + 1) * arrays.row_stride + x * arrays.column_stride);
      }
    }
    gather_row(arrays, a, y, row.re);
    gather_row(arrays, b, y, row.im);
    transform(arrays.columns, row, grid_row(scratch, position(arrays.rows, y)), arrays.columns.extent,
              arrays.columns.length, scratch.buffers);
  }
}

// Separates z^ of column kx into the spectra of both bundles.
FFW_LOOP void separate(const View& column, const View& opposite, int64_t kept, int64_t length, float* a,
                       float* b, const Spectrum& spectrum) {
  for (int64_t ky = 0; ky < kept; ++ky) {
    const Complex z = View::get(column, ky), w = View::get(opposite, negative(ky, length));
    const int64_t at = ky * spectrum.frequency_stride;
    store(a + at, z.re + w.re);
    store(b + at, z.im + w.im);
    store(a + at + spectrum.entries, z.im - w.im);
    store(b + at + spectrum.entries, w.re - z.re);
  }
}

FFW_LOOP void forward(const Arrays& arrays, const Spectrum& spectrum, int64_t first, int64_t last,
                      float* memory) {
  const Scratch scratch = divided(memory, arrays);
  const Axis &rows = arrays.rows, &columns = arrays.columns;
  const View column = scratch_view(scratch.first_column), opposite = scratch_view(scratch.second_column);
  // Rows without an element stay zero.
  for (int64_t i = 0; i < rows.length * scratch.row_stride; ++i) scratch.grid[i] = 0;
  for (int64_t pair = first; pair < last; ++pair) {
    forward_rows(arrays, bundle(arrays, 2 * pair), bundle(arrays, 2 * pair + 1), scratch);
    float* target = spectrum.data + 2 * pair * lanes;
    for (int64_t kx = 0; kx <= columns.length / 2; ++kx) {
      const int64_t minus_kx = negative(kx, columns.length), kept = kept_frequencies(kx, rows, columns);
      for (int64_t ky = 0; ky < kept; ++ky) {
        prefetch_to_write(target + ky * spectrum.frequency_stride);
        prefetch_to_write(target + ky * spectrum.frequency_stride + spectrum.entries);
      }
      transform(rows, grid_column(scratch, kx), column, rows.extent, rows.length, scratch.buffers);
      if (minus_kx != kx) {
        transform(rows, grid_column(scratch, minus_kx), opposite, rows.extent, rows.length, scratch.buffers);
      }
      separate(column, minus_kx == kx ? column : opposite, kept, rows.length, target, target + lanes,
               spectrum);
      target += kept * spectrum.frequency_stride;
    }
  }
}

// Joins the spectra of both bundles to z^ in column kx and its opposite. A bundle of padding alone counts as
// zero: whatever its memory holds would reach the other one through rounding.
FFW_LOOP void join(const float* a, const float* b, bool has_b, const Spectrum& spectrum, int64_t kept,
                   int64_t length, const View& column, const View& opposite) {
  for (int64_t ky = 0; ky < kept; ++ky) {
    const int64_t at = ky * spectrum.frequency_stride;
    const Complex p = {load(a + at), load(a + at + spectrum.entries)};
    const Complex q = has_b ? Complex{load(b + at), load(b + at + spectrum.entries)} : Complex{};
    View::set(opposite, negative(ky, length), {p.re + q.im, q.re - p.im});
    View::set(column, ky, {p.re - q.im, p.im + q.re});
  }
}

FFW_LOOP void inverse_rows(const Arrays& arrays, const Bundle& a, const Bundle& b, float scale,
                           const float* bias, const Scratch& scratch) {
  const View row = scratch_view(scratch.first_column);
  const Vector factor = splat(scale);
  const Vector bias_a = splat(bias == nullptr ? 0 : bias[a.group]),
               bias_b = splat(bias == nullptr ? 0 : bias[b.group]);
  for (int64_t y = 0; y < arrays.rows.count; ++y) {
    for (int64_t x = 0; x < arrays.columns.count; ++x) {
      prefetch_to_write(a.data + y * arrays.row_stride + x * arrays.column_stride);
    }
    transform(arrays.columns, exchanged(grid_row(scratch, position(arrays.rows, y))), exchanged(row),
              arrays.columns.length, arrays.columns.extent, scratch.buffers);
    for (int64_t x = 0; x < arrays.columns.count; ++x) {
      const Complex z = View::get(row, position(arrays.columns, x));
      const int64_t at = y * arrays.row_stride + x * arrays.column_stride;
      scatter(a.data + at, arrays.entry_stride, a.valid, multiply_add(z.re, factor, bias_a));
      scatter(b.data + at, arrays.entry_stride, b.valid, multiply_add(z.im, factor, bias_b));
    }
  }
}

FFW_LOOP void inverse(const Spectrum& spectrum, const Arrays& arrays, float scale, const float* bias,
                      int64_t first, int64_t last, float* memory) {
  const Scratch scratch = divided(memory, arrays);
  const Axis &rows = arrays.rows, &columns = arrays.columns;
  const View column = scratch_view(scratch.first_column), opposite = scratch_view(scratch.second_column);
  for (int64_t pair = first; pair < last; ++pair) {
    const Bundle a = bundle(arrays, 2 * pair), b = bundle(arrays, 2 * pair + 1);
    if (a.valid == 0) continue;  // then b is padding, too
    const float* source = spectrum.data + 2 * pair * lanes;
    for (int64_t kx = 0; kx <= columns.length / 2; ++kx) {
      const int64_t minus_kx = negative(kx, columns.length), kept = kept_frequencies(kx, rows, columns);
      if (kx < columns.length / 2) {
        const float* next = source + kept * spectrum.frequency_stride;
        for (int64_t ky = 0; ky < kept_frequencies(kx + 1, rows, columns); ++ky) {
          prefetch_to_read(next + ky * spectrum.frequency_stride);
          prefetch_to_read(next + ky * spectrum.frequency_stride + spectrum.entries);
        }
      }
      join(source, source + lanes, b.valid > 0, spectrum, kept, rows.length, column,
           minus_kx == kx ? column : opposite);
      transform(rows, exchanged(column), exchanged(grid_column(scratch, kx)), rows.length, rows.extent,
                scratch.buffers);
      if (minus_kx != kx) {
        transform(rows, exchanged(opposite), exchanged(grid_column(scratch, minus_kx)), rows.length,
                  rows.extent, scratch.buffers);
      }
      source += kept * spectrum.frequency_stride;
    }
    inverse_rows(arrays, a, b, scale, bias, scratch);
  }
}

// Products --------------------------------------------------------------------------------------------------
// A complex product takes three real ones (Gauss):
//   t = a_re (b_re + b_im),   im = t + (a_im - a_re) b_re,   re = t - (a_im + a_re) b_im
// so operands are packed as three planes each, and three real matrix products of register tiles follow one
// another.

constexpr int64_t tile_rows = FFW_TILE_ROWS;
constexpr int64_t tile_vectors = 3;
constexpr int64_t planes = 3;

// out = start + a b, of tile_rows x (width vectors)
template <int width>
FFW_LOOP void multiply_tile(const float* a, const float* b, int64_t depth, const float* start, float* out) {
  Vector sums[tile_rows][width];
  FFW_UNROLL
  for (int i = 0; i < tile_rows; ++i) {
    FFW_UNROLL
    for (int j = 0; j < width; ++j)
      sums[i][j] = start == nullptr ? Vector{} : load(start + (i * width + j) * lanes);
  }
  for (int64_t r = 0; r < depth; ++r) {
    Vector row[width];
    FFW_UNROLL
    for (int j = 0; j < width; ++j) row[j] = load(b + (r * width + j) * lanes);
    FFW_UNROLL
    for (int i = 0; i < tile_rows; ++i) {
      const Vector factor = splat(a[r * tile_rows + i]);
      FFW_UNROLL
      for (int j = 0; j < width; ++j) sums[i][j] = multiply_add(factor, row[j], sums[i][j]);
    }
  }
  FFW_UNROLL
  for (int i = 0; i < tile_rows; ++i) {
    FFW_UNROLL
    for (int j = 0; j < width; ++j) store(out + (i * width + j) * lanes, sums[i][j]);
  }
}

// Rows of a tile into the result, of which `columns` belong to it.
FFW_HELPER void copy_tile(const float* tile, int64_t width, int64_t rows, int64_t columns, float* out,
                          int64_t stride) {
  for (int64_t i = 0; i < rows; ++i) {
    const float* from = tile + i * width * lanes;
    int64_t n = 0;
    for (; n + lanes <= columns; n += lanes) store(out + i * stride + n, load(from + n));
    for (; n < columns; ++n) out[i * stride + n] = from[n];
  }
}

// The extents of a product in tiles. Columns are dealt out evenly: 13 vectors are 3 + 3 + 3 + 2 + 2, not 3 +
// 3 + 3 + 3 + 1.
struct Tiling {
  int64_t row_tiles, vectors, column_tiles;
};

FFW_HELPER Tiling tiling(const Product& product) {
  const int64_t vectors = (product.columns + lanes - 1) / lanes;
  return {(product.rows + tile_rows - 1) / tile_rows, vectors, (vectors + tile_vectors - 1) / tile_vectors};
}

FFW_HELPER int64_t tile_start(const Tiling& tiles, int64_t index) {
  return tiles.vectors * index / tiles.column_tiles;
}

// Four floats: blocks of 4 x 4 are what operands are packed in.
typedef float Quad __attribute__((vector_size(16)));
typedef float UnalignedQuad __attribute__((vector_size(16), aligned(sizeof(float)), may_alias));
#if defined(__clang__)
#define FFW_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else  // GCC has that from version 12 on
typedef int QuadIndices __attribute__((vector_size(16)));
#define FFW_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, QuadIndices{__VA_ARGS__})
#endif

FFW_HELPER void store_quad(float* to, Quad value) { *reinterpret_cast<UnalignedQuad*>(to) = value; }
FFW_HELPER Quad load_quad(const float* from) { return *reinterpret_cast<const UnalignedQuad*>(from); }

// block[j] = elements (0 .. 3, j) of a matrix, one of whose strides is 1.
FFW_HELPER void load_block(const float* from, int64_t row_stride, int64_t column_stride, Quad* block) {
  if (row_stride == 1) {
    for (int j = 0; j < 4; ++j) block[j] = load_quad(from + j * column_stride);
    return;
  }
  const Quad a = load_quad(from), b = load_quad(from + row_stride), c = load_quad(from + 2 * row_stride),
             d = load_quad(from + 3 * row_stride);
  const Quad ab_low = FFW_SHUFFLE(a, b, 0, 4, 1, 5),
             ab_high = FFW_SHUFFLE(a, b, 2, 6, 3, 7);
  const Quad cd_low = FFW_SHUFFLE(c, d, 0, 4, 1, 5),
             cd_high = FFW_SHUFFLE(c, d, 2, 6, 3, 7);
  block[0] = FFW_SHUFFLE(ab_low, cd_low, 0, 1, 4, 5);
  block[1] = FFW_SHUFFLE(ab_low, cd_low, 2, 3, 6, 7);
  block[2] = FFW_SHUFFLE(ab_high, cd_high, 0, 1, 4, 5);
  block[3] = FFW_SHUFFLE(ab_high, cd_high, 2, 3, 6, 7);
}

// The same at the matrix's edge: elements beyond `rows` x `columns` are zero.
FFW_HELPER void load_edge(const float* from, int64_t row_stride, int64_t column_stride, int64_t rows,
                          int64_t columns, Quad* block) {
  for (int j = 0; j < 4; ++j) {
    float values[4];
    for (int i = 0; i < 4; ++i)
      values[i] = i < rows && j < columns ? from[i * row_stride + j * column_stride] : 0;
    block[j] = load_quad(values);
  }
}

// What is packed of a complex number.
enum class Side { left, right };  // (re, im - re, -(im + re)) and (re + im, re, im)

template <Side side>
FFW_HELPER void store_planes(float* to, int64_t plane, Quad re, Quad im) {
  store_quad(to, side == Side::left ? re : re + im);
  store_quad(to + plane, side == Side::left ? im - re : re);
  store_quad(to + 2 * plane, side == Side::left ? -(im + re) : im);
}

// Packs four rows of a matrix (rows, depth), of which `rows` exist: element (i, r) at to[r * stride + i].
template <Side side>
FFW_HELPER void pack_rows(const Operand& operand, const float* from, int64_t row_stride, int64_t depth_stride,
                          int64_t rows, int64_t depth, float* to, int64_t stride, int64_t plane) {
  const float sign = operand.conjugate ? -1 : 1;
  for (int64_t r = 0; r < depth; r += 4) {
    const int64_t left = depth - r < 4 ? depth - r : 4;
    const float* re = from + r * depth_stride;
    Quad x[4], y[4];
    if (rows >= 4 && left == 4) {
      load_block(re, row_stride, depth_stride, x);
      load_block(re + operand.spectrum.entries, row_stride, depth_stride, y);
    } else {
      load_edge(re, row_stride, depth_stride, rows, left, x);
      load_edge(re + operand.spectrum.entries, row_stride, depth_stride, rows, left, y);
    }
    for (int64_t j = 0; j < left; ++j) store_planes<side>(to + (r + j) * stride, plane, x[j], sign * y[j]);
  }
}

// The left operand: [plane][row tile][r][row]
FFW_LOOP void pack_left(const Product& product, const Tiling& tiles, int64_t frequency, float* packed) {
  const Operand& a = product.a;
  const float* data = a.spectrum.data + frequency * a.spectrum.frequency_stride;
  const int64_t plane = tiles.row_tiles * product.depth * tile_rows;
  for (int64_t m = 0; m < tiles.row_tiles * tile_rows; m += 4) {
    float* to = packed + m / tile_rows * product.depth * tile_rows + m % tile_rows;
    const int64_t rows = product.rows - m;
    pack_rows<Side::left>(a, rows > 0 ? data + m * a.row_stride : data, a.row_stride, a.column_stride, rows,
                          product.depth, to, tile_rows, plane);
  }
}

// `width` vectors of columns of the right operand: [plane][r][column]
FFW_LOOP void pack_right(const Product& product, int64_t first, int64_t width, int64_t frequency,
                         float* packed) {
  const Operand& b = product.b;
  const float* data = b.spectrum.data + frequency * b.spectrum.frequency_stride;
  const int64_t row = width * lanes, plane = product.depth * row;
  for (int64_t n = first; n < first + row; n += 4) {
    const int64_t columns = product.columns - n;
    pack_rows<Side::right>(b, columns > 0 ? data + n * b.column_stride : data, b.column_stride, b.row_stride,
                           columns, product.depth, packed + n - first, row, plane);
  }
}

// The next frequency's operands, which come from memory, are fetched a piece with each tile of this one.
struct Ahead {
  const float* next[2];
  const float* end[2];
  int64_t piece;  // floats of each operand a tile

  FFW_HELPER Ahead of(const Product& product, const Tiling& tiles, int64_t frequency) {
    Ahead ahead = {};
    const Spectrum* operands[2] = {&product.a.spectrum, &product.b.spectrum};
    int64_t largest = 0;
    for (int i = 0; i < 2; ++i) {
      ahead.next[i] = operands[i]->data + frequency * operands[i]->frequency_stride;
      ahead.end[i] = ahead.next[i] + operands[i]->frequency_stride;
      largest = largest < operands[i]->frequency_stride ? operands[i]->frequency_stride : largest;
    }
    ahead.piece = largest / (tiles.row_tiles * tiles.column_tiles) + 1;
    return ahead;
  }

  FFW_HELPER void fetch(Ahead& ahead) {
    constexpr int64_t line = 16;
    for (int i = 0; i < 2; ++i) {
      const float* stop =
          ahead.end[i] - ahead.next[i] < ahead.piece ? ahead.end[i] : ahead.next[i] + ahead.piece;
      for (; ahead.next[i] < stop; ahead.next[i] += line) __builtin_prefetch(ahead.next[i], 0, 2);
    }
  }
};

template <int width>
FFW_LOOP void multiply_columns(const Product& product, const Tiling& tiles, const float* left,
                               const float* right, int64_t first, float* out, Ahead& ahead) {
  const int64_t left_plane = tiles.row_tiles * product.depth * tile_rows;
  const int64_t right_plane = product.depth * width * lanes;
  const int64_t wanted = product.columns - first < width * lanes ? product.columns - first : width * lanes;
  alignas(64) float common[tile_rows * width * lanes], result[tile_rows * width * lanes];
  for (int64_t tile = 0; tile < tiles.row_tiles; ++tile) {
    const float* a = left + tile * product.depth * tile_rows;
    const int64_t m = tile * tile_rows;
    const int64_t rows = product.rows - m < tile_rows ? product.rows - m : tile_rows;
    float* to = out + m * product.out_row_stride + first;
    Ahead::fetch(ahead);
    for (int64_t i = 0; i < rows; ++i) {
      prefetch_to_write(to + i * product.out_row_stride);
      prefetch_to_write(to + i * product.out_row_stride + product.out.entries);
    }
    multiply_tile<width>(a, right, product.depth, nullptr, common);
    multiply_tile<width>(a + 2 * left_plane, right + 2 * right_plane, product.depth, common, result);
    copy_tile(result, width, rows, wanted, to, product.out_row_stride);
    multiply_tile<width>(a + left_plane, right + right_plane, product.depth, common, result);
    copy_tile(result, width, rows, wanted, to + product.out.entries, product.out_row_stride);
  }
}

FFW_LOOP void multiply(const Product& product, int64_t first, int64_t last, float* scratch) {
  const Tiling tiles = tiling(product);
  float* const left = scratch;
  float* const right = left + planes * tiles.row_tiles * product.depth * tile_rows;
  for (int64_t frequency = first; frequency < last; ++frequency) {
    pack_left(product, tiles, frequency, left);
    float* out = product.out.data + frequency * product.out.frequency_stride;
    Ahead ahead = Ahead::of(product, tiles, frequency + 1 < last ? frequency + 1 : first);
    for (int64_t tile = 0; tile < tiles.column_tiles; ++tile) {
      const int64_t start = tile_start(tiles, tile), width = tile_start(tiles, tile + 1) - start;
      pack_right(product, start * lanes, width, frequency, right);
      const auto run = width == 3   ? multiply_columns<3>
                       : width == 2 ? multiply_columns<2>
                                    : multiply_columns<1>;
      run(product, tiles, left, right, start * lanes, out, ahead);
    }
  }
}

FFW_LOOP int64_t multiply_scratch(const Product& product) {
  return planes * product.depth * (tiling(product).row_tiles * tile_rows + tile_vectors * lanes);
}

constexpr FftLoops table = {lanes, forward, inverse, transform_scratch, multiply, multiply_scratch};

}  // namespace FFW_ISA
}  // namespace ffw::cpu

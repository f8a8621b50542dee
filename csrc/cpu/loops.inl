// The loops themselves. Included once for each instruction set, by a file that defines
//   FFW_ISA           namespace that keeps its copies of the loops apart, and FFW_ISA_NAME its name as a string
//   FFW_TARGET        function attribute that allows its instructions
//   FFW_VECTOR_BYTES  length of its vectors
//   FFW_FUSED         1 if it has fused multiply-add
// Everything here is static or in FFW_ISA: a function that the linker might merge with its copy for another set could
// end up with instructions that the machine does not have. The same goes for the standard library, which is not used.

#define FFW_LOOP FFW_TARGET static
#define FFW_HELPER FFW_TARGET static inline __attribute__((always_inline))
#if defined(__clang__)
#define FFW_UNROLL _Pragma("unroll")
#define FFW_NO_ALIAS _Pragma("clang loop vectorize(assume_safety)")
#else
#define FFW_UNROLL _Pragma("GCC unroll 16")  // keeps arrays of vectors in registers
#define FFW_NO_ALIAS _Pragma("GCC ivdep")    // __restrict on local pointers does not reach GCC's vectoriser
#endif

namespace ffw::cpu {
namespace FFW_ISA {

// Uniform numbers -----------------------------------------------------------------------------------------------------

template <typename T>
FFW_LOOP void uniform(const Draw& draw, int64_t first, int64_t n, T* __restrict out) {
  constexpr int group = 16;  // Philox blocks computed side by side, one a lane
  uint32_t words[4][group];
  for (int64_t start = 0; start < n; start += 4 * group) {
    const uint64_t base = philox_block(draw, (first + start) >> 2);
    for (int lane = 0; lane < group; ++lane) {
      const Words result = philox4x32(base + lane, draw.number, draw.seed);
      for (int i = 0; i < 4; ++i) words[i][lane] = result.word[i];
    }
    float numbers[4 * group];
    for (int lane = 0; lane < group; ++lane) {
      for (int i = 0; i < 4; ++i) numbers[4 * lane + i] = uniform_of_word(words[i][lane]);
    }
    const int64_t rest = n - start < 4 * group ? n - start : 4 * group;
    for (int64_t i = 0; i < rest; ++i) out[start + i] = numbers[i];
  }
}

// Gates ---------------------------------------------------------------------------------------------------------------

template <Kind kind, typename T>
FFW_LOOP void gate_weight(const T* __restrict w, const T* __restrict m, const T* __restrict u, T inverse,
                          T* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = w[i] * gate_value<kind>(m[i], inverse, is_random(kind) ? u[i] : T(0));
}

// A processor overlaps as many rounds of a loop as its registers and its window of instructions hold, which are few where
// a round takes a logarithm, an exponential, quotients and a root one after the other. So such loops go over a piece of
// the block in stages, of which more rounds overlap; what one leaves for the next stays in the first-level cache.
constexpr int64_t piece_size = 256;

// out = dg/dm
template <Kind kind, typename T>
FFW_HELPER void gate_slopes(const T* __restrict m, const T* __restrict u, T inverse, T* __restrict out, int64_t n) {
  if constexpr (has_random_slope(kind)) {
    for (int64_t i = 0; i < n; ++i) out[i] = gate_argument<kind>(m[i], u[i]);
    for (int64_t i = 0; i < n; ++i) out[i] = slope_of_argument<kind>(out[i], inverse);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = slope_of_argument<kind>(m[i], inverse);
  }
}

template <Kind kind, typename T>
FFW_LOOP void gate_weight_backward(const T* __restrict grad, const T* __restrict w, const T* __restrict m,
                                   const T* __restrict u, T inverse, T* __restrict out, int64_t n) {
  gate_slopes<kind>(m, u, inverse, out, n);
  for (int64_t i = 0; i < n; ++i) out[i] = grad[i] * w[i] * out[i];
}

// The new scores alone: the gated weight follows in a pass over the same block, which is then in the first-level cache.
template <Kind kind, typename T>
FFW_LOOP void adam_step(const AdamBlock<T>& block, const Adam<T>& settings, int64_t n) {
  const auto [scores, exp_avg, exp_avg_sq, weight, grad, u, inverse] = block;
  const Adam<T> adam = settings;
  T slopes[piece_size];
  for (int64_t start = 0; start < n; start += piece_size) {
    const int64_t end = n - start < piece_size ? n : start + piece_size;
    gate_slopes<kind>(scores + start, u + start, inverse, slopes, end - start);
    FFW_NO_ALIAS
    for (int64_t i = start; i < end; ++i) {
      scores[i] = adam_update(scores[i], grad[i] * weight[i] * slopes[i - start], exp_avg[i], exp_avg_sq[i], adam);
    }
  }
}

// gate_weight, and the sum of the gates' movement: what both compute is computed once.
template <Kind kind, typename T>
FFW_LOOP double gate_weight_and_movement(const T* __restrict w, const T* __restrict m, const T* __restrict u, T inverse,
                                         T* __restrict out, int64_t n) {
  constexpr int lanes = 32;  // the order of summation, the same for every instruction set
  static_assert(piece_size % lanes == 0);
  T sums[lanes] = {}, stems[piece_size];
  double total = 0;
  for (int64_t start = 0; start < n; start += piece_size) {
    const int64_t count = n - start < piece_size ? n - start : piece_size;
    const T *weights = w + start, *scores = m + start, *numbers = u + start;
    const auto number = [numbers](int64_t i) { return is_random(kind) ? numbers[i] : T(0); };
    for (int64_t i = 0; i < count; ++i) stems[i] = gate_stem<kind>(scores[i], inverse, number(i));
    for (int64_t i = 0; i < count; ++i) {
      out[start + i] = weights[i] * gate_of_stem<kind>(stems[i], scores[i], number(i));
    }
    int64_t i = 0;
    for (; i + lanes <= count; i += lanes) {
      for (int lane = 0; lane < lanes; ++lane) {
        sums[lane] += movement_of_stem<kind>(stems[i + lane], scores[i + lane], inverse);
      }
    }
    for (; i < count; ++i) total += movement_of_stem<kind>(stems[i], scores[i], inverse);
  }
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
  }
  return total + sums[0];
}

// Softmax -------------------------------------------------------------------------------------------------------------

template <typename T>
FFW_LOOP void softmax(const T* __restrict logits, int64_t n, int64_t k, T* __restrict out) {
  for (int64_t row = 0; row < n; ++row) {
    T largest = logits[row * k];
    for (int64_t i = 1; i < k; ++i) largest = logits[row * k + i] > largest ? logits[row * k + i] : largest;
    for (int64_t i = 0; i < k; ++i) out[row * k + i] = logits[row * k + i] - largest;
  }
  for (int64_t i = 0; i < n * k; ++i) out[i] = decay(out[i]);  // across rows, for few classes fill no vector
  for (int64_t row = 0; row < n; ++row) {
    T sum = 0;
    for (int64_t i = 0; i < k; ++i) sum += out[row * k + i];
    const T scale = 1 / sum;
    for (int64_t i = 0; i < k; ++i) out[row * k + i] *= scale;
  }
}

// Hyperbolic tangent --------------------------------------------------------------------------------------------------

// To less than two units in the last place: x + x^3 p(x^2) for small |x|, else 1 - 2 / (exp(2 |x|) + 1), with the sign
// of x. NaN stays NaN.
FFW_LOOP void tanh(float* values, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = absolute(values[i]), square = x * x;
    float series = -5.70498872745e-3f;
    series = series * square + 2.06390887954e-2f;
    series = series * square - 5.37397155531e-2f;
    series = series * square + 1.33314422036e-1f;
    series = series * square - 3.33332819422e-1f;
    const float small = x + x * square * series;
    const float large = 1.0f - 2.0f / (reproducible_exp(2.0f * x) + 1.0f);
    const uint32_t sign = bits_as<uint32_t>(values[i]) & 0x80000000u;
    values[i] = bits_as<float>((bits_as<uint32_t>(x < 0.625f ? small : large) & 0x7fffffffu) | sign);
  }
}

// Linear heads --------------------------------------------------------------------------------------------------------
// Both products run on register tiles of vectors over the features; the soft-max runs on vectors over the samples.

constexpr int class_tile = 5;  // 2 x 5 accumulators hide the latency of the multiply-add and fit 16 registers
constexpr int64_t feature_block = 512;  // features of a tile's rows that stay in the first-level cache

template <typename T>
struct VectorOf {
  static constexpr int lanes = FFW_VECTOR_BYTES / sizeof(T);
  typedef T type __attribute__((vector_size(FFW_VECTOR_BYTES)));
  typedef T unaligned __attribute__((vector_size(FFW_VECTOR_BYTES), aligned(sizeof(T)), may_alias));
};

template <typename T>
using Vector = typename VectorOf<T>::type;

template <typename T>
FFW_HELPER Vector<T> load(const T* from) {
  return *reinterpret_cast<const typename VectorOf<T>::unaligned*>(from);
}

template <typename T>
FFW_HELPER void store(T* to, Vector<T> value) {
  *reinterpret_cast<typename VectorOf<T>::unaligned*>(to) = value;
}

#if FFW_FUSED
FFW_HELPER float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
FFW_HELPER double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
#else
template <typename T>
FFW_HELPER T fused(T a, T b, T c) {
  return a * b + c;
}
#endif

// a * b + c of whole vectors: the loop over lanes becomes one instruction.
template <typename T>
FFW_HELPER Vector<T> multiply_add(Vector<T> a, Vector<T> b, Vector<T> c) {
  Vector<T> result;
  for (int lane = 0; lane < VectorOf<T>::lanes; ++lane) result[lane] = fused(a[lane], b[lane], c[lane]);
  return result;
}

template <typename T>
FFW_HELPER T sum_of(Vector<T> value) {
  constexpr int lanes = VectorOf<T>::lanes;
  T numbers[lanes];
  store(numbers, value);
  for (int half = lanes / 2; half > 0; half /= 2) {
    for (int lane = 0; lane < half; ++lane) numbers[lane] += numbers[lane + half];
  }
  return numbers[0];
}

// error[c][row] += x[row] . weight[c] over the features begin .. end, for row_count rows and class_count classes
template <int row_count, int class_count, typename T>
FFW_HELPER void logits_tile(const HeadBatch<T>& batch, int64_t row, int64_t c, int64_t begin, int64_t end) {
  constexpr int lanes = VectorOf<T>::lanes;
  const T* x = batch.x + row * batch.x_stride;
  const T* weight = batch.weight + c * batch.stride;
  Vector<T> sums[row_count][class_count] = {};
  for (int64_t d = begin; d < end; d += lanes) {
    Vector<T> features[row_count];
    FFW_UNROLL
    for (int r = 0; r < row_count; ++r) features[r] = load(x + r * batch.x_stride + d);
    FFW_UNROLL
    for (int k = 0; k < class_count; ++k) {
      const Vector<T> weights = load(weight + k * batch.stride + d);
      FFW_UNROLL
      for (int r = 0; r < row_count; ++r) sums[r][k] = multiply_add<T>(features[r], weights, sums[r][k]);
    }
  }
  FFW_UNROLL
  for (int k = 0; k < class_count; ++k) {
    T* logits = batch.error + (c + k) * batch.count_stride + row;
    FFW_UNROLL
    for (int r = 0; r < row_count; ++r) logits[r] += sum_of<T>(sums[r][k]);
  }
}

template <int class_count, typename T>
FFW_LOOP void logits_of_classes(const HeadBatch<T>& batch, int64_t c, int64_t row, int64_t last, int64_t begin,
                                int64_t end) {
  for (; row + 2 <= last; row += 2) logits_tile<2, class_count>(batch, row, c, begin, end);
  if (row < last) logits_tile<1, class_count>(batch, row, c, begin, end);
}

template <typename T>
FFW_LOOP void logits(const HeadBatch<T>& batch, int64_t first, int64_t last) {
  for (int64_t c = 0; c < batch.classes; ++c) {
    T* out = batch.error + c * batch.count_stride;
    for (int64_t row = first; row < last; ++row) out[row] = batch.bias[c];
  }
  for (int64_t begin = 0; begin < batch.stride; begin += feature_block) {
    const int64_t end = begin + feature_block < batch.stride ? begin + feature_block : batch.stride;
    for (int64_t c = 0; c < batch.classes; c += class_tile) {
      switch (batch.classes - c) {
        case 1: logits_of_classes<1>(batch, c, first, last, begin, end); break;
        case 2: logits_of_classes<2>(batch, c, first, last, begin, end); break;
        case 3: logits_of_classes<3>(batch, c, first, last, begin, end); break;
        case 4: logits_of_classes<4>(batch, c, first, last, begin, end); break;
        default: logits_of_classes<class_tile>(batch, c, first, last, begin, end);
      }
    }
  }
}

template <typename T>
FFW_LOOP void gather(const HeadBatch<T>& batch, int64_t first, int64_t last) {
  for (int64_t row = first; row < last; ++row) {
    const T* __restrict from = batch.features + batch.rows[row] * batch.width;
    T* __restrict to = batch.x + row * batch.x_stride;
    for (int64_t d = 0; d < batch.width; ++d) to[d] = from[d];
    for (int64_t d = batch.width; d < batch.stride; ++d) to[d] = 0;
  }
}

// Logits become errors (softmax - one-hot) / count, and each sample's loss is noted.
template <typename T>
FFW_LOOP void errors_of_logits(const HeadBatch<T>& batch, int64_t first, int64_t last) {
  const int64_t stride = batch.count_stride;
  T* __restrict largest = batch.row_scratch;
  T* __restrict sum = batch.row_scratch + stride;
  for (int64_t row = first; row < last; ++row) largest[row] = batch.error[row], sum[row] = 0;
  for (int64_t c = 1; c < batch.classes; ++c) {
    const T* __restrict z = batch.error + c * stride;
    for (int64_t row = first; row < last; ++row) largest[row] = z[row] > largest[row] ? z[row] : largest[row];
  }
  for (int64_t row = first; row < last; ++row) {
    const int64_t label = batch.labels[batch.rows[row] * batch.label_stride];
    batch.losses[row] = static_cast<double>(largest[row]) - batch.error[label * stride + row];
  }
  for (int64_t c = 0; c < batch.classes; ++c) {
    T* __restrict z = batch.error + c * stride;
    for (int64_t row = first; row < last; ++row) {
      z[row] = decay(z[row] - largest[row]);
      sum[row] += z[row];
    }
  }
  for (int64_t row = first; row < last; ++row) {
    batch.losses[row] += logarithm(sum[row]);
    sum[row] = 1 / (sum[row] * batch.count);
  }
  for (int64_t c = 0; c < batch.classes; ++c) {
    T* __restrict z = batch.error + c * stride;
    for (int64_t row = first; row < last; ++row) z[row] *= sum[row];
  }
  const T share = T(1) / batch.count;
  for (int64_t row = first; row < last; ++row) {
    batch.error[batch.labels[batch.rows[row] * batch.label_stride] * stride + row] -= share;
  }
}

template <typename T>
FFW_LOOP void head_errors(const HeadBatch<T>& batch, int64_t first, int64_t last) {
  gather(batch, first, last);
  logits(batch, first, last);
  errors_of_logits(batch, first, last);
}

// One SGD step of class_count x vector_count vectors of the weight: gradient error[c] . x[:, d], kept in registers.
template <int class_count, int vector_count, typename T>
FFW_LOOP void update_tile(const HeadBatch<T>& batch, const Sgd<T>& sgd, int64_t c, int64_t d) {
  constexpr int lanes = VectorOf<T>::lanes;
  const T* x = batch.x + d;
  const T* error = batch.error + c * batch.count_stride;
  Vector<T> sums[class_count][vector_count] = {};
  for (int64_t row = 0; row < batch.count; ++row) {
    Vector<T> features[vector_count];
    FFW_UNROLL
    for (int v = 0; v < vector_count; ++v) features[v] = load(x + row * batch.x_stride + v * lanes);
    FFW_UNROLL
    for (int k = 0; k < class_count; ++k) {
      const Vector<T> errors = error[k * batch.count_stride + row] - Vector<T>{};
      FFW_UNROLL
      for (int v = 0; v < vector_count; ++v) sums[k][v] = multiply_add<T>(errors, features[v], sums[k][v]);
    }
  }
  FFW_UNROLL
  for (int k = 0; k < class_count; ++k) {
    FFW_UNROLL
    for (int v = 0; v < vector_count; ++v) {
      const int64_t at = (c + k) * batch.stride + d + v * lanes;
      const Vector<T> value = load(batch.weight + at);
      const Vector<T> momentum =
          load(batch.weight_momentum + at) * sgd.momentum + (sums[k][v] + value * sgd.weight_decay);
      store(batch.weight_momentum + at, momentum);
      store(batch.weight + at, value - momentum * sgd.lr);
    }
  }
}

template <int vector_count, typename T>
FFW_LOOP void update_columns(const HeadBatch<T>& batch, const Sgd<T>& sgd, int64_t d) {
  for (int64_t c = 0; c < batch.classes; c += class_tile) {
    switch (batch.classes - c) {
      case 1: update_tile<1, vector_count>(batch, sgd, c, d); break;
      case 2: update_tile<2, vector_count>(batch, sgd, c, d); break;
      case 3: update_tile<3, vector_count>(batch, sgd, c, d); break;
      case 4: update_tile<4, vector_count>(batch, sgd, c, d); break;
      default: update_tile<class_tile, vector_count>(batch, sgd, c, d);
    }
  }
}

template <typename T>
FFW_LOOP void head_update(const HeadBatch<T>& batch, const Sgd<T>& sgd, int64_t begin, int64_t end) {
  constexpr int lanes = VectorOf<T>::lanes;
  int64_t d = begin;
  for (; d + 2 * lanes <= end; d += 2 * lanes) update_columns<2>(batch, sgd, d);
  if (d < end) update_columns<1>(batch, sgd, d);
}

template <typename T>
FFW_LOOP void head_update_bias(const HeadBatch<T>& batch, const Sgd<T>& sgd) {
  for (int64_t c = 0; c < batch.classes; ++c) {
    const T* error = batch.error + c * batch.count_stride;
    T sums[8] = {};
    int64_t row = 0;
    for (; row + 8 <= batch.count; row += 8) {
      for (int lane = 0; lane < 8; ++lane) sums[lane] += error[row + lane];
    }
    for (; row < batch.count; ++row) sums[0] += error[row];
    const T gradient = ((sums[0] + sums[1]) + (sums[2] + sums[3])) + ((sums[4] + sums[5]) + (sums[6] + sums[7]));
    batch.bias_momentum[c] = batch.bias_momentum[c] * sgd.momentum + (gradient + batch.bias[c] * sgd.weight_decay);
    batch.bias[c] -= batch.bias_momentum[c] * sgd.lr;
  }
}

// 16-bit storage ------------------------------------------------------------------------------------------------------
// By integer arithmetic that vectorises everywhere; narrowing rounds to nearest even and keeps NaN.

FFW_LOOP void widen_bfloat16(const uint16_t* __restrict in, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = bits_as<float>(static_cast<uint32_t>(in[i]) << 16);
}

FFW_LOOP void narrow_bfloat16(const float* __restrict in, uint16_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_as<uint32_t>(in[i]);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    out[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

FFW_LOOP void widen_half(const uint16_t* __restrict in, float* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = in[i] & 0x7fffu, sign = static_cast<uint32_t>(in[i] & 0x8000u) << 16;
    const float normal = bits_as<float>((magnitude << 13) + 0x70000000u) * 1.925929944387236e-34f;  // * 2^-112
    const float subnormal = bits_as<float>(magnitude | 0x3f000000u) - 0.5f;  // magnitude * 2^-24, exactly
    out[i] = bits_as<float>(bits_as<uint32_t>(magnitude < 0x0400u ? subnormal : normal) | sign);
  }
}

FFW_LOOP void narrow_half(const float* __restrict in, uint16_t* __restrict out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = bits_as<uint32_t>(in[i]), magnitude = bits & 0x7fffffffu;
    const uint32_t normal = (magnitude + 0xfffu + ((magnitude >> 13) & 1u) - 0x38000000u) >> 13;
    const uint32_t subnormal = bits_as<uint32_t>(bits_as<float>(magnitude) + 0.5f) - 0x3f000000u;
    uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
    half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to infinity
    half = magnitude > 0x7f800000u ? 0x7e00u : half;
    out[i] = static_cast<uint16_t>(half | ((bits >> 16) & 0x8000u));
  }
}

// Tables --------------------------------------------------------------------------------------------------------------

#define FFW_KINDS(loop) \
  { loop<Kind::ffw, T>, loop<Kind::hard, T>, loop<Kind::bernoulli, T>, loop<Kind::concrete, T> }

template <typename T>
constexpr Loops<T> table() {
  return {uniform<T>,
          FFW_KINDS(gate_weight),
          FFW_KINDS(gate_weight_backward),
          FFW_KINDS(adam_step),
          FFW_KINDS(gate_weight_and_movement),
          softmax<T>,
          VectorOf<T>::lanes,
          head_errors<T>,
          head_update<T>,
          head_update_bias<T>};
}

#undef FFW_KINDS


constexpr InstructionSet set{FFW_ISA_NAME,
                             table<float>(),
                             table<double>(),
                             {widen_bfloat16, narrow_bfloat16, widen_half, narrow_half},
                             tanh};

}  // namespace FFW_ISA
}  // namespace ffw::cpu

// The gate's arithmetic, once, for every compiled kernel: plain C++, CUDA C++ and CUDA C++ emulated on the CPU.
//
// ffw_fast/gates.py and ffw_fast/philox.py hold the same in PyTorch and are what this file is tested against. Header
// only, no includes of PyTorch. Everything is a template on float or double; 16-bit values are widened by the caller.
//
// Sampled masks must be the same bits on every backend, so whatever decides one (Philox, reproducible_exp, the
// comparisons) rounds after every single operation: plain C++ must be compiled with -ffp-contract=off, and device code
// goes through multiply() and add(), which the compiler may not contract.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// FFW_HD marks what runs on the host and on the device. Loops over gates vectorise only if everything in them is
// inlined, hence the attribute.
#if defined(__CUDACC__)
#define FFW_HD __host__ __device__
#define FFW_INLINE __forceinline__
#else
#define FFW_HD
#if defined(__GNUC__)
#define FFW_INLINE inline __attribute__((always_inline))
#else
#define FFW_INLINE inline
#endif
#endif

namespace ffw {

// How a score becomes a gate; the numbers are those of ffw_fast.gates.GateKind.
enum class Kind : int { ffw = 0, hard = 1, bernoulli = 2, concrete = 3 };

constexpr int kind_count = 4;

FFW_HD constexpr bool is_random(Kind kind) { return kind == Kind::bernoulli || kind == Kind::concrete; }

// Whether the backward reads the uniform number, too.
FFW_HD constexpr bool has_random_slope(Kind kind) { return kind == Kind::concrete; }

// Roundings ---------------------------------------------------------------------------------------------------------

FFW_HD FFW_INLINE float multiply(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fmul_rn(a, b);
#else
  return a * b;
#endif
}

FFW_HD FFW_INLINE double multiply(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dmul_rn(a, b);
#else
  return a * b;
#endif
}

FFW_HD FFW_INLINE float add(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fadd_rn(a, b);
#else
  return a + b;
#endif
}

FFW_HD FFW_INLINE double add(double a, double b) {
#if defined(__CUDA_ARCH__)
  return __dadd_rn(a, b);
#else
  return a + b;
#endif
}

template <typename To, typename From>
FFW_HD FFW_INLINE To bits_as(From value) {
  static_assert(sizeof(To) == sizeof(From), "bits_as keeps the size");
  To result;
  memcpy(&result, &value, sizeof(result));
  return result;
}

FFW_HD FFW_INLINE float absolute(float x) { return fabsf(x); }
FFW_HD FFW_INLINE double absolute(double x) { return fabs(x); }

// a / b and the root of x where nothing is compared. On a device in float to 2 and 1 units in the last place: the exact
// ones are subroutines there. |b| must be below 2^126.
FFW_HD FFW_INLINE float quotient(float a, float b) {
#if defined(__CUDA_ARCH__)
  return __fdividef(a, b);
#else
  return a / b;
#endif
}

FFW_HD FFW_INLINE double quotient(double a, double b) { return a / b; }

FFW_HD FFW_INLINE float square_root(float x) {
#if defined(__CUDA_ARCH__)
  float root;
  asm("sqrt.approx.f32 %0, %1;" : "=f"(root) : "f"(x));
  return root;
#else
  return sqrtf(x);
#endif
}

FFW_HD FFW_INLINE double square_root(double x) { return sqrt(x); }

// 1 / T, rounded once in the precision of the gates, so that every backend sees the same m / T.
template <typename T>
FFW_HD FFW_INLINE T inverse_temperature(float temperature) {
#if defined(__CUDA_ARCH__)
  if constexpr (sizeof(T) == sizeof(float)) {
    // Of the three floats about the approximate quotient, the one with the smallest remainder 1 - T r, which fmaf
    // computes exactly, is the rounded quotient.
    const float guess = __fdividef(1.0f, temperature);
    float best = guess, smallest = fabsf(fmaf(-temperature, guess, 1.0f));
    for (int step = -1; step <= 1; step += 2) {
      const float other = __int_as_float(__float_as_int(guess) + step);
      const float remainder = fabsf(fmaf(-temperature, other, 1.0f));
      if (remainder < smallest) best = other, smallest = remainder;
    }
    return best;
  }
#endif
  return T(1) / T(temperature);
}

// Exponential and logarithm -----------------------------------------------------------------------------------------

// Between these the exponential is a normal number; those of float are also in gates.py.
template <typename T>
constexpr T lowest_exponent = sizeof(T) == sizeof(float) ? -87 : -708;
template <typename T>
constexpr T highest_exponent = sizeof(T) == sizeof(float) ? 88 : 709;

// exp(x) of x between them by additions and multiplications in a fixed order, to about one unit in the last place; NaN
// stays NaN. Operation by operation the one of gates.py.
FFW_HD FFW_INLINE float exp_within(float x) {
  // Adding 1.5 * 2^23 leaves the nearest integer (ties to even) in the low bits of the sum.
  const float shift = 12582912.0f;
  const float shifted = add(multiply(x, 1.44269504088896341f), shift);
  const float exponent = add(shifted, -shift);
  const float rest =
      add(add(x, -multiply(exponent, 0.693359375f)), -multiply(exponent, -2.12194440e-4f));
  float polynomial = 1.9875691500e-4f;
  polynomial = add(multiply(polynomial, rest), 1.3981999507e-3f);
  polynomial = add(multiply(polynomial, rest), 8.3334519073e-3f);
  polynomial = add(multiply(polynomial, rest), 4.1665795894e-2f);
  polynomial = add(multiply(polynomial, rest), 1.6666665459e-1f);
  polynomial = add(multiply(polynomial, rest), 0.5f);
  const float value = add(add(multiply(polynomial, multiply(rest, rest)), rest), 1.0f);
  const uint32_t integer = bits_as<uint32_t>(shifted) - bits_as<uint32_t>(shift);
  return multiply(value, bits_as<float>((integer + 127u) << 23));
}

// The same in double precision. The PyTorch kernels use the library's exponential here: its last bit may differ, which
// no sampled mask will notice.
FFW_HD FFW_INLINE double exp_within(double x) {
  const double shift = 6755399441055744.0;  // 1.5 * 2^52
  const double shifted = x * 1.44269504088896340736 + shift;
  const double exponent = shifted - shift;
  const double rest = (x - exponent * 0.693145751953125) - exponent * 1.42860682030941723212e-6;
  double polynomial = 1.0 / 6227020800.0;  // Taylor's series to rest^13 / 13!, |rest| <= ln(2) / 2
  polynomial = polynomial * rest + 1.0 / 479001600.0;
  polynomial = polynomial * rest + 1.0 / 39916800.0;
  polynomial = polynomial * rest + 1.0 / 3628800.0;
  polynomial = polynomial * rest + 1.0 / 362880.0;
  polynomial = polynomial * rest + 1.0 / 40320.0;
  polynomial = polynomial * rest + 1.0 / 5040.0;
  polynomial = polynomial * rest + 1.0 / 720.0;
  polynomial = polynomial * rest + 1.0 / 120.0;
  polynomial = polynomial * rest + 1.0 / 24.0;
  polynomial = polynomial * rest + 1.0 / 6.0;
  polynomial = polynomial * rest + 0.5;
  const double value = (polynomial * (rest * rest) + rest) + 1.0;
  const uint64_t integer = bits_as<uint64_t>(shifted) - bits_as<uint64_t>(shift);
  return value * bits_as<double>((integer + 1023u) << 52);
}

// exp(x), of the nearest x that has a normal one.
template <typename T>
FFW_HD FFW_INLINE T reproducible_exp(T x) {
  x = x < lowest_exponent<T> ? lowest_exponent<T> : x;  // a comparison with NaN is false and keeps it
  x = x > highest_exponent<T> ? highest_exponent<T> : x;
  return exp_within(x);
}

// exp(x) for x <= 0 where nothing is compared: 0 where it is no normal number.
template <typename T>
FFW_HD FFW_INLINE T decay(T x) {
  return x < lowest_exponent<T> ? T(0) : exp_within(x);
}

// A normal positive x as rest * 2^exponent, the rest in [sqrt(1/2), sqrt(2)).
template <typename T>
struct Split {
  T rest, exponent;
};

FFW_HD FFW_INLINE Split<float> split(float x) {
  const uint32_t offset = bits_as<uint32_t>(x) - 0x3f3504f3u;
  return {bits_as<float>((offset & 0x007fffffu) + 0x3f3504f3u),
          static_cast<float>(static_cast<int32_t>(offset) >> 23)};
}

FFW_HD FFW_INLINE Split<double> split(double x) {
  const uint64_t offset = bits_as<uint64_t>(x) - 0x3fe6a09e667f3bcdull;
  return {bits_as<double>((offset & 0x000fffffffffffffull) + 0x3fe6a09e667f3bcdull),
          static_cast<double>(static_cast<int32_t>(offset >> 32) >> 20)};  // 64-bit shifts of signed numbers are slow
}

// log(2^exponent (1 + s) / (1 - s)) for |s| <= 1/3: the series of 2 artanh(s).
FFW_HD FFW_INLINE float logarithm_of(float exponent, float s) {
  const float z = s * s;
  float series = 1.0f / 15.0f;
  series = series * z + 1.0f / 13.0f;
  series = series * z + 1.0f / 11.0f;
  series = series * z + 1.0f / 9.0f;
  series = series * z + 1.0f / 7.0f;
  series = series * z + 1.0f / 5.0f;
  series = series * z + 1.0f / 3.0f;
  return exponent * 0.693359375f + (2.0f * s + (2.0f * s * z * series + exponent * -2.12194440e-4f));
}

FFW_HD FFW_INLINE double logarithm_of(double exponent, double s) {
  const double z = s * s;
  double series = 1.0 / 33.0;
  series = series * z + 1.0 / 31.0;
  series = series * z + 1.0 / 29.0;
  series = series * z + 1.0 / 27.0;
  series = series * z + 1.0 / 25.0;
  series = series * z + 1.0 / 23.0;
  series = series * z + 1.0 / 21.0;
  series = series * z + 1.0 / 19.0;
  series = series * z + 1.0 / 17.0;
  series = series * z + 1.0 / 15.0;
  series = series * z + 1.0 / 13.0;
  series = series * z + 1.0 / 11.0;
  series = series * z + 1.0 / 9.0;
  series = series * z + 1.0 / 7.0;
  series = series * z + 1.0 / 5.0;
  series = series * z + 1.0 / 3.0;
  return exponent * 0.693145751953125 + (2.0 * s + (2.0 * s * z * series + exponent * 1.42860682030941723212e-6));
}

// log(x) of a normal positive x.
template <typename T>
FFW_HD FFW_INLINE T logarithm(T x) {
  const Split<T> a = split(x);
  return logarithm_of(a.exponent, quotient(a.rest - 1, a.rest + 1));
}

// log(u / (1 - u)) of u in (0, 1), with one series and one division.
template <typename T>
FFW_HD FFW_INLINE T log_odds(T u) {
  const Split<T> a = split(u), b = split(1 - u);
  return logarithm_of(a.exponent - b.exponent, quotient(a.rest - b.rest, a.rest + b.rest));
}

// Uniform numbers: Philox4x32-10 (Salmon et al., SC 2011) -----------------------------------------------------------

// What keys one tensor's numbers: the int64 tensor [seed, number, first element] of ffw_fast.philox.
struct Draw {
  int64_t seed, number, first_element;
};

struct Words {
  uint32_t word[4];
};

FFW_HD FFW_INLINE uint32_t low_word(uint64_t value) { return static_cast<uint32_t>(value); }
FFW_HD FFW_INLINE uint32_t high_word(uint64_t value) { return static_cast<uint32_t>(value >> 32); }

FFW_HD FFW_INLINE Words philox4x32(uint64_t block, uint64_t draw, uint64_t seed) {
  uint32_t c0 = low_word(block), c1 = high_word(block), c2 = low_word(draw), c3 = high_word(draw);
  uint32_t key0 = low_word(seed), key1 = high_word(seed);
#if defined(__CUDACC__)
#pragma unroll
#elif defined(__GNUC__) && !defined(__clang__)
#pragma GCC unroll 10
#endif
  for (int round = 0; round < 10; ++round) {
    const uint64_t product0 = static_cast<uint64_t>(c0) * 0xD2511F53u;
    const uint64_t product1 = static_cast<uint64_t>(c2) * 0xCD9E8D57u;
    c0 = high_word(product1) ^ c1 ^ key0;
    c1 = low_word(product1);
    c2 = high_word(product0) ^ c3 ^ key1;
    c3 = low_word(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  return Words{{c0, c1, c2, c3}};
}

// The odd multiple of 2^-24 in (0, 1) that a word stands for: u and 1 - u are exact.
FFW_HD FFW_INLINE float uniform_of_word(uint32_t word) {
  return static_cast<float>(static_cast<int32_t>((word >> 9) * 2u + 1u)) * 5.9604644775390625e-8f;
}

// The Philox block that holds elements 4 * quad .. 4 * quad + 3 of the tensor.
FFW_HD FFW_INLINE uint64_t philox_block(const Draw& draw, int64_t quad) {
  return static_cast<uint64_t>(quad + (draw.first_element >> 2));
}

// The uniform number of one element; kernels that take four elements at a time use the block at once.
FFW_HD FFW_INLINE float uniform_of_element(const Draw& draw, int64_t element) {
  const Words words = philox4x32(philox_block(draw, element >> 2), draw.number, draw.seed);
  return uniform_of_word(words.word[element & 3]);
}

// Gates -------------------------------------------------------------------------------------------------------------
// m: score, inverse: 1 / T, u: uniform number, read by the random kinds only.

// What the backward's sigmoid is taken of, before the division by T.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_argument(T m, T u) {
  if constexpr (kind == Kind::concrete) {
    return m + log_odds(u);
  } else {
    return m;
  }
}

// What costs most of a gate, and what its movement is computed of, too.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_stem(T m, T inverse, T u) {
  if constexpr (kind == Kind::ffw) {  // the gate where m < 0, of the exponential that its slope has, too
    const T exponential = decay(-absolute(m * inverse));
    return quotient(2 * exponential, 1 + exponential);
  } else if constexpr (kind == Kind::bernoulli) {
    return reproducible_exp(-multiply(m, inverse));
  } else {
    return gate_argument<kind>(m, u);
  }
}

template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_of_stem(T stem, T m, T u) {
  if constexpr (kind == Kind::ffw) {
    return m >= 0 ? T(1) : stem;
  } else if constexpr (kind == Kind::hard) {
    return m >= 0 ? T(1) : T(0);
  } else if constexpr (kind == Kind::bernoulli) {  // u < 1 / (1 + exp(-m/T))
    return multiply(u, add(T(1), stem)) < 1 ? T(1) : T(0);
  } else {  // m + log(u / (1 - u)) >= 0
    return u >= multiply(1 - u, reproducible_exp(-m)) ? T(1) : T(0);
  }
}

// g: the gate itself.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_value(T m, T inverse, T u) {
  return gate_of_stem<kind>(gate_stem<kind>(m, inverse, u), m, u);
}

// dg/dm of an argument: s (1 - s) / T, doubled for ffw, accurate in both tails.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T slope_of_argument(T argument, T inverse) {
  const T exponential = decay(-absolute(argument * inverse));
  const T sum = 1 + exponential;
  const T slope = quotient(exponential, sum * sum) * inverse;
  return kind == Kind::ffw ? 2 * slope : slope;
}

// dg/dm: the straight-through derivative, also where the forward of ffw is clipped.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_slope(T m, T inverse, T u) {
  return slope_of_argument<kind>(gate_argument<kind>(m, u), inverse);
}

// |dg / d ln T|: how far the gate moves as the temperature falls; zero where the forward of ffw is clipped.
template <Kind kind, typename T>
FFW_HD FFW_INLINE T movement_of_stem(T stem, T m, T inverse) {
  if constexpr (kind == Kind::ffw) {  // 2 s (1 - s) = g (2 - g) / 2
    return m < 0 ? (stem - 2) * stem * (inverse / 2) * m : T(0);
  } else if constexpr (kind == Kind::bernoulli) {  // 1 - s = exp(-m/T) s; either may be too small to be squared
    const T x = multiply(m, inverse), s = quotient(T(1), add(T(1), stem));
    return -absolute(x) < lowest_exponent<T> ? T(0) : stem * s * s * absolute(x);
  } else {
    return absolute(slope_of_argument<kind>(stem, inverse) * stem);
  }
}

template <Kind kind, typename T>
FFW_HD FFW_INLINE T gate_movement(T m, T inverse, T u) {
  return movement_of_stem<kind>(gate_stem<kind>(m, inverse, u), m, inverse);
}

// Adam --------------------------------------------------------------------------------------------------------------

// What one step of Adam needs of its settings, the same for all elements.
template <typename T>
struct Adam {
  T one_minus_beta1, beta2, one_minus_beta2;
  T size;           // lr / (1 - beta1^step)
  T inverse_scale;  // 1 / sqrt(1 - beta2^step)
  T eps, weight_decay;
};

template <typename T>
FFW_HD inline Adam<T> adam_of_step(double step, double lr, double beta1, double beta2, double eps,
                                   double weight_decay) {
  return {static_cast<T>(1 - beta1),
          static_cast<T>(beta2),
          static_cast<T>(1 - beta2),
          static_cast<T>(lr / (1 - pow(beta1, step))),
          static_cast<T>(1 / sqrt(1 - pow(beta2, step))),
          static_cast<T>(eps),
          static_cast<T>(weight_decay)};
}

// The new score of one element, from the gradient dJ/dm without weight decay (L2: it is added to the gradient).
template <typename T>
FFW_HD FFW_INLINE T adam_update(T score, T gradient, T& exp_avg, T& exp_avg_sq, const Adam<T>& adam) {
  gradient += adam.weight_decay * score;
  exp_avg += adam.one_minus_beta1 * (gradient - exp_avg);
  exp_avg_sq = exp_avg_sq * adam.beta2 + adam.one_minus_beta2 * gradient * gradient;
  return score - quotient(adam.size * exp_avg, square_root(exp_avg_sq) * adam.inverse_scale + adam.eps);
}

}  // namespace ffw

// Runs the CUDA kernels' own sources under emulation.h against plain double-precision loops that stand here, without
// PyTorch: for sanitizers and for mutated sources, where a build must take seconds.
//
//   driver {gate|adam|head|information|objective|grid|all} ORDER [tiny]
//
// Ends with 0 if all numbers are right, 1 and a line that says which are not, 3 if the emulation stopped. Outputs are
// NaN before every launch, nothing may be written behind an array's end, and some begin off 16-byte boundaries.
// With FFW_DRIVER_ONLY_{GATE,ADAM,HEAD,INFORMATION,OBJECTIVE} only that part is compiled, in float32 alone (with
// FFW_DRIVER_16_BIT: Adam beside float16 weights).
#include <limits>
#include <string>

#if defined(FFW_DRIVER_ONLY_GATE) || defined(FFW_DRIVER_ONLY_ADAM) || defined(FFW_DRIVER_ONLY_HEAD) || \
    defined(FFW_DRIVER_ONLY_INFORMATION) || defined(FFW_DRIVER_ONLY_OBJECTIVE)
#include "gate.cuh"
#include "gated_adam.cuh"
#include "linear_head.cuh"
#include "mutual_information.cuh"
#include "objective.cuh"
#define FFW_DRIVER_ONLY 1
template void ffw::cuda::launch_add_movement(double*, const float*, int64_t, cudaStream_t);
#else
#include "double.cu"  // all kernels, and their instances in double precision
#define FFW_DRIVER_ONLY 0
#endif

using namespace ffw;
using namespace ffw::cuda;

namespace {  // of which a part alone uses but some

[[maybe_unused]] bool tiny = false;  // for real threads

// Arrays ------------------------------------------------------------------------------------------------------------

#if defined(__SANITIZE_ADDRESS__)
constexpr int guards = 0;  // AddressSanitizer has its own
#else
constexpr int guards = 8;
#endif
constexpr double guard = 77;

// `count` elements from the `offset`th element of memory that begins at a multiple of 16 bytes.
template <typename T>
class Array {
 public:
  explicit Array(int64_t count, int offset = 0)
      : count_(count), memory_(new T[count + offset + guards]), data_(memory_.get() + offset) {
    for (int64_t i = 0; i < count; ++i) set(i, std::numeric_limits<double>::quiet_NaN());
    for (int64_t i = count; i < count + guards; ++i) set(i, guard);
  }
  ~Array() {
    for (int64_t i = count_; i < count_ + guards; ++i) {
      if (at(i) == guard) continue;
      std::printf("element %lld of an array of %lld was written\n", static_cast<long long>(i),
                  static_cast<long long>(count_));
      std::fflush(stdout);
      std::_Exit(1);
    }
  }
  T* get() const { return data_; }
  operator T*() const { return data_; }
  void set(int64_t i, double x) { put(static_cast<float>(x), x, data_[i]); }
  double at(int64_t i) const { return static_cast<double>(widen(data_[i])); }

 private:
  template <typename U>
  static void put(float x, double, U& out) {
    narrow(x, out);
  }
  static void put(float, double x, double& out) { out = x; }
  int64_t count_;
  std::unique_ptr<T[]> memory_;
  T* data_;
};

std::mt19937 random_source(7);
double uniform() { return std::uniform_real_distribution<double>(-1, 1)(random_source); }

template <typename T>
void fill(Array<T>& array, int64_t count, double scale) {
  for (int64_t i = 0; i < count; ++i) array.set(i, scale * uniform());
}

[[maybe_unused]] void check(const char* what, int64_t index, double got, double expected, double tolerance) {
  const double error = std::fabs(got - expected);
  if (error <= tolerance * (1 + std::fabs(expected)) || got == expected) return;  // false for NaN
  std::printf("%s[%lld] is %.9g, expected %.9g\n", what, static_cast<long long>(index), got, expected);
  std::fflush(stdout);
  std::_Exit(1);
}

template <typename T>
constexpr double tolerance_of = sizeof(T) == 8                 ? 1e-10
                                : sizeof(T) == 4               ? 3e-6
                                : std::is_same_v<T, __half>    ? 2e-3
                                                               : 1e-2;

// Gates ---------------------------------------------------------------------------------------------------------------

template <typename Run>
void for_kind_constant(const Run& run) {
  for (int kind = 0; kind < kind_count; ++kind) for_kind(static_cast<Kind>(kind), run);
}

struct Gate {
  double value, slope, movement;
};

// By the definitions, from the score and the temperature as the kernel sees them. A mask is sampled in the kernel's own
// precision: a difference of rounding would flip it.
template <Kind kind, typename T>
Gate gate_of(double m, float temperature, const Draw& draw, int64_t element) {
  const double u = uniform_of_element(draw, element), t = temperature, s = 1 / (1 + std::exp(-m / t));
  const T sampled = gate_value<kind>(static_cast<T>(m), inverse_temperature<T>(temperature), static_cast<T>(u));
  const double x = kind == Kind::concrete ? m + std::log(u / (1 - u)) : m;
  const double e = std::exp(-std::fabs(x / t)), slope = (kind == Kind::ffw ? 2 : 1) * e / ((1 + e) * (1 + e)) / t;
  const double value = kind == Kind::ffw ? std::min(2 * s, 1.0) : kind == Kind::hard ? m >= 0 : sampled;
  return {value, slope, kind == Kind::ffw && m >= 0 ? 0 : std::fabs(slope * x)};
}

std::vector<int64_t> counts() {
  if (tiny) return {1029};
  return {1, 2, 3, 4, 5, 7, 8, 9, 255, 1024, 1029, 4 * 2048 + 6};
}

constexpr int64_t beyond_the_grid = largest_elementwise_grid * elementwise_threads * 4 + 1029;

template <typename Weight, typename Score>
void test_gate(const std::vector<int64_t>& counts) {
  for (const int64_t count : counts) {
    for (const int offset : {0, 1}) {
      if (offset == 1 && (tiny || count == beyond_the_grid)) continue;
      Array<Weight> weight(count, offset), gated(count, offset), grad(count, offset);
      Array<Score> scores(count), scores_grad(count);
      fill(weight, count, 1), fill(grad, count, 1), fill(scores, count, 0.1);
      const float temperature = 0.05f;
      const int64_t numbers[3] = {-5, 3, 1 << 20};
      const Draw draw = load_draw(numbers);
      for_kind_constant([&](auto k) {
        if (k() != Kind::ffw && count == beyond_the_grid) return;
        for (int64_t i = 0; i < count; ++i) gated.set(i, NAN), scores_grad.set(i, NAN);
        launch_gate_weight<Weight, Score>({gated, weight, scores, &temperature, numbers, count, false}, k(), nullptr);
        launch_gate_weight_backward<Weight, Score>(
            {scores_grad, grad, weight, scores, &temperature, numbers, count, false}, k(), nullptr);
        for (int64_t i = 0; i < count; ++i) {
          const Gate gate = gate_of<k(), Working<Score>>(scores.at(i), temperature, draw, i);
          check("gated", i, gated.at(i), weight.at(i) * gate.value, tolerance_of<Weight>);
          check("scores_grad", i, scores_grad.at(i), grad.at(i) * weight.at(i) * gate.slope, tolerance_of<Score>);
        }
      });
    }
  }
}

template <typename Weight, typename Score>
void test_adam(const std::vector<int64_t>& counts) {
  for (const int64_t count : counts) {
    const int offset = count % 2;
    const float temperature = 0.05f, next_temperature = 0.04f;
    const int64_t numbers[3] = {11, 4, 8}, next_numbers[3] = {11, 5, 8};
    const double beta1 = 0.9, beta2 = 0.999, eps = 1e-8, decay_rate = 1e-2;
    const AdamRates<Score> rates = {Score(1 - beta1),         Score(beta2), Score(1 - beta2),   Score(std::log(beta1)),
                                    Score(std::log(beta2)),   Score(eps),   Score(decay_rate)};
    for (const double step : {1.0, 1000.0}) {
      for_kind_constant([&](auto k) {
        if ((k() != Kind::ffw || step > 1) && count == beyond_the_grid) return;
        if (step > 1 && tiny) return;
        Array<Weight> weight(count, offset), gated(count, offset), grad(count, offset);
        Array<Score> scores(count), avg(count), avg_sq(count), step_array(1), lr(1);
        fill(weight, count, 1), fill(grad, count, 1), fill(scores, count, 0.1), fill(avg, count, 0.1);
        for (int64_t i = 0; i < count; ++i) avg_sq.set(i, 0.1 + 0.1 * uniform());
        step_array.set(0, step), lr.set(0, 1e-3);
        std::vector<double> old_scores(count), old_avg(count), old_avg_sq(count);
        for (int64_t i = 0; i < count; ++i) {
          old_scores[i] = scores.at(i), old_avg[i] = avg.at(i), old_avg_sq[i] = avg_sq.at(i);
        }
        const int64_t blocks = movement_blocks<Weight>(count);
        Array<Score> movements(blocks);
        double movement = 2, expected_movement = 2;
        launch_gated_adam<Weight, Score>({gated, scores, avg, avg_sq, weight, grad, &temperature, &next_temperature,
                                          step_array, lr, numbers, next_numbers, movements, rates, count, false},
                                         k(), nullptr);
        launch_add_movement<Score>(&movement, movements, blocks, nullptr);
        for (int64_t i = 0; i < count; ++i) {
          const Gate old_gate = gate_of<k(), Score>(old_scores[i], temperature, load_draw(numbers), i);
          const double g = grad.at(i) * weight.at(i) * old_gate.slope + decay_rate * old_scores[i];
          const double a = old_avg[i] + (1 - beta1) * (g - old_avg[i]);
          const double v = old_avg_sq[i] * beta2 + (1 - beta2) * g * g;
          const double m = old_scores[i] - 1e-3 / (1 - std::pow(beta1, step)) * a /
                                               (std::sqrt(v) / std::sqrt(1 - std::pow(beta2, step)) + eps);
          check("exp_avg", i, avg.at(i), a, tolerance_of<Score>);
          check("exp_avg_sq", i, avg_sq.at(i), v, tolerance_of<Score>);
          check("scores", i, scores.at(i), m, tolerance_of<Score>);
          // The new gate is that of the new score as it was rounded.
          const Gate gate = gate_of<k(), Score>(scores.at(i), next_temperature, load_draw(next_numbers), i);
          check("gated", i, gated.at(i), weight.at(i) * gate.value, tolerance_of<Weight>);
          expected_movement += gate.movement;
        }
        check("movement", 0, movement, expected_movement, tolerance_of<Score>);
      });
    }
  }
}

// Heads ---------------------------------------------------------------------------------------------------------------

struct HeadShape {
  int64_t samples, batch_size, epochs;
  int width, classes, heads;
  int64_t patience;
  // Shared memory for so many samples a buffer, and of the head what is said; 0: an A100's, for all of it.
  int fitting = 0;
  Placement placement = Placement::shared;
};

// The loop of ops.fit_linear_head_default_ in double precision; weights as [heads, classes, width].
struct ReferenceHeads {
  std::vector<double> weight, bias, weight_momentum, bias_momentum, losses, plateau;
};

template <typename T>
void reference_fit(const HeadShape& shape, const Array<T>& features, const std::vector<int64_t>& labels,
                   const std::vector<int64_t>& order, ReferenceHeads& r) {
  const int K = shape.classes, D = shape.width, H = shape.heads;
  r.losses.assign(shape.epochs, NAN);
  for (int64_t epoch = 0; epoch < shape.epochs; ++epoch) {
    double total = 0;
    for (int64_t start = 0; start < shape.samples; start += shape.batch_size) {
      const int64_t batch = std::min(shape.batch_size, shape.samples - start);
      std::vector<double> weight_grad(r.weight.size()), bias_grad(r.bias.size()), p(K);
      for (int64_t i = 0; i < batch; ++i) {
        const int64_t sample = order[epoch * shape.samples + start + i];
        for (int h = 0; h < H; ++h) {
          double largest = -1e300, sum = 0;
          for (int k = 0; k < K; ++k) {
            p[k] = r.bias[h * K + k];
            for (int d = 0; d < D; ++d) p[k] += r.weight[(h * K + k) * D + d] * features.at(sample * D + d);
            largest = std::max(largest, p[k]);
          }
          const int64_t label = labels[sample * H + h];
          const double picked = p[label] - largest;
          for (double& x : p) sum += x = std::exp(x - largest);
          total += std::log(sum) - picked;
          for (int k = 0; k < K; ++k) {
            const double error = (p[k] / sum - (k == label)) / static_cast<double>(batch);
            bias_grad[h * K + k] += error;
            for (int d = 0; d < D; ++d) weight_grad[(h * K + k) * D + d] += error * features.at(sample * D + d);
          }
        }
      }
      const auto sgd = [](std::vector<double>& value, std::vector<double>& momentum, const std::vector<double>& grad) {
        for (size_t i = 0; i < value.size(); ++i) {
          momentum[i] = 0.9 * momentum[i] + grad[i] + 1e-4 * value[i];
          value[i] -= 0.1 * momentum[i];
        }
      };
      sgd(r.weight, r.weight_momentum, weight_grad);
      sgd(r.bias, r.bias_momentum, bias_grad);
    }
    const double loss = total / static_cast<double>(labels.size());
    r.losses[epoch] = loss;
    if (loss <= (1 - 1e-3) * r.plateau[0]) {
      r.plateau[0] = loss, r.plateau[1] = 0;
    } else if (++r.plateau[1] > static_cast<double>(shape.patience)) {
      r.plateau[2] = 1;
      break;
    }
  }
}

template <typename T>
void test_head(const HeadShape& shape) {
  if (shape.fitting > 0) {
    emulation::shared_limit =
        head_bytes<T>(shape.width, shape.classes, shape.placement) +
        shape.fitting * head_bytes_a_sample<T>(shape.width, shape.classes, shape.placement);
  }
  const int64_t rows = static_cast<int64_t>(shape.heads) * shape.classes, parameters = rows * shape.width;
  Array<T> weight(parameters), weight_momentum(parameters), bias(rows), bias_momentum(rows);
  Array<T> features(shape.samples * shape.width), totals(shape.epochs * shape.heads);
  Array<double> losses(shape.epochs), plateau(3);
  fill(weight, parameters, 0.3), fill(weight_momentum, parameters, 0.1), fill(bias, rows, 0.3);
  fill(bias_momentum, rows, 0.1), fill(features, shape.samples * shape.width, 1);
  std::vector<int64_t> labels(shape.samples * shape.heads), order(shape.epochs * shape.samples);
  for (int64_t& label : labels) label = random_source() % shape.classes;
  for (int64_t epoch = 0; epoch < shape.epochs; ++epoch) {
    const auto begin = order.begin() + epoch * shape.samples;
    for (int64_t i = 0; i < shape.samples; ++i) begin[i] = i;
    std::shuffle(begin, begin + shape.samples, random_source);
  }
  ReferenceHeads r;
  for (int64_t i = 0; i < parameters; ++i) {
    r.weight.push_back(weight.at(i)), r.weight_momentum.push_back(weight_momentum.at(i));
  }
  for (int64_t i = 0; i < rows; ++i) r.bias.push_back(bias.at(i)), r.bias_momentum.push_back(bias_momentum.at(i));
  // A first epoch that is no improvement, so that a short run meets the plateau.
  r.plateau = {shape.patience == 0 ? 1e-3 : INFINITY, 0, 0};
  for (int i = 0; i < 3; ++i) plateau.set(i, r.plateau[i]);
  unsigned arrivals = 0;

  HeadArguments<T> a = {};
  a.weight = weight, a.bias = bias, a.weight_momentum = weight_momentum, a.bias_momentum = bias_momentum;
  a.plateau = plateau, a.losses = losses, a.totals = totals, a.arrivals = &arrivals;
  a.features = features, a.labels = labels.data(), a.order = order.data();
  a.samples = shape.samples, a.epoch_size = static_cast<int>(shape.samples);
  a.epochs = static_cast<int>(shape.epochs), a.batch_size = static_cast<int>(shape.batch_size);
  a.width = shape.width, a.classes = shape.classes, a.heads = shape.heads;
  a.lr = T(0.1), a.momentum = T(0.9), a.weight_decay = T(1e-4), a.keep = T(1 - 1e-3);
  a.inverse_count = T(1.0 / labels.size()), a.patience = shape.patience;
  launch_fit_linear_head(a, nullptr);
  emulation::shared_limit = 163 * 1024;

  reference_fit(shape, features, labels, order, r);
  const double tolerance = 3 * tolerance_of<T>;
  for (int64_t i = 0; i < parameters; ++i) check("weight", i, weight.at(i), r.weight[i], tolerance);
  for (int64_t i = 0; i < parameters; ++i) {
    check("weight_momentum", i, weight_momentum.at(i), r.weight_momentum[i], tolerance);
  }
  for (int64_t i = 0; i < rows; ++i) check("bias", i, bias.at(i), r.bias[i], tolerance);
  for (int64_t i = 0; i < rows; ++i) check("bias_momentum", i, bias_momentum.at(i), r.bias_momentum[i], tolerance);
  for (int64_t i = 0; i < shape.epochs; ++i) {
    if (std::isnan(losses.at(i)) && std::isnan(r.losses[i])) continue;
    check("losses", i, losses.at(i), r.losses[i], tolerance);
  }
  for (int i = 0; i < 3; ++i) check("plateau", i, plateau.at(i), r.plateau[i], tolerance);
}

template <typename T>
void test_heads() {
  if (tiny) {
    test_head<T>({9, 5, 2, 5, 3, 1, 5});
    test_head<T>({6, 4, 2, 33, 2, 2, 5});
    return;
  }
  test_head<T>({1, 1, 1, 1, 1, 1, 5});
  test_head<T>({23, 10, 3, 37, 10, 1, 5});
  test_head<T>({23, 10, 3, 40, 10, 2, 5});      // rows of whole packs
  test_head<T>({9, 100, 4, 65, 9, 3, 0});       // on a plateau at once
  test_head<T>({32, 32, 2, 200, 10, 1, 5});     // 16 lanes to a logit
  test_head<T>({33, 33, 2, 264, 10, 1, 5});     // 8
  test_head<T>({65, 60, 2, 12, 33, 1, 5});      // 16 lanes to a weight
  test_head<T>({300, 300, 2, 6, 3, 1, 5, 170});  // a minibatch of two chunks, another one of four and of one
  test_head<T>({50, 35, 2, 40, 10, 2, 5, 25});
  for (const int width : {37, 40}) {
    test_head<T>({23, 10, 2, width, 10, 2, 5, 10, Placement::parameters_shared});
    test_head<T>({23, 10, 2, width, 10, 2, 5, 10, Placement::weight_shared});
    test_head<T>({23, 10, 2, width, 10, 2, 5, 3, Placement::global});
  }
}

// Mutual information --------------------------------------------------------------------------------------------------

std::vector<double> softmax(const std::vector<double>& logits) {
  std::vector<double> p(logits);
  double sum = 0;
  for (double& x : p) sum += x = std::exp(x);
  for (double& x : p) x /= sum;
  return p;
}

// The MI of one head's samples, in nats, from their labels and probabilities [n, classes]; a label below 0 does not
// count. `grad`: derivatives of it by the logits.
struct ReferenceInformation {
  std::vector<double> joint, grad;
  double information = 0;

  ReferenceInformation(const std::vector<double>& p, const std::vector<int64_t>& labels, int classes)
      : joint(classes * classes), grad(p.size()) {
    double count = 0;
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] < 0) continue;
      count += 1;
      for (int c = 0; c < classes; ++c) joint[labels[i] * classes + c] += p[i * classes + c];
    }
    if (count == 0) return;
    std::vector<double> rows(classes), columns(classes), slope(joint.size());
    for (double& entry : joint) entry = std::max(entry, 1e-15) / count;
    for (size_t e = 0; e < joint.size(); ++e) rows[e / classes] += joint[e], columns[e % classes] += joint[e];
    for (size_t e = 0; e < joint.size(); ++e) {
      const double independent = rows[e / classes] * columns[e % classes];
      const double ratio = std::log(joint[e] / std::max(independent, 1e-15));
      information += joint[e] * ratio;
      slope[e] = ratio + 1;
      for (int k = 0; k < classes; ++k) {
        const size_t in_row = e / classes * classes + k, in_column = k * classes + e % classes;
        if (rows[e / classes] * columns[k] >= 1e-15) slope[e] -= joint[in_row] / rows[e / classes];
        if (rows[k] * columns[e % classes] >= 1e-15) slope[e] -= joint[in_column] / columns[e % classes];
      }
    }
    for (size_t i = 0; i < labels.size(); ++i) {
      if (labels[i] < 0) continue;
      const double* s = slope.data() + labels[i] * classes;
      double inner = 0;
      for (int c = 0; c < classes; ++c) inner += p[i * classes + c] * s[c];
      for (int c = 0; c < classes; ++c) grad[i * classes + c] = p[i * classes + c] * (s[c] - inner) / count;
    }
  }
};

// Of one head, from logits [n, heads, classes].
template <typename Logit>
std::vector<double> probabilities(const Array<Logit>& logits, int64_t n, int heads, int head, int classes) {
  std::vector<double> all;
  for (int64_t i = 0; i < n; ++i) {
    std::vector<double> row;
    for (int c = 0; c < classes; ++c) row.push_back(logits.at((i * heads + head) * classes + c));
    row = softmax(row);
    all.insert(all.end(), row.begin(), row.end());
  }
  return all;
}

std::vector<int64_t> random_labels(int64_t count, int classes) {  // one label unseen
  std::vector<int64_t> labels(count);
  for (int64_t& label : labels) label = random_source() % (classes > 2 ? classes - 1 : classes);
  return labels;
}

template <typename T>
constexpr double information_tolerance = sizeof(T) == 8 ? 1e-10 : 1e-5;

template <typename Logit>
void test_information(int64_t n, int heads, int classes) {
  using T = Working<Logit>;
  const int64_t entries = static_cast<int64_t>(classes) * classes;
  Array<Logit> logits(n * heads * classes), logits_grad(n * heads * classes);
  Array<T> information(heads), joint(heads * entries), grad(heads);
  fill(logits, n * heads * classes, 3), fill(grad, heads, 1);
  const std::vector<int64_t> labels = random_labels(n * heads, classes);
  const T inverse_log = static_cast<T>(1 / std::log(static_cast<double>(classes)));
  launch_mutual_information<Logit>({information, joint, logits, labels.data(), n, heads, classes, 0, inverse_log},
                                   nullptr);
  launch_mutual_information_backward<Logit>(
      {logits_grad, grad, logits, labels.data(), joint, n, heads, classes, inverse_log}, nullptr);

  const double tolerance = information_tolerance<T>;
  for (int h = 0; h < heads; ++h) {
    std::vector<int64_t> own;
    for (int64_t i = 0; i < n; ++i) own.push_back(labels[i * heads + h]);
    const ReferenceInformation r(probabilities(logits, n, heads, h, classes), own, classes);
    for (int64_t e = 0; e < entries; ++e) {
      check("joint", h * entries + e, joint.at(h * entries + e), r.joint[e], tolerance);
    }
    check("information", h, information.at(h), r.information * inverse_log, tolerance);
    for (int64_t i = 0; i < n; ++i) {
      for (int c = 0; c < classes; ++c) {
        const int64_t at = (i * heads + h) * classes + c;
        check("logits_grad", at, n * logits_grad.at(at), n * grad.at(h) * inverse_log * r.grad[i * classes + c],
              std::max(tolerance, tolerance_of<Logit>));
      }
    }
  }
}

template <typename Logit>
void test_informations() {
  test_information<Logit>(5, 1, 2);
  if (tiny) return;
  test_information<Logit>(100, 2, 10);
  test_information<Logit>(517, 1, 3);   // three chunks, three blocks of the backward
  test_information<Logit>(70, 1, 300);  // a chunk is what fits
}

// Objective -----------------------------------------------------------------------------------------------------------

struct ObjectiveShape {
  int64_t n;
  int targets, heads, classes;
  bool tables;
  int64_t chunk;  // how many samples there is room for, and none for the joints; 0: as much as on an A100
};

template <typename Logit>
void test_objective(const ObjectiveShape& shape) {
  using T = Working<Logit>;
  const int64_t n = shape.n;
  const int C = shape.targets, H = shape.heads, K = shape.classes;
  const double alpha = 0.7, gamma = 5, share = 0.5, inverse_log = 1 / std::log(static_cast<double>(K));
  Array<Logit> logits(n * C), by_logits(n * C), head_logits(n * H * K), by_head_logits(n * H * K);
  Array<T> losses(3), importance(H * C * K), joints(joint_entries(H, K));
  fill(logits, n * C, 3), fill(head_logits, n * H * K, 3), fill(importance, H * C * K, 2);
  const std::vector<int64_t> labels = random_labels(n, C), bias_labels = random_labels(n * H, K);
  std::vector<int64_t> aligned = random_labels(C, K);
  if (K == 2) std::fill(aligned.begin(), aligned.end(), bias_labels[H - 1]);  // with few samples, no other of a head

  ObjectiveArguments<Logit> a = {};
  a.losses = losses, a.by_logits = by_logits, a.by_head_logits = by_head_logits;
  a.logits = logits, a.labels = labels.data(), a.head_logits = head_logits, a.bias_labels = bias_labels.data();
  if (shape.tables) a.importance = importance, a.aligned = aligned.data();
  a.n = n, a.targets = C, a.heads = H, a.classes = K;
  a.alpha = T(alpha), a.gamma = T(gamma);
  a.information_scale = T(share * inverse_log), a.slope_scale = T(gamma * share * inverse_log);
  if (shape.chunk > 0) emulation::shared_limit = objective_bytes(a, shape.chunk, false);
  if (!joints_fit(a)) a.joints = joints;
  launch_objective(a, nullptr);
  emulation::shared_limit = 163 * 1024;

  const double tolerance = std::max(information_tolerance<T>, tolerance_of<Logit>);
  const std::vector<double> p = probabilities(logits, n, 1, 0, C);
  double cross_entropy = 0, information = 0;
  for (int64_t i = 0; i < n; ++i) {
    double weight = 1;
    for (int h = 0; h < H && shape.tables; ++h) {
      weight *= importance.at((h * C + labels[i]) * K + bias_labels[i * H + h]);
    }
    cross_entropy -= weight * std::log(p[i * C + labels[i]]) / static_cast<double>(n);
    for (int c = 0; c < C; ++c) {
      const double error = alpha * weight * (p[i * C + c] - (c == labels[i]));
      check("by_logits", i * C + c, n * by_logits.at(i * C + c), error, tolerance);
    }
  }
  for (int h = 0; h < H; ++h) {
    std::vector<int64_t> own;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t label = bias_labels[i * H + h];
      own.push_back(shape.tables && aligned[labels[i]] == label ? -1 : label);
    }
    const ReferenceInformation r(probabilities(head_logits, n, H, h, K), own, K);
    information += share * r.information * inverse_log;
    for (int64_t i = 0; i < n * K; ++i) {
      const int64_t at = (i / K * H + h) * K + i % K;
      check("by_head_logits", at, n * by_head_logits.at(at), n * gamma * share * inverse_log * r.grad[i], tolerance);
    }
  }
  check("losses", 0, losses.at(0), alpha * cross_entropy + gamma * information, 5 * information_tolerance<T>);
  check("losses", 1, losses.at(1), cross_entropy, information_tolerance<T>);
  check("losses", 2, losses.at(2), information, information_tolerance<T>);
}

template <typename Logit>
void test_objectives() {
  test_objective<Logit>({5, 3, 1, 2, true, 0});
  test_objective<Logit>({9, 3, 2, 3, false, 4});
  if (tiny) return;
  test_objective<Logit>({100, 10, 2, 10, false, 0});
  test_objective<Logit>({100, 10, 2, 10, true, 0});
  test_objective<Logit>({517, 4, 3, 3, true, 0});  // two chunks, joints in shared memory
  test_objective<Logit>({40, 33, 1, 70, true, 16});
}

}  // namespace

int main(int count, char** words) {
  if (count < 3) return 2;
  const std::string what = words[1];
  emulation::order = static_cast<unsigned>(std::atoi(words[2]));
  tiny = count > 3;
  const auto wanted = [&](const char* part) { return what == part || what == "all"; };
#if !FFW_DRIVER_ONLY || defined(FFW_DRIVER_ONLY_GATE)
  if (wanted("gate")) test_gate<float, float>(counts());
  if (what == "grid") test_gate<float, float>({beyond_the_grid});
#endif
#if !FFW_DRIVER_ONLY || defined(FFW_DRIVER_ONLY_ADAM)
#if defined(FFW_DRIVER_16_BIT)
  if (wanted("adam")) test_adam<__half, float>(counts());
#else
  if (wanted("adam")) test_adam<float, float>(counts());
#endif
  if (what == "grid") test_adam<float, float>({beyond_the_grid});
#endif
#if !FFW_DRIVER_ONLY || defined(FFW_DRIVER_ONLY_HEAD)
  if (wanted("head")) test_heads<float>();
#endif
#if !FFW_DRIVER_ONLY || defined(FFW_DRIVER_ONLY_INFORMATION)
  if (wanted("information")) test_informations<float>();
#endif
#if !FFW_DRIVER_ONLY || defined(FFW_DRIVER_ONLY_OBJECTIVE)
  if (wanted("objective")) test_objectives<float>();
#endif
#if !FFW_DRIVER_ONLY
  if (!tiny && wanted("gate")) {
    test_gate<__half, float>(counts()), test_gate<__nv_bfloat16, float>(counts()), test_gate<double, double>(counts());
  }
  if (!tiny && wanted("adam")) {
    test_adam<__half, float>(counts()), test_adam<__nv_bfloat16, float>(counts()), test_adam<double, double>(counts());
  }
  if (wanted("head")) test_heads<double>();
  if (wanted("information")) test_informations<__half>(), test_informations<double>();
  if (wanted("objective")) test_objectives<__half>(), test_objectives<double>();
#endif
  std::puts("right");
  return 0;
}

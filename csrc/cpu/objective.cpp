// objective: both losses of a minibatch, and the gradient of their weighted sum by the logits, in one pass over them.
#include <algorithm>
#include <cmath>
#include <optional>
#include <tuple>
#include <vector>

#include "information.h"
#include "tensors.h"

namespace ffw::cpu {
namespace {

struct Labels {
  int64_t n, targets, heads, classes;
  const int64_t* target;   // [n]
  const int64_t* bias;     // [n, heads]
  const int64_t* aligned;  // [targets], or null: every sample counts
};

struct Coefficients {
  double alpha, gamma, share;
};

bool counts(const Labels& labels, int64_t sample, int64_t head) {
  return labels.aligned == nullptr ||
         labels.bias[sample * labels.heads + head] != labels.aligned[labels.target[sample]];
}

// Importance of a sample, a product over its biases; `importance` is [heads, targets, classes], or null for 1.
template <typename T>
T weight_of(const Labels& labels, const T* importance, int64_t sample) {
  T product = 1;
  if (importance == nullptr) return product;
  for (int64_t head = 0; head < labels.heads; ++head) {
    const int64_t row = head * labels.targets + labels.target[sample];
    product *= importance[row * labels.classes + labels.bias[sample * labels.heads + head]];
  }
  return product;
}

template <typename T>
void softmax_rows(const T* logits, int64_t rows, int64_t classes, T* out) {
  const int64_t grain = std::max<int64_t>(1, 32768 / classes);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t first, int64_t last) {
    loops<T>().softmax(logits + first * classes, last - first, classes, out + first * classes);
  });
}

// Mean of r CE; its gradient times alpha goes to out [n, targets].
template <typename T>
double cross_entropy(const T* logits, const Labels& labels, const T* importance, double alpha, T* out) {
  softmax_rows(logits, labels.n, labels.targets, out);
  double total = 0;
  for (int64_t sample = 0; sample < labels.n; ++sample) {
    const T* row = logits + sample * labels.targets;
    T* p = out + sample * labels.targets;
    const int64_t target = labels.target[sample];
    // log p[target], which may be 0, by way of the largest probability, which is at least 1 / targets
    const int64_t top = std::max_element(row, row + labels.targets) - row;
    const double loss = static_cast<double>(row[top]) - row[target] - std::log(static_cast<double>(p[top]));
    const T weight = weight_of(labels, importance, sample);
    total += weight * loss;
    const T scale = static_cast<T>(alpha * weight / labels.n);
    p[target] -= 1;
    for (int64_t k = 0; k < labels.targets; ++k) p[k] *= scale;
  }
  return total / labels.n;
}

// The sum of all heads' MI, each of the samples that count for it; its gradient times `scale` goes to out
// [n, heads, classes].
template <typename T>
double information(const T* logits, const Labels& labels, double scale, T* out) {
  const int64_t classes = labels.classes, size = classes * classes, row_size = labels.heads * classes;
  softmax_rows(logits, labels.n * labels.heads, classes, out);
  std::vector<double> sums(labels.heads * size);
  std::vector<int64_t> samples(labels.heads);
  for (int64_t sample = 0; sample < labels.n; ++sample) {
    for (int64_t head = 0; head < labels.heads; ++head) {
      if (!counts(labels, sample, head)) continue;
      ++samples[head];
      double* const row = sums.data() + head * size + labels.bias[sample * labels.heads + head] * classes;
      const T* p = out + sample * row_size + head * classes;
      for (int64_t k = 0; k < classes; ++k) row[k] += p[k];
    }
  }
  double total = 0;
  std::vector<T> joint(size), slopes(labels.heads * size);
  for (int64_t head = 0; head < labels.heads; ++head) {
    const int64_t count = samples[head];
    if (count == 0) continue;
    for (int64_t i = 0; i < size; ++i) {
      joint[i] = static_cast<T>(std::max(sums[head * size + i], joint_floor) / count);
    }
    total += information_of_joint(joint.data(), classes);
    joint_slope(joint.data(), classes, count, scale / count, slopes.data() + head * size);
  }
  for (int64_t sample = 0; sample < labels.n; ++sample) {
    for (int64_t head = 0; head < labels.heads; ++head) {
      T* p = out + sample * row_size + head * classes;
      if (!counts(labels, sample, head)) {
        std::fill_n(p, classes, T(0));
        continue;
      }
      const T* slope = slopes.data() + head * size + labels.bias[sample * labels.heads + head] * classes;
      softmax_backward(slope, classes, p);
    }
  }
  return total;
}

template <typename T>
void run(const Tensor& logits, const Tensor& head_logits, const Labels& labels, const T* importance,
         const Coefficients& by, const Tensor& losses, const Tensor& by_logits, const Tensor& by_head_logits) {
  const double weighted = cross_entropy(static_cast<const T*>(logits.data_ptr()), labels, importance, by.alpha,
                                        static_cast<T*>(by_logits.data_ptr()));
  const double shared = by.share * information(static_cast<const T*>(head_logits.data_ptr()), labels,
                                               by.gamma * by.share, static_cast<T*>(by_head_logits.data_ptr()));
  T* const out = static_cast<T*>(losses.data_ptr());
  out[0] = static_cast<T>(by.alpha * weighted + by.gamma * shared);
  out[1] = static_cast<T>(weighted);
  out[2] = static_cast<T>(shared);
}

std::tuple<Tensor, Tensor, Tensor> objective(Tensor logits, Tensor labels, Tensor head_logits, Tensor bias_labels,
                                             std::optional<Tensor> importance, std::optional<Tensor> aligned,
                                             double alpha, double gamma, double share) {
  check_on_cpu({&logits, &labels, &head_logits, &bias_labels});
  for (const std::optional<Tensor>& table : {importance, aligned}) {
    if (table) check_on_cpu({&*table});
  }
  check_objective(logits, labels, head_logits, bias_labels, importance, aligned);
  const ScalarType given = logits.scalar_type(), dtype = working_dtype(given);
  const Tensor dense_logits = as_dense(logits, dtype), dense_head_logits = as_dense(head_logits, dtype);
  const Tensor dense_labels = made_contiguous(labels), dense_bias_labels = made_contiguous(bias_labels);
  const Tensor weights = importance ? as_dense(*importance, dtype) : dense_logits;
  const Tensor partners = aligned ? made_contiguous(*aligned) : dense_labels;
  const Labels of = {logits.size(0),
                     logits.size(1),
                     head_logits.size(1),
                     head_logits.size(2),
                     checked_indices("labels", dense_labels, logits.size(1)),
                     checked_indices("bias labels", dense_bias_labels, head_logits.size(2)),
                     aligned ? checked_indices("aligned", partners, head_logits.size(2)) : nullptr};
  const Tensor losses = torch::stable::new_empty(dense_logits, {3});
  const Tensor by_logits = torch::stable::new_empty(dense_logits, logits.sizes());
  const Tensor by_head_logits = torch::stable::new_empty(dense_head_logits, head_logits.sizes());
  const void* table = importance ? weights.data_ptr() : nullptr;
  const Coefficients by = {alpha, gamma, share};
  if (dtype == ScalarType::Double) {
    run(dense_logits, dense_head_logits, of, static_cast<const double*>(table), by, losses, by_logits, by_head_logits);
  } else {
    run(dense_logits, dense_head_logits, of, static_cast<const float*>(table), by, losses, by_logits, by_head_logits);
  }
  return {losses, torch::stable::to(by_logits, given), torch::stable::to(by_head_logits, given)};
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) { m.impl("objective", TORCH_BOX(&ffw::cpu::objective)); }

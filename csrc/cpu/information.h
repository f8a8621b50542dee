// Mutual information of one head's joint distribution of labels and predictions, and its derivative by the joint and by
// logits: what mutual_information.cpp and objective.cpp share.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace ffw::cpu {

constexpr double joint_floor = 1e-15;  // ops.JOINT_FLOOR

// Sums of each row and column of a joint [classes, classes].
struct Marginals {
  std::vector<double> rows, columns;

  template <typename T>
  Marginals(const T* joint, int64_t classes) : rows(classes), columns(classes) {
    for (int64_t b = 0; b < classes; ++b) {
      for (int64_t p = 0; p < classes; ++p) {
        rows[b] += joint[b * classes + p];
        columns[p] += joint[b * classes + p];
      }
    }
  }
};

template <typename T>
T information_of_joint(const T* joint, int64_t classes) {
  const Marginals sums(joint, classes);
  double total = 0;
  for (int64_t b = 0; b < classes; ++b) {
    for (int64_t p = 0; p < classes; ++p) {
      const double q = joint[b * classes + p];
      total += q * std::log(q / std::max(sums.rows[b] * sums.columns[p], joint_floor));
    }
  }
  return static_cast<T>(total / std::log(static_cast<double>(classes)));
}

// Derivative of `scale` x MI by each entry of a joint of `count` samples, zero where either clamp holds.
template <typename T>
void joint_slope(const T* joint, int64_t classes, int64_t count, double scale, T* out) {
  const Marginals sums(joint, classes);
  std::vector<double> row_terms(classes), column_terms(classes);
  for (int64_t b = 0; b < classes; ++b) {
    for (int64_t p = 0; p < classes; ++p) {
      if (sums.rows[b] * sums.columns[p] < joint_floor) continue;
      row_terms[b] += joint[b * classes + p] / sums.rows[b];
      column_terms[p] += joint[b * classes + p] / sums.columns[p];
    }
  }
  scale /= std::log(static_cast<double>(classes));
  for (int64_t b = 0; b < classes; ++b) {
    for (int64_t p = 0; p < classes; ++p) {
      const double q = joint[b * classes + p];
      const bool free = joint[b * classes + p] * static_cast<T>(count) > static_cast<T>(joint_floor);
      const double ratio = q / std::max(sums.rows[b] * sums.columns[p], joint_floor);
      out[b * classes + p] = free ? static_cast<T>((std::log(ratio) + 1 - row_terms[b] - column_terms[p]) * scale) : 0;
    }
  }
}

// A softmax p [classes] becomes the derivative by its logits of what has the derivative `slope` by p.
template <typename T>
void softmax_backward(const T* slope, int64_t classes, T* p) {
  T inner = 0;
  for (int64_t k = 0; k < classes; ++k) inner += p[k] * slope[k];
  for (int64_t k = 0; k < classes; ++k) p[k] *= slope[k] - inner;
}

}  // namespace ffw::cpu

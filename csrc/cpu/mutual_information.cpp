// mutual_information of bias labels and the private heads' predictions, and its gradient by the logits.
#include <algorithm>
#include <tuple>
#include <vector>

#include "information.h"
#include "tensors.h"

namespace ffw::cpu {
namespace {

constexpr int64_t chunk_rows = 2048;   // samples a partial joint, and a task of the backward
constexpr int64_t largest_chunks = 16;

// Samples n, heads and classes of logits [n, heads, classes], labels [n, heads].
struct Shape {
  int64_t n, heads, classes;
};

Shape shape_of(const Tensor& logits) { return {logits.size(0), logits.size(1), logits.size(2)}; }

// Adds the predictions of the rows begin .. end to their labels' rows of every head's joint [heads, classes, classes].
template <typename T>
void add_to_joint(const T* logits, const int64_t* labels, const Shape& shape, int64_t begin, int64_t end,
                  double* joint) {
  const int64_t row_size = shape.heads * shape.classes;
  const int64_t rows_a_call = std::max<int64_t>(1, block_size / row_size);  // so that the softmax fills its vectors
  std::vector<T> probabilities(rows_a_call * row_size);
  for (int64_t start = begin; start < end; start += rows_a_call) {
    const int64_t rows = std::min(rows_a_call, end - start);
    loops<T>().softmax(logits + start * row_size, rows * shape.heads, shape.classes, probabilities.data());
    for (int64_t i = 0; i < rows * shape.heads; ++i) {
      const int64_t row = (i % shape.heads) * shape.classes + labels[start * shape.heads + i];
      const T* p = probabilities.data() + i * shape.classes;
      for (int64_t k = 0; k < shape.classes; ++k) joint[row * shape.classes + k] += p[k];
    }
  }
}

template <typename T>
void forward(const Tensor& logits, const int64_t* labels, const Shape& shape, const Tensor& information,
             const Tensor& joint) {
  const T* logits_data = static_cast<const T*>(logits.data_ptr());
  T* joint_data = static_cast<T*>(joint.data_ptr());
  const int64_t entries = shape.heads * shape.classes * shape.classes;

  // A fixed number of partial joints, added up in order: the sum does not depend on the number of threads. With many
  // classes a partial joint must be worth its memory.
  const int64_t rows_a_chunk = std::max(
      {chunk_rows, shape.classes * shape.classes, (shape.n + largest_chunks - 1) / largest_chunks});
  const int64_t chunks = (shape.n + rows_a_chunk - 1) / rows_a_chunk;
  std::vector<double> sums(chunks * entries);
  torch::stable::parallel_for(0, chunks, 1, [&](int64_t first, int64_t last) {
    for (int64_t chunk = first; chunk < last; ++chunk) {
      add_to_joint(logits_data, labels, shape, chunk * rows_a_chunk,
                   std::min(shape.n, (chunk + 1) * rows_a_chunk), sums.data() + chunk * entries);
    }
  });
  for (int64_t i = 0; i < entries; ++i) {
    double sum = 0;
    for (int64_t chunk = 0; chunk < chunks; ++chunk) sum += sums[chunk * entries + i];
    joint_data[i] = static_cast<T>(std::max(sum, joint_floor) / shape.n);
  }
  T* information_data = static_cast<T*>(information.data_ptr());
  for (int64_t head = 0; head < shape.heads; ++head) {
    information_data[head] =
        information_of_joint(joint_data + head * shape.classes * shape.classes, shape.classes);
  }
}

template <typename T>
void backward(const Tensor& grad, const Tensor& logits, const int64_t* labels, const Tensor& joint,
              const Shape& shape, const Tensor& out) {
  const T* grad_data = static_cast<const T*>(grad.data_ptr());
  const T* logits_data = static_cast<const T*>(logits.data_ptr());
  const T* joint_data = static_cast<const T*>(joint.data_ptr());
  T* out_data = static_cast<T*>(out.data_ptr());
  const int64_t classes = shape.classes, row_size = shape.heads * classes;
  std::vector<T> slopes(shape.heads * classes * classes);
  for (int64_t head = 0; head < shape.heads; ++head) {
    const int64_t at = head * classes * classes;
    joint_slope(joint_data + at, classes, shape.n, static_cast<double>(grad_data[head]) / shape.n, slopes.data() + at);
  }
  const int64_t grain = std::max<int64_t>(1, 32768 / row_size);
  torch::stable::parallel_for(0, shape.n, grain, [&](int64_t first, int64_t last) {
    loops<T>().softmax(logits_data + first * row_size, (last - first) * shape.heads, classes,
                       out_data + first * row_size);
    for (int64_t i = first * shape.heads; i < last * shape.heads; ++i) {
      const T* slope = slopes.data() + ((i % shape.heads) * classes + labels[i]) * classes;
      softmax_backward(slope, classes, out_data + i * classes);
    }
  });
}

std::tuple<Tensor, Tensor> mutual_information(Tensor logits, Tensor labels) {
  check_on_cpu({&logits, &labels});
  check_information(logits, labels);
  const Shape shape = shape_of(logits);
  const ScalarType dtype = working_dtype(logits.scalar_type());
  const Tensor dense_logits = as_dense(logits, dtype), dense_labels = made_contiguous(labels);
  const int64_t* const label_data = checked_indices("labels", dense_labels, shape.classes);
  const Tensor information = torch::stable::new_empty(dense_logits, {shape.heads});
  const Tensor joint = torch::stable::new_empty(dense_logits, {shape.heads, shape.classes, shape.classes});
  const auto run = dtype == ScalarType::Double ? forward<double> : forward<float>;
  run(dense_logits, label_data, shape, information, joint);
  return {information, joint};
}

Tensor mutual_information_backward(Tensor grad, Tensor logits, Tensor labels, Tensor joint) {
  check_on_cpu({&grad, &logits, &labels, &joint});
  check_information_backward(grad, logits, labels, joint);
  const Shape shape = shape_of(logits);
  const ScalarType dtype = working_dtype(logits.scalar_type());
  const Tensor dense_logits = as_dense(logits, dtype), dense_labels = made_contiguous(labels);
  const int64_t* const label_data = checked_indices("labels", dense_labels, shape.classes);
  const Tensor dense_grad = as_dense(grad, dtype), dense_joint = as_dense(joint, dtype);
  Tensor out = torch::stable::empty_like(logits);
  const bool direct = out.is_contiguous() && logits.scalar_type() == dtype;
  const Tensor result = direct ? out : torch::stable::new_empty(dense_logits, logits.sizes());
  const auto run = dtype == ScalarType::Double ? backward<double> : backward<float>;
  run(dense_grad, dense_logits, label_data, dense_joint, shape, result);
  if (!direct) torch::stable::copy_(out, result);
  return out;
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) {
  m.impl("mutual_information", TORCH_BOX(&ffw::cpu::mutual_information));
  m.impl("mutual_information_backward", TORCH_BOX(&ffw::cpu::mutual_information_backward));
}

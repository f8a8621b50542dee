// fit_linear_head_: epochs of softmax regression by SGD with momentum on cached features, all heads, plateau rule
// included. Follows the loop of ops.fit_linear_head_default_ step for step.
#include <algorithm>
#include <cmath>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "tensors.h"

namespace ffw::cpu {
namespace {

constexpr int64_t work_a_thread = 1 << 18;  // multiply-adds that are worth waking another thread for
constexpr int64_t rows_a_task = 16;         // keeps threads off each other's cache lines
constexpr size_t alignment = 64;

struct Deleter {
  void operator()(void* memory) const { ::operator delete(memory, std::align_val_t(alignment)); }
};

// Aligned scratch memory, not initialised.
template <typename T>
using Scratch = std::unique_ptr<T[], Deleter>;

template <typename T>
Scratch<T> scratch(int64_t count) {
  return Scratch<T>(static_cast<T*>(::operator new(count * sizeof(T), std::align_val_t(alignment))));
}

int64_t round_up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// The plateau rule of ffw_fast/plateau.py, on the tensor [best, failures, reached].
struct Plateau {
  double threshold;
  int64_t patience;
  double* state;

  bool reached(double value) const {
    if (value <= (1 - threshold) * state[0]) {
      state[0] = value;
      state[1] = 0;
    } else {
      state[1] += 1;
    }
    if (state[1] > patience) state[2] = 1;
    return state[1] > patience;
  }
};

struct Problem {
  int64_t samples, width, heads, classes, epochs, epoch_size, batch_size;
  const void* features;    // [samples, width]
  const int64_t* labels;   // [samples, heads]
  const int64_t* order;    // [epochs, epoch_size]
};

// A parameter [heads, classes, width] whose rows are padded with zeros to whole vectors while the loops work on it.
template <typename T>
class Padded {
 public:
  Padded(const Tensor& tensor, int64_t rows, int64_t width, int64_t stride)
      : data_(static_cast<T*>(tensor.data_ptr())), rows_(rows), width_(width), stride_(stride) {
    if (stride == width) return;
    copy_ = scratch<T>(rows * stride);
    for (int64_t row = 0; row < rows; ++row) {
      std::copy_n(data_ + row * width, width, copy_.get() + row * stride);
      std::fill_n(copy_.get() + row * stride + width, stride - width, T(0));
    }
  }

  T* get() const { return copy_ ? copy_.get() : data_; }

  void save() const {
    if (!copy_) return;
    for (int64_t row = 0; row < rows_; ++row) std::copy_n(copy_.get() + row * stride_, width_, data_ + row * width_);
  }

 private:
  T* data_;
  int64_t rows_, width_, stride_;
  Scratch<T> copy_;
};

// Rows whose distance is a multiple of 4 KiB would all fall into the same few lines of the first-level cache.
template <typename T>
int64_t scratch_stride(int64_t stride, int64_t lanes) {
  return stride * sizeof(T) % 1024 == 0 ? stride + lanes : stride;
}

// One head's parameters and scratch memory.
template <typename T>
class Head {
 public:
  Head(const Problem& problem, const Sgd<T>& sgd, int64_t index, int64_t stride, T* weight, T* weight_momentum,
       T* bias, T* bias_momentum)
      : problem_(problem), sgd_(sgd) {
    const int64_t lanes = loops<T>().lanes;
    const int64_t largest = std::max<int64_t>(1, std::min(problem.batch_size, problem.epoch_size));
    batch_.width = problem.width;
    batch_.classes = problem.classes;
    batch_.stride = stride;
    batch_.x_stride = scratch_stride<T>(stride, lanes);
    batch_.count_stride = scratch_stride<T>(round_up(largest, rows_a_task), rows_a_task);
    x_ = scratch<T>(largest * batch_.x_stride);
    error_ = scratch<T>(problem.classes * batch_.count_stride);
    row_scratch_ = scratch<T>(2 * batch_.count_stride);
    losses_ = scratch<double>(batch_.count_stride);
    batch_.features = static_cast<const T*>(problem.features);
    batch_.labels = problem.labels + index;
    batch_.label_stride = problem.heads;
    batch_.weight = weight;
    batch_.weight_momentum = weight_momentum;
    batch_.bias = bias;
    batch_.bias_momentum = bias_momentum;
    batch_.x = x_.get();
    batch_.error = error_.get();
    batch_.row_scratch = row_scratch_.get();
    batch_.losses = losses_.get();
  }

  // The sum of the samples' losses over one epoch, each at its batch's parameters.
  double run_epoch(const int64_t* order) {
    double total = 0;
    for (int64_t start = 0; start < problem_.epoch_size; start += problem_.batch_size) {
      batch_.rows = order + start;
      batch_.count = std::min(problem_.batch_size, problem_.epoch_size - start);
      total += step();
    }
    return total;
  }

 private:
  // Both halves are split so that no number depends on who computes it: errors by samples, the update by features.
  double step() {
    const Loops<T>& loop = loops<T>();
    const int64_t tasks = (batch_.count + rows_a_task - 1) / rows_a_task;
    const int64_t work_a_row = batch_.classes * batch_.stride;
    torch::stable::parallel_for(0, tasks, grain(rows_a_task * work_a_row), [&](int64_t first, int64_t last) {
      loop.head_errors(batch_, first * rows_a_task, std::min(batch_.count, last * rows_a_task));
    });
    double total = 0;
    for (int64_t row = 0; row < batch_.count; ++row) total += batch_.losses[row];
    loop.head_update_bias(batch_, sgd_);
    const int64_t columns = 2 * loop.lanes;
    const int64_t column_tasks = (batch_.stride + columns - 1) / columns;
    torch::stable::parallel_for(
        0, column_tasks, grain(columns * batch_.classes * batch_.count), [&](int64_t first, int64_t last) {
          loop.head_update(batch_, sgd_, first * columns, std::min(batch_.stride, last * columns));
        });
    return total;
  }

  // Tasks a thread; those of a head without features have no work.
  static int64_t grain(int64_t work_a_task) {
    return work_a_thread / std::clamp<int64_t>(work_a_task, 1, work_a_thread);
  }

  const Problem& problem_;
  const Sgd<T>& sgd_;
  HeadBatch<T> batch_ = {};
  Scratch<T> x_, error_, row_scratch_;
  Scratch<double> losses_;
};

// One epoch of all heads, each head on a thread of its own where they are too small to be worth several.
template <typename T>
double run_heads(std::vector<Head<T>>& heads, const Problem& problem, const int64_t* order) {
  std::vector<double> totals(heads.size());
  const int64_t batch = std::min(problem.batch_size, problem.epoch_size);
  const bool small = batch * problem.width * problem.classes < 2 * work_a_thread;
  const int64_t count = static_cast<int64_t>(heads.size());
  const bool side_by_side = small || count >= static_cast<int64_t>(torch::stable::get_num_threads());
  torch::stable::parallel_for(0, count, side_by_side ? 1 : count, [&](int64_t first, int64_t last) {
    for (int64_t head = first; head < last; ++head) totals[head] = heads[head].run_epoch(order);
  });
  double total = 0;
  for (const double value : totals) total += value;
  return total;
}

template <typename T>
void fit(const Problem& problem, const Sgd<double>& settings, const Plateau& plateau, const Tensor& weight,
         const Tensor& bias, const Tensor& weight_momentum, const Tensor& bias_momentum, double* losses) {
  const int64_t rows = problem.heads * problem.classes, stride = round_up(problem.width, loops<T>().lanes);
  const Padded<T> padded_weight(weight, rows, problem.width, stride);
  const Padded<T> padded_momentum(weight_momentum, rows, problem.width, stride);
  T* bias_data = static_cast<T*>(bias.data_ptr());
  T* bias_momentum_data = static_cast<T*>(bias_momentum.data_ptr());
  const Sgd<T> sgd = {static_cast<T>(settings.lr), static_cast<T>(settings.momentum),
                      static_cast<T>(settings.weight_decay)};
  std::vector<Head<T>> heads;
  for (int64_t head = 0; head < problem.heads; ++head) {
    const int64_t at = head * problem.classes;
    heads.emplace_back(problem, sgd, head, stride, padded_weight.get() + at * stride,
                       padded_momentum.get() + at * stride, bias_data + at, bias_momentum_data + at);
  }
  for (int64_t epoch = 0; epoch < problem.epochs; ++epoch) {
    const double total = run_heads(heads, problem, problem.order + epoch * problem.epoch_size);
    losses[epoch] = total / static_cast<double>(problem.samples * problem.heads);
    if (plateau.reached(losses[epoch])) break;
  }
  padded_weight.save();
  padded_momentum.save();
}

Tensor fit_linear_head_(Tensor weight, Tensor bias, Tensor weight_momentum, Tensor bias_momentum, Tensor plateau,
                        Tensor features, Tensor labels, Tensor order, int64_t batch_size, double lr, double momentum,
                        double weight_decay, double threshold, int64_t patience) {
  check_on_cpu({&weight, &bias, &weight_momentum, &bias_momentum, &plateau, &features, &labels, &order});
  check_head(weight, bias, weight_momentum, bias_momentum, plateau, features, labels, order, batch_size);
  const Tensor dense_features = made_contiguous(features), dense_labels = made_contiguous(labels);
  const Tensor dense_order = made_contiguous(order);

  Tensor losses = torch::stable::new_empty(plateau, {order.size(0)});
  torch::stable::fill_(losses, std::numeric_limits<double>::quiet_NaN());
  InPlace new_weight(weight), new_bias(bias), new_weight_momentum(weight_momentum), new_bias_momentum(bias_momentum),
      new_plateau(plateau);
  const Problem problem = {features.size(0),
                           features.size(1),
                           weight.size(0),
                           weight.size(1),
                           order.size(0),
                           order.size(1),
                           batch_size,
                           dense_features.data_ptr(),
                           checked_indices("labels", dense_labels, weight.size(1)),
                           checked_indices("order", dense_order, features.size(0))};
  const Plateau rule = {threshold, patience, static_cast<double*>(new_plateau.dense().data_ptr())};
  const auto run = weight.scalar_type() == ScalarType::Double ? fit<double> : fit<float>;
  run(problem, {lr, momentum, weight_decay}, rule, new_weight.dense(), new_bias.dense(), new_weight_momentum.dense(),
      new_bias_momentum.dense(), static_cast<double*>(losses.data_ptr()));
  for (InPlace* changed : {&new_weight, &new_bias, &new_weight_momentum, &new_bias_momentum, &new_plateau}) {
    changed->save();
  }
  return losses;
}

}  // namespace
}  // namespace ffw::cpu

STABLE_TORCH_LIBRARY_IMPL(ffw_fast, CPU, m) { m.impl("fit_linear_head_", TORCH_BOX(&ffw::cpu::fit_linear_head_)); }

// fit_linear_head_ for CUDA tensors; the kernel is in linear_head.cuh.
#include "linear_head.cuh"

#include <algorithm>

#include "operator.h"

namespace ffw::cuda {
namespace {

constexpr int64_t most_heads = 64;  // their blocks wait for one another, so all must run at once on any device

Tensor fit_linear_head_(Tensor weight, Tensor bias, Tensor weight_momentum, Tensor bias_momentum, Tensor plateau,
                        Tensor features, Tensor labels, Tensor order, int64_t batch_size, double lr, double momentum,
                        double weight_decay, double threshold, int64_t patience) {
  const OnDevice device({&weight, &bias, &weight_momentum, &bias_momentum, &plateau, &features, &labels, &order});
  check_head(weight, bias, weight_momentum, bias_momentum, plateau, features, labels, order, batch_size);
  check_value(weight.size(1) * weight.size(2) < (int64_t{1} << 31), "a head of ", weight.size(1), " times ",
              weight.size(2), " weights is too large");
  check_value(weight.size(0) <= most_heads, "at most ", most_heads, " heads learn at once, got ", weight.size(0));
  const ScalarType dtype = weight.scalar_type();
  const int64_t heads = weight.size(0), epochs = order.size(0), epoch_size = order.size(1);
  Tensor losses = torch::stable::new_empty(plateau, {epochs});
  if (epochs == 0 || heads == 0) return losses;
  check_value(features.size(0) > 0 && epoch_size > 0, "a head needs at least one sample, got features ",
              shape_text(features), " and order ", shape_text(order));

  InPlace new_weight(weight), new_bias(bias), new_weight_momentum(weight_momentum), new_bias_momentum(bias_momentum),
      new_plateau(plateau);
  const Tensor dense_features = made_contiguous(features), dense_labels = made_contiguous(labels),
               dense_order = made_contiguous(order);
  const bool together = heads > 1;
  const Tensor totals = torch::stable::new_empty(dense_features, {together ? epochs * heads : 0});
  Tensor arrivals = torch::stable::new_empty(dense_features, {together ? 1 : 0}, ScalarType::Int);
  if (together) torch::stable::fill_(arrivals, 0);
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    HeadArguments<T> a = {};
    a.weight = data<T>(new_weight.dense());
    a.bias = data<T>(new_bias.dense());
    a.weight_momentum = data<T>(new_weight_momentum.dense());
    a.bias_momentum = data<T>(new_bias_momentum.dense());
    a.plateau = data<double>(new_plateau.dense());
    a.losses = data<double>(losses);
    a.totals = data<T>(totals);
    a.arrivals = data<unsigned>(arrivals);
    a.features = data<T>(dense_features);
    a.labels = data<int64_t>(dense_labels);
    a.order = data<int64_t>(dense_order);
    a.samples = features.size(0);
    a.epochs = checked_size("the number of epochs", epochs);
    a.epoch_size = checked_size("the number of samples in an epoch", epoch_size);
    a.batch_size = static_cast<int>(std::min(batch_size, epoch_size));
    a.width = checked_size("the number of features", features.size(1));
    a.classes = checked_size("the number of classes", weight.size(1));
    a.heads = static_cast<int>(heads);
    a.lr = static_cast<T>(lr);
    a.momentum = static_cast<T>(momentum);
    a.weight_decay = static_cast<T>(weight_decay);
    a.keep = static_cast<T>(1 - threshold);
    a.inverse_count = static_cast<T>(1 / static_cast<double>(labels.numel()));
    a.patience = patience;
    launch_fit_linear_head(a, device.stream);
  };
  dtype == ScalarType::Double ? run(double()) : run(float());
  for (InPlace* changed : {&new_weight, &new_bias, &new_weight_momentum, &new_bias_momentum, &new_plateau}) {
    changed->save();
  }
  return losses;
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) { m.impl("fit_linear_head_", TORCH_BOX(&ffw::cuda::fit_linear_head_)); }

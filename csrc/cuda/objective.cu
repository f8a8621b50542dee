// objective for CUDA tensors; the kernel is in objective.cuh.
#include "objective.cuh"

#include <optional>
#include <tuple>

#include "operator.h"

namespace ffw::cuda {
namespace {

template <typename T>
const T* data_or_null(const std::optional<Tensor>& tensor) {
  return tensor ? data<T>(*tensor) : nullptr;
}

std::tuple<Tensor, Tensor, Tensor> objective(Tensor logits, Tensor labels, Tensor head_logits, Tensor bias_labels,
                                             std::optional<Tensor> importance, std::optional<Tensor> aligned,
                                             double alpha, double gamma, double share) {
  const OnDevice device({&logits, &labels, &head_logits, &bias_labels, importance ? &*importance : &logits,
                         aligned ? &*aligned : &logits});
  check_objective(logits, labels, head_logits, bias_labels, importance, aligned);
  const int64_t heads = head_logits.size(1), classes = head_logits.size(2);
  check_information_classes(classes);
  const ScalarType working = working_dtype(logits.scalar_type());
  const Tensor dense_logits = made_contiguous(logits), dense_head_logits = made_contiguous(head_logits);
  const Tensor dense_labels = made_contiguous(labels), dense_bias_labels = made_contiguous(bias_labels);
  if (importance) importance = as_dense(*importance, working);
  if (aligned) aligned = made_contiguous(*aligned);
  const Tensor losses = torch::stable::new_empty(dense_logits, {3}, working);
  const Tensor by_logits = torch::stable::new_empty(dense_logits, logits.sizes());
  const Tensor by_head_logits = torch::stable::new_empty(dense_head_logits, head_logits.sizes());
  std::optional<Tensor> joints;
  for_dtype(logits.scalar_type(), [&](auto logit, auto wide) {
    using Logit = decltype(logit);
    using T = decltype(wide);
    ObjectiveArguments<Logit> a = {};
    a.losses = data<T>(losses);
    a.by_logits = data<Logit>(by_logits);
    a.by_head_logits = data<Logit>(by_head_logits);
    a.logits = data<Logit>(dense_logits);
    a.labels = data<int64_t>(dense_labels);
    a.head_logits = data<Logit>(dense_head_logits);
    a.bias_labels = data<int64_t>(dense_bias_labels);
    a.importance = data_or_null<T>(importance);
    a.aligned = data_or_null<int64_t>(aligned);
    a.n = logits.size(0);
    a.targets = checked_size("the number of classes", logits.size(1));
    a.heads = checked_size("the number of heads", heads);
    a.classes = static_cast<int>(classes);
    checked_size("the size of all joints", joint_entries(heads, classes));
    a.alpha = static_cast<T>(alpha);
    a.gamma = static_cast<T>(gamma);
    a.information_scale = static_cast<T>(share / std::log(static_cast<double>(classes)));
    a.slope_scale = static_cast<T>(gamma * share / std::log(static_cast<double>(classes)));
    if (!joints_fit(a)) joints = torch::stable::new_empty(dense_logits, {joint_entries(heads, classes)}, working);
    a.joints = joints ? data<T>(*joints) : nullptr;
    launch_objective(a, device.stream);
  });
  return {losses, by_logits, by_head_logits};
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) { m.impl("objective", TORCH_BOX(&ffw::cuda::objective)); }

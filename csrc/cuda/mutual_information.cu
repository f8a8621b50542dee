// mutual_information and mutual_information_backward for CUDA tensors; the kernels are in mutual_information.cuh.
#include "mutual_information.cuh"

#include <tuple>

#include "operator.h"

namespace ffw::cuda {
namespace {

template <typename T>
T inverse_log(int64_t classes) {
  return static_cast<T>(1 / std::log(static_cast<double>(classes)));
}

std::tuple<Tensor, Tensor> mutual_information(Tensor logits, Tensor labels) {
  const OnDevice device({&logits, &labels});
  check_information(logits, labels);
  const int64_t heads = logits.size(1), classes = logits.size(2);
  check_information_classes(classes);
  const Tensor dense_logits = made_contiguous(logits), dense_labels = made_contiguous(labels);
  const ScalarType working = working_dtype(logits.scalar_type());
  const Tensor information = torch::stable::new_empty(dense_logits, {heads}, working);
  const Tensor joint = torch::stable::new_empty(dense_logits, {heads, classes, classes}, working);
  for_dtype(logits.scalar_type(), [&](auto logit, auto wide) {
    using Logit = decltype(logit);
    using T = decltype(wide);
    launch_mutual_information<Logit>(
        {data<T>(information), data<T>(joint), data<Logit>(dense_logits), data<int64_t>(dense_labels), logits.size(0),
         checked_size("the number of heads", heads), static_cast<int>(classes), 0, inverse_log<T>(classes)},
        device.stream);
  });
  return {information, joint};
}

Tensor mutual_information_backward(Tensor grad, Tensor logits, Tensor labels, Tensor joint) {
  const OnDevice device({&grad, &logits, &labels, &joint});
  check_information_backward(grad, logits, labels, joint);
  const int64_t heads = logits.size(1), classes = logits.size(2);
  check_information_classes(classes);
  const ScalarType working = working_dtype(logits.scalar_type());
  const Tensor dense_grad = as_dense(grad, working), dense_joint = as_dense(joint, working);
  const Tensor dense_logits = made_contiguous(logits), dense_labels = made_contiguous(labels);
  Tensor out = torch::stable::empty_like(logits);
  const Tensor result = out.is_contiguous() ? out : torch::stable::new_empty(dense_logits, logits.sizes());
  for_dtype(logits.scalar_type(), [&](auto logit, auto wide) {
    using Logit = decltype(logit);
    using T = decltype(wide);
    launch_mutual_information_backward<Logit>(
        {data<Logit>(result), data<T>(dense_grad), data<Logit>(dense_logits), data<int64_t>(dense_labels),
         data<T>(dense_joint), logits.size(0), checked_size("the number of heads", heads), static_cast<int>(classes),
         inverse_log<T>(classes)},
        device.stream);
  });
  if (result.get() != out.get()) torch::stable::copy_(out, result);
  return out;
}

}  // namespace
}  // namespace ffw::cuda

FFW_OPERATORS(m) {
  m.impl("mutual_information", TORCH_BOX(&ffw::cuda::mutual_information));
  m.impl("mutual_information_backward", TORCH_BOX(&ffw::cuda::mutual_information_backward));
}

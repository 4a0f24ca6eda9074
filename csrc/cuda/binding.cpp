// The element-wise ops on CUDA tensors: checks, then launches on the current stream. The host waits for nothing.
#include <ATen/core/Tensor.h>
#include <ATen/ops/empty.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <torch/library.h>

#include <vector>

#include "checks.h"
#include "cuda/kernels.h"

namespace megalr::cuda {
namespace {

// Addresses for the launchers, which read them before they return.
class Pointers {
 public:
  static Pointers modified(at::TensorList tensors) { return Pointers(tensors, megalr::modified); }
  static Pointers read(at::TensorList tensors) {
    return Pointers(tensors, [](const at::Tensor& t) { return const_cast<void*>(t.const_data_ptr()); });
  }
  List list() const { return {pointers_.data(), type_}; }

 private:
  template <typename Address>
  Pointers(at::TensorList tensors, Address address)
      : type_(!tensors.empty() && tensors[0].scalar_type() == at::kBFloat16 ? Type::bfloat16 : Type::float32) {
    for (const at::Tensor& tensor : tensors) pointers_.push_back(address(tensor));
  }

  std::vector<void*> pointers_;
  Type type_;
};

std::vector<int64_t> numels(at::TensorList tensors) {
  std::vector<int64_t> sizes;
  for (const at::Tensor& tensor : tensors) sizes.push_back(tensor.numel());
  return sizes;
}

int count_of(at::TensorList tensors) { return static_cast<int>(tensors.size()); }

// launch(stream) with the tensors' device as the current one.
template <typename Launch>
void on_device_of(at::TensorList tensors, const Launch& launch) {
  if (tensors.empty()) return;
  const c10::cuda::CUDAGuard guard(tensors[0].device());
  launch(c10::cuda::getCurrentCUDAStream().stream());
  C10_CUDA_KERNEL_LAUNCH_CHECK();
}

void momentum_reset_cuda(at::TensorList tensors) {
  check_lists("momentum_reset", {{"tensors", tensors}});
  check_apart("momentum_reset", {{"tensors", tensors}}, {});
  const auto zeroed = Pointers::modified(tensors);
  std::vector<int64_t> bytes;
  for (const at::Tensor& tensor : tensors) bytes.push_back(static_cast<int64_t>(tensor.nbytes()));
  on_device_of(tensors, [&](cudaStream_t stream) {
    momentum_reset(count_of(tensors), zeroed.list().tensors, bytes.data(), stream);
  });
}

void low_rank_adam_cuda(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                        at::TensorList exp_avg_sqs, at::IntArrayRef steps, double lr, double beta1, double beta2,
                        double eps, double weight_decay, bool reset) {
  const char* op = "low_rank_adam";
  check_lists(op, {{"weights", weights}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
  check_steps(op, "steps", steps, "weights", weights);
  check_apart(op, {{"weights", weights}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}, {{"grads", grads}});
  const auto w = Pointers::modified(weights), g = Pointers::read(grads);
  const auto m = Pointers::modified(exp_avgs), v = Pointers::modified(exp_avg_sqs);
  on_device_of(weights, [&](cudaStream_t stream) {
    low_rank_adam(count_of(weights), numels(weights).data(), w.list(), g.list(), m.list(), v.list(), steps.data(),
                  {lr, beta1, beta2, eps, weight_decay}, reset, stream);
  });
}

void projected_adam_cuda(at::TensorList directions, at::TensorList grads, at::TensorList exp_avgs,
                         at::TensorList exp_avg_sqs, at::IntArrayRef steps, double beta1, double beta2, double eps,
                         double scale) {
  const char* op = "projected_adam";
  check_lists(op,
              {{"grads", grads}, {"directions", directions}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
  check_float(op, "directions", directions);
  check_steps(op, "steps", steps, "grads", grads);
  check_apart(op, {{"directions", directions}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}},
              {{"grads", grads}});
  std::vector<float*> out;
  for (const at::Tensor& direction : directions) out.push_back(static_cast<float*>(modified(direction)));
  const auto g = Pointers::read(grads);
  const auto m = Pointers::modified(exp_avgs), v = Pointers::modified(exp_avg_sqs);
  on_device_of(grads, [&](cudaStream_t stream) {
    projected_adam(count_of(grads), numels(grads).data(), g.list(), m.list(), v.list(), out.data(), steps.data(),
                   beta1, beta2, eps, scale, stream);
  });
}

void stable_spam_adam_cuda(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                           at::TensorList exp_avg_sqs, const at::Tensor& statistics, at::IntArrayRef clip_steps,
                           at::ArrayRef<double> bias1, at::ArrayRef<double> bias2, double lr, double beta1,
                           double beta2, double eps, double weight_decay, double gamma1, double gamma2, double theta,
                           double norm_eps) {
  const char* op = "stable_spam_adam";
  check_lists(op, {{"weights", weights}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
  check_statistics(op, statistics, "weights", weights);
  check_steps(op, "clip_steps", clip_steps, "weights", weights);
  check_bias(op, "bias1", bias1, "weights", weights);
  check_bias(op, "bias2", bias2, "weights", weights);
  check_apart(op,
              {{"weights", weights},
               {"exp_avgs", exp_avgs},
               {"exp_avg_sqs", exp_avg_sqs},
               {"statistics", at::TensorList(&statistics, 1)}},
              {{"grads", grads}});
  const auto w = Pointers::modified(weights), g = Pointers::read(grads);
  const auto m = Pointers::modified(exp_avgs), v = Pointers::modified(exp_avg_sqs);
  auto* rows = static_cast<float*>(modified(statistics));
  const std::vector<int64_t> sizes = numels(weights);
  on_device_of(weights, [&](cudaStream_t stream) {
    // Its memory is torch's again when this returns, for what comes later on the same stream.
    const int64_t bytes = stable_spam_scratch(count_of(weights), sizes.data());
    const at::Tensor scratch = at::empty({bytes}, statistics.options().dtype(at::kByte));
    stable_spam_adam(count_of(weights), sizes.data(), w.list(), g.list(), m.list(), v.list(), rows,
                     scratch.mutable_data_ptr(), clip_steps.data(), bias1.data(), bias2.data(),
                     {lr, beta1, beta2, eps, weight_decay}, {gamma1, gamma2, theta, norm_eps}, stream);
  });
}

TORCH_LIBRARY_IMPL(megalr, CUDA, library) {
  library.impl("momentum_reset", &momentum_reset_cuda);
  library.impl("low_rank_adam", &low_rank_adam_cuda);
  library.impl("projected_adam", &projected_adam_cuda);
  library.impl("stable_spam_adam", &stable_spam_adam_cuda);
}

}  // namespace
}  // namespace megalr::cuda

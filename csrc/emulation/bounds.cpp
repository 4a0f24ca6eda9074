// Every kernel on tensors that lie in memory of exactly their size, for a build with -fsanitize=address: a read or write
// one element beside them ends the program. With an argument, a kernel that does so on purpose.
#include <stdio.h>

#include <memory>

#include "../cuda/kernels.h"
#include "emulation.h"

namespace {

using namespace megalr::cuda;

const std::vector<int64_t> kSizes = {1, 3, 2047, 2048, 2050, MEGALR_CHUNK, 2 * MEGALR_CHUNK + 1};

// One list of tensors, which begin `skew` elements behind what the allocator gives.
class Tensors {
 public:
  Tensors(Type type, int skew) : type_(type) {
    const int64_t bytes = type == Type::float32 ? 4 : 2;
    for (int64_t size : kSizes) {
      memory_.emplace_back(new char[(size + skew) * bytes]());
      pointers_.push_back(memory_.back().get() + skew * bytes);
    }
  }
  List list() const { return {pointers_.data(), type_}; }

 private:
  Type type_;
  std::vector<std::unique_ptr<char[]>> memory_;
  std::vector<void*> pointers_;
};

void run_all(Type type, int skew) {
  const int count = static_cast<int>(kSizes.size());
  const Tensors weights(type, skew), grads(type, skew), first(type, skew), second(type, skew);
  const Tensors directions(Type::float32, skew);
  const std::vector<int64_t> steps(count, 1);
  const std::vector<double> bias(count, 0.1);
  const AdamW adam = {0.01, 0.9, 0.999, 1e-8, 0.1};

  low_rank_adam(count, kSizes.data(), weights.list(), grads.list(), first.list(), second.list(), steps.data(), adam,
                false, nullptr);
  const auto out = reinterpret_cast<float* const*>(directions.list().tensors);
  projected_adam(count, kSizes.data(), grads.list(), first.list(), second.list(), out, steps.data(), 0.9, 0.999, 1e-8,
                 1.0, nullptr);
  const std::unique_ptr<float[]> statistics(new float[3 * count]());
  const std::unique_ptr<char[]> scratch(new char[stable_spam_scratch(count, kSizes.data())]);
  stable_spam_adam(count, kSizes.data(), weights.list(), grads.list(), first.list(), second.list(), statistics.get(),
                   scratch.get(), steps.data(), bias.data(), bias.data(), adam, {0.85, 0.999, 0.99, 1e-8}, nullptr);

  std::vector<int64_t> bytes = kSizes;
  for (int64_t& size : bytes) size *= type == Type::float32 ? 4 : 2;
  momentum_reset(count, first.list().tensors, bytes.data(), nullptr);
}

}  // namespace

int main(int arguments, char**) {
  if (arguments > 1) {
    const std::unique_ptr<float[]> memory(new float[31]());
    megalr::emulation::run(1, 32, [&] { memory[threadIdx.x] = 1; });
  }
  for (Type type : {Type::float32, Type::bfloat16}) {
    for (int skew : {0, 1}) run_all(type, skew);
  }
  puts("nothing was read or written beside its tensor");
}

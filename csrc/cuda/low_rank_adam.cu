// AdamW on many runs of elements, with the momentum reset folded in.
#include "adam_step.cuh"

namespace megalr::cuda {
namespace {

using Updates = Table<4, Bias>;

template <typename W, typename G, typename M, typename V>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ Updates table, AdamStep common, float lr, float decay, bool reset) {
  const Chunk chunk = table.own();
  const AdamStep step = step_of(common, table.extra[chunk.slot]);
  update_chunk<W, G, M, V>(table, chunk, [&](float& w, float g, float& m, float& v) {
    w = adamw(w, adam_direction(g, m, v, step), lr, decay);
    if (reset) m = v = 0.0f;
  });
}

}  // namespace

void low_rank_adam(int count, const int64_t* sizes, List weights, List grads, List exp_avgs, List exp_avg_sqs,
                   const int64_t* steps, const AdamW& adam, bool reset, cudaStream_t stream) {
  const List lists[] = {weights, grads, exp_avgs, exp_avg_sqs};
  const AdamStep common = common_step(adam.beta1, adam.beta2, adam.eps);
  const auto lr = static_cast<float>(adam.lr);
  const auto decay = static_cast<float>(1 - adam.lr * adam.weight_decay);
  const auto pointer = [&](int list, int i) { return lists[list].tensors[i]; };
  const auto bias = [&](int i) { return bias_after(steps[i], adam.beta1, adam.beta2); };
  for_each_table<Updates>(count, sizes, pointer, bias, [&](const Updates& table, int blocks) {
    const auto launch_as = [&](auto w, auto g, auto m, auto v) {
      const auto kernel = update<decltype(w), decltype(g), decltype(m), decltype(v)>;
      launch(kernel, blocks, kThreads, stream, table, common, lr, decay, reset);
    };
    with_types(launch_as, weights.type, grads.type, exp_avgs.type, exp_avg_sqs.type);
  });
}

}  // namespace megalr::cuda

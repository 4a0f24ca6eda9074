// Adam's direction for many matrices inside their subspaces.
#include "adam_step.cuh"
#include "multi_tensor.cuh"

namespace megalr::cuda {
namespace {

using Updates = Table<4, Bias>;

template <typename G, typename M, typename V>
__global__ void __launch_bounds__(kThreads)
    direct(const __grid_constant__ Updates table, AdamStep common, float scale) {
  const Chunk chunk = table.own();
  const AdamStep step = step_of(common, table.extra[chunk.slot]);
  const G* grad = table.template begin<G>(0, chunk);
  M* exp_avg = table.template begin<M>(1, chunk);
  V* exp_avg_sq = table.template begin<V>(2, chunk);
  float* direction = table.template begin<float>(3, chunk);
  const bool packed = aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq) && aligned(direction);
  for (int first = 0; first < chunk.size; first += kTile) {
    const Tile tile(first, chunk.size, packed);
    float g[kPack], m[kPack], v[kPack], d[kPack];
    load(grad, tile, g);
    load(exp_avg, tile, m);
    load(exp_avg_sq, tile, v);
#pragma unroll
    for (int k = 0; k < kPack; ++k) d[k] = scale * adam_direction(g[k], m[k], v[k], step);
    store(d, tile, direction);
    store(m, tile, exp_avg);
    store(v, tile, exp_avg_sq);
  }
}

}  // namespace

void projected_adam(int count, const int64_t* sizes, List grads, List exp_avgs, List exp_avg_sqs,
                    float* const* directions, const int64_t* steps, double beta1, double beta2, double eps,
                    double scale, cudaStream_t stream) {
  const List lists[] = {grads, exp_avgs, exp_avg_sqs};
  const AdamStep common = common_step(beta1, beta2, eps);
  const auto pointer = [&](int list, int i) -> void* { return list < 3 ? lists[list].tensors[i] : directions[i]; };
  const auto bias = [&](int i) { return bias_after(steps[i], beta1, beta2); };
  for_each_table<Updates>(count, sizes, pointer, bias, [&](const Updates& table, int blocks) {
    const auto launch_as = [&](auto g, auto m, auto v) {
      const auto kernel = direct<decltype(g), decltype(m), decltype(v)>;
      launch(kernel, blocks, kThreads, stream, table, common, static_cast<float>(scale));
    };
    with_types(launch_as, grads.type, exp_avgs.type, exp_avg_sqs.type);
  });
}

}  // namespace megalr::cuda

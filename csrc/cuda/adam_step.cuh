// What the kernels of AdamW share: the part of AdamStep that differs from tensor to tensor, as a table's extra, and the
// pass over a chunk's weights, gradients and moments.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../adam.h"
#include "multi_tensor.cuh"

namespace megalr::cuda {

struct Bias {
  float unbias1, root_unbias2;

  Bias() = default;
  // bias1 = 1 - beta1^t, bias2 = 1 - beta2^t.
  Bias(double bias1, double bias2) {
    const AdamStep step = adam_step(0, 0, 0, bias1, bias2);
    unbias1 = step.unbias1;
    root_unbias2 = step.root_unbias2;
  }
};

// After t updates with betas that do not change.
inline Bias bias_after(int64_t t, double beta1, double beta2) {
  return {1 - pow(beta1, static_cast<double>(t)), 1 - pow(beta2, static_cast<double>(t))};
}

// The part that all tensors of a call share.
inline AdamStep common_step(double beta1, double beta2, double eps) { return adam_step(beta1, beta2, eps, 1, 1); }

__device__ __forceinline__ AdamStep step_of(AdamStep common, const Bias& own) {
  common.unbias1 = own.unbias1;
  common.root_unbias2 = own.root_unbias2;
  return common;
}

// f(w, g, m, v) for every element of a block's chunk, in fp32; w, m and v, which it changes, are stored. The table's
// lists are weights, gradients, first and second moments.
template <typename W, typename G, typename M, typename V, typename Extra, typename F>
__device__ __forceinline__ void update_chunk(const Table<4, Extra>& table, const Chunk& chunk, F f) {
  W* weight = table.template begin<W>(0, chunk);
  const G* grad = table.template begin<G>(1, chunk);
  M* exp_avg = table.template begin<M>(2, chunk);
  V* exp_avg_sq = table.template begin<V>(3, chunk);
  const bool packed = aligned(weight) && aligned(grad) && aligned(exp_avg) && aligned(exp_avg_sq);
  for (int first = 0; first < chunk.size; first += kTile) {
    const Tile tile(first, chunk.size, packed);
    float w[kPack], g[kPack], m[kPack], v[kPack];
    load(weight, tile, w);
    load(grad, tile, g);
    load(exp_avg, tile, m);
    load(exp_avg_sq, tile, v);
#pragma unroll
    for (int k = 0; k < kPack; ++k) f(w[k], g[k], m[k], v[k]);
    store(w, tile, weight);
    store(m, tile, exp_avg);
    store(v, tile, exp_avg_sq);
  }
}

}  // namespace megalr::cuda

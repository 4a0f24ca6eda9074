// The part of AdamStep that differs from tensor to tensor, as a table's extra.
#pragma once

#include <math.h>
#include <stdint.h>

#include "../adam.h"
#include "device.cuh"

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

}  // namespace megalr::cuda

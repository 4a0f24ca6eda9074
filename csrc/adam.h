// The formulas of the element-wise ops, for one element and in fp32: what the CPU's loops and the CUDA kernels share.
// Plain C++ without torch's headers.
#pragma once

#include <math.h>

#ifdef __CUDACC__
#define MEGALR_INLINE __host__ __device__ __forceinline__
#else
#define MEGALR_INLINE inline
#endif

namespace megalr {

// What one tensor's step of Adam needs, computed once for all of its elements, in double, and rounded.
struct AdamStep {
  float beta1, beta2, eps;
  float bias1;       // 1 - beta1^t: what the first moment lacks after t updates
  float root_bias2;  // sqrt(1 - beta2^t)
};

// m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2;  m^ / (sqrt(v^) + eps).
MEGALR_INLINE float adam_direction(float g, float& m, float& v, const AdamStep& s) {
  m += (1.0f - s.beta1) * (g - m);
  v = s.beta2 * v + (1.0f - s.beta2) * g * g;
  return (m / s.bias1) / (sqrtf(v) / s.root_bias2 + s.eps);
}

// w - lr (direction + weight_decay w), with decay = 1 - lr weight_decay.
MEGALR_INLINE float adamw(float w, float direction, float lr, float decay) { return w * decay - lr * direction; }

}  // namespace megalr

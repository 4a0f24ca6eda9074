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

// What one tensor's step of Adam needs, computed once for all of its elements, in double, and rounded. 1 - beta is a
// field of its own: in fp32, 1 - 0.999f has a relative error of 1e-5.
struct AdamStep {
  float rest1;         // 1 - beta1
  float beta2, rest2;  // beta2, 1 - beta2
  float eps;
  float unbias1;       // 1 / (1 - beta1^t): the first moment lacks that factor after t updates
  float root_unbias2;  // 1 / sqrt(1 - beta2^t)
};

// bias1 = 1 - beta1^t, bias2 = 1 - beta2^t.
inline AdamStep adam_step(double beta1, double beta2, double eps, double bias1, double bias2) {
  return {float(1 - beta1), float(beta2),     float(1 - beta2),
          float(eps),       float(1 / bias1), float(1 / sqrt(bias2))};
}

// m = beta1 m + (1 - beta1) g,  v = beta2 v + (1 - beta2) g^2;  m^ / (sqrt(v^) + eps).
MEGALR_INLINE float adam_direction(float g, float& m, float& v, const AdamStep& s) {
  m += s.rest1 * (g - m);
  v = s.beta2 * v + s.rest2 * g * g;
  return m * s.unbias1 / (sqrtf(v) * s.root_unbias2 + s.eps);
}

// w - lr (direction + weight_decay w), with decay = 1 - lr weight_decay.
MEGALR_INLINE float adamw(float w, float direction, float lr, float decay) { return w * decay - lr * direction; }

// Stable-SPAM (arXiv 2502.17055): what is the same for all tensors of a call and, with k the tensor's clip step, for
// its elements. All in double: a tensor's statistics are three numbers, and 1 - theta is small.
struct SpamStep {
  double theta, gamma1, gamma2, norm_eps;
  double theta_bias, gamma1_bias, gamma2_bias;  // 1 - theta^k, 1 - gamma1^k, 1 - gamma2^k
};

inline SpamStep spam_step(double theta, double gamma1, double gamma2, double norm_eps, double k) {
  return {theta, gamma1, gamma2, norm_eps, 1 - pow(theta, k), 1 - pow(gamma1, k), 1 - pow(gamma2, k)};
}

// Entries above the threshold in magnitude are multiplied by shrink, then every entry is divided by norm and
// multiplied by gain.
struct SpamClip {
  float threshold, shrink;
};
struct SpamGain {
  float norm, gain;
};

// M = theta M + (1 - theta) max|g|;  threshold = M / (1 - theta^k),  shrink = threshold / max|g|.
MEGALR_INLINE SpamClip spam_clip(float& M, float largest, const SpamStep& s) {
  const double mean = s.theta * M + (1 - s.theta) * largest;
  const double threshold = mean / s.theta_bias;
  M = float(mean);
  // Nothing is above the threshold of a zero gradient, so its shrink is never used, and need not be NaN.
  return {float(threshold), largest > 0 ? float(threshold / largest) : 1.0f};
}

MEGALR_INLINE float spam_clipped(float g, SpamClip c) { return fabsf(g) > c.threshold ? g * c.shrink : g; }

// a = gamma1 a + (1 - gamma1) n,  b = gamma2 b + (1 - gamma2) n^2, n = ||clipped g||;  gain = a^ / (sqrt(b^) + eps).
MEGALR_INLINE SpamGain spam_gain(float& a, float& b, double norm, const SpamStep& s) {
  const double mean = s.gamma1 * a + (1 - s.gamma1) * norm;
  const double square = s.gamma2 * b + (1 - s.gamma2) * norm * norm;
  a = float(mean);
  b = float(square);
  const double gain = (mean / s.gamma1_bias) / (sqrt(square / s.gamma2_bias) + s.norm_eps);
  // A zero gradient stays zero. It is a division and not a factor 1/n, which overflows where n is subnormal.
  return {norm > 0 ? float(norm) : 1.0f, float(gain)};
}

MEGALR_INLINE float spam_scaled(float g, SpamClip c, SpamGain n) { return spam_clipped(g, c) / n.norm * n.gain; }

}  // namespace megalr

// What the CUDA kernels offer to the binding: launchers on raw device pointers and a stream. No torch here, so that a
// kernel compiles in seconds, and by a host compiler too. Nothing waits for the device; the caller asks for errors of
// the launch (cudaGetLastError).
#pragma once

#include <stdint.h>

typedef struct CUstream_st* cudaStream_t;  // as CUDA's own headers have it

namespace megalr::cuda {

enum class Type { float32, bfloat16 };  // of storage; arithmetic is fp32

// One of an op's lists: where each of its tensors begins, and what they all hold.
struct List {
  void* const* tensors;
  Type type;
};

struct AdamW {
  double lr, beta1, beta2, eps, weight_decay;
};

struct StableSpam {
  double gamma1, gamma2, theta, norm_eps;
};

// Zeros in the first bytes[i] bytes of tensors[i], whatever they hold.
void momentum_reset(int count, void* const* tensors, const int64_t* bytes, cudaStream_t stream);

// AdamW on tensors of sizes[i] elements, with steps[i] updates since the moments were zero, this one included. `reset`
// stores zeros for the moments that the update was made with.
void low_rank_adam(int count, const int64_t* sizes, List weights, List grads, List exp_avgs, List exp_avg_sqs,
                   const int64_t* steps, const AdamW& adam, bool reset, cudaStream_t stream);

// directions[i] = scale * (bias-corrected first moment) / (root of the bias-corrected second moment + eps).
void projected_adam(int count, const int64_t* sizes, List grads, List exp_avgs, List exp_avg_sqs,
                    float* const* directions, const int64_t* steps, double beta1, double beta2, double eps,
                    double scale, cudaStream_t stream);

// Gradients clipped by the running maximum of their entries, normalised by the running norm, then AdamW. `statistics`
// is (count, 3) on the device; `scratch` has stable_spam_scratch() bytes there, which may hold anything.
int64_t stable_spam_scratch(int count, const int64_t* sizes);
void stable_spam_adam(int count, const int64_t* sizes, List weights, List grads, List exp_avgs, List exp_avg_sqs,
                      float* statistics, void* scratch, const int64_t* clip_steps, const double* bias1,
                      const double* bias2, const AdamW& adam, const StableSpam& spam, cudaStream_t stream);

}  // namespace megalr::cuda

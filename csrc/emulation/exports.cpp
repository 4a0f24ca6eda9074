// The kernels' launchers under the emulation, for ctypes: each takes the order in which a block's threads run, and
// returns null or what went wrong. Built by tests/kernels/emulated.py.
#include <string>

#include "../cuda/kernels.h"
#include "emulation.h"

namespace {

using namespace megalr::cuda;
using megalr::emulation::Order;

struct Schedule {
  Order order;
  unsigned seed;
};

template <typename Body>
const char* run(Schedule schedule, Body body) {
  static std::string message;
  megalr::emulation::set_order(schedule.order, schedule.seed);
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

}  // namespace

extern "C" {

const char* emulated_momentum_reset(Schedule schedule, int count, void* const* tensors, const int64_t* bytes) {
  return run(schedule, [&] { momentum_reset(count, tensors, bytes, nullptr); });
}

const char* emulated_low_rank_adam(Schedule schedule, int count, const int64_t* sizes, List weights, List grads,
                                   List exp_avgs, List exp_avg_sqs, const int64_t* steps, const AdamW* adam,
                                   bool reset) {
  return run(schedule, [&] {
    low_rank_adam(count, sizes, weights, grads, exp_avgs, exp_avg_sqs, steps, *adam, reset, nullptr);
  });
}

const char* emulated_projected_adam(Schedule schedule, int count, const int64_t* sizes, List grads, List exp_avgs,
                                    List exp_avg_sqs, float* const* directions, const int64_t* steps,
                                    const AdamW* adam, double scale) {
  return run(schedule, [&] {
    projected_adam(count, sizes, grads, exp_avgs, exp_avg_sqs, directions, steps, adam->beta1, adam->beta2, adam->eps,
                   scale, nullptr);
  });
}

const char* emulated_stable_spam_adam(Schedule schedule, int count, const int64_t* sizes, List weights, List grads,
                                      List exp_avgs, List exp_avg_sqs, float* statistics, const int64_t* clip_steps,
                                      const double* bias1, const double* bias2, const AdamW* adam,
                                      const StableSpam* spam) {
  return run(schedule, [&] {
    std::vector<char> scratch(stable_spam_scratch(count, sizes), '\xff');  // all NaN: what is read was written
    stable_spam_adam(count, sizes, weights, grads, exp_avgs, exp_avg_sqs, statistics, scratch.data(), clip_steps,
                     bias1, bias2, *adam, *spam, nullptr);
  });
}

void emulated_to_bfloat16(int64_t count, const float* from, __nv_bfloat16* to) {
  for (int64_t i = 0; i < count; ++i) to[i] = __float2bfloat16(from[i]);
}

}  // extern "C"

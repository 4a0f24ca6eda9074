// The element-wise ops on CPU tensors: checks, then elements shared out over torch's threads.
#include <ATen/Parallel.h>
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "checks.h"
#include "cpu/adam.h"

namespace megalr::cpu {
namespace {

constexpr int64_t kGrain = 16384;  // elements that are worth waking a thread for

// f(tensor, begin, end) for all elements of all tensors as if they stood in one row, which is cut evenly: neither many
// tiny tensors nor one large one leave a thread idle.
template <typename F>
void over_elements(at::TensorList tensors, const F& f) {
  std::vector<int64_t> ends(tensors.size());
  int64_t total = 0;
  for (size_t i = 0; i < tensors.size(); ++i) ends[i] = total += tensors[i].numel();
  at::parallel_for(0, total, kGrain, [&](int64_t begin, int64_t end) {
    size_t i = std::upper_bound(ends.begin(), ends.end(), begin) - ends.begin();
    for (; begin < end; ++i) {
      const int64_t start = ends[i] - tensors[i].numel(), stop = std::min(end, ends[i]);
      if (begin < stop) f(i, begin - start, stop - start);
      begin = std::max(begin, stop);
    }
  });
}

std::vector<Run> modified_runs(at::TensorList tensors) {
  std::vector<Run> runs;
  for (const at::Tensor& tensor : tensors) runs.push_back({modified(tensor), tensor.scalar_type() == at::kBFloat16});
  return runs;
}

std::vector<Run> read_runs(at::TensorList tensors) {
  std::vector<Run> runs;
  for (const at::Tensor& tensor : tensors) {
    runs.push_back({const_cast<void*>(tensor.const_data_ptr()), tensor.scalar_type() == at::kBFloat16});
  }
  return runs;
}

AdamStep step_of(int64_t t, double beta1, double beta2, double eps) {
  return adam_step(beta1, beta2, eps, 1 - std::pow(beta1, t), 1 - std::pow(beta2, t));
}

void momentum_reset(at::TensorList tensors) {
  check_lists("momentum_reset", {{"tensors", tensors}});
  check_apart("momentum_reset", {{"tensors", tensors}}, {});
  const auto runs = modified_runs(tensors);
  over_elements(tensors, [&](size_t i, int64_t begin, int64_t end) {
    std::memset(runs[i].from(begin).data, 0, (end - begin) * (runs[i].bf16 ? 2 : 4));
  });
}

void low_rank_adam(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs, at::TensorList exp_avg_sqs,
                   at::IntArrayRef steps, double lr, double beta1, double beta2, double eps, double weight_decay,
                   bool reset) {
  const char* op = "low_rank_adam";
  check_lists(op,
              {{"weights", weights}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
  check_steps(op, "steps", steps, "weights", weights);
  check_apart(op, {{"weights", weights}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}}, {{"grads", grads}});
  const auto w = modified_runs(weights), g = read_runs(grads);
  const auto m = modified_runs(exp_avgs), v = modified_runs(exp_avg_sqs);
  std::vector<AdamWStep> adam;
  for (const int64_t t : steps) {
    adam.push_back({step_of(t, beta1, beta2, eps), float(lr), float(1 - lr * weight_decay), reset});
  }
  over_elements(weights, [&](size_t i, int64_t begin, int64_t end) {
    adamw(w[i].from(begin), g[i].from(begin), m[i].from(begin), v[i].from(begin), end - begin, adam[i]);
  });
}

void projected_adam(at::TensorList directions, at::TensorList grads, at::TensorList exp_avgs,
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
  std::vector<AdamStep> adam;
  for (size_t i = 0; i < grads.size(); ++i) {
    out.push_back(static_cast<float*>(modified(directions[i])));
    adam.push_back(step_of(steps[i], beta1, beta2, eps));
  }
  const auto g = read_runs(grads), m = modified_runs(exp_avgs), v = modified_runs(exp_avg_sqs);
  over_elements(grads, [&](size_t i, int64_t begin, int64_t end) {
    direction(out[i] + begin, g[i].from(begin), m[i].from(begin), v[i].from(begin), end - begin, adam[i],
              float(scale));
  });
}

// Tensors cut into pieces of fixed length: sums over pieces are the same on any number of threads.
class Pieces {
 public:
  static constexpr int64_t kLength = 4096;

  explicit Pieces(at::TensorList tensors) : first_(1, 0) {
    for (const at::Tensor& tensor : tensors) {
      first_.push_back(first_.back() + (tensor.numel() + kLength - 1) / kLength);
      sizes_.push_back(tensor.numel());
    }
  }
  int64_t count() const { return first_.back(); }
  int64_t first(size_t tensor) const { return first_[tensor]; }

  // f(piece, tensor, begin, length), in parallel.
  template <typename F>
  void each(const F& f) const {
    at::parallel_for(0, count(), kGrain / kLength, [&](int64_t piece, int64_t end) {
      size_t i = std::upper_bound(first_.begin(), first_.end(), piece) - first_.begin() - 1;
      for (; piece < end; ++piece) {
        while (piece >= first_[i + 1]) ++i;
        const int64_t begin = (piece - first_[i]) * kLength;
        f(piece, i, begin, std::min(kLength, sizes_[i] - begin));
      }
    });
  }

 private:
  std::vector<int64_t> first_, sizes_;
};

void stable_spam_adam(at::TensorList weights, at::TensorList grads, at::TensorList exp_avgs,
                      at::TensorList exp_avg_sqs, const at::Tensor& statistics, at::IntArrayRef clip_steps,
                      at::ArrayRef<double> bias1, at::ArrayRef<double> bias2, double lr, double beta1, double beta2,
                      double eps, double weight_decay, double gamma1, double gamma2, double theta, double norm_eps) {
  const char* op = "stable_spam_adam";
  check_lists(op,
              {{"weights", weights}, {"grads", grads}, {"exp_avgs", exp_avgs}, {"exp_avg_sqs", exp_avg_sqs}});
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
  const auto w = modified_runs(weights), g = read_runs(grads);
  const auto m = modified_runs(exp_avgs), v = modified_runs(exp_avg_sqs);
  float* rows = static_cast<float*>(modified(statistics));

  // The threshold is known only when the largest entry is; so the norm before clipping is summed up on the way there,
  // and only pieces that hold an entry above the threshold are read again for the norm after it.
  const Pieces pieces(weights);
  std::vector<Extent> extents(pieces.count());
  pieces.each([&](int64_t piece, size_t i, int64_t begin, int64_t length) {
    extents[piece] = extent(g[i].from(begin), length);
  });
  std::vector<SpamStep> spam;
  std::vector<SpamClip> clips;
  for (size_t i = 0; i < weights.size(); ++i) {
    float largest = 0;
    for (int64_t piece = pieces.first(i); piece < pieces.first(i + 1); ++piece) {
      // No comparison finds a NaN, but the sum holds it.
      if (std::isnan(extents[piece].squares)) largest = NAN;
      if (extents[piece].largest > largest) largest = extents[piece].largest;
    }
    spam.push_back(spam_step(theta, gamma1, gamma2, norm_eps, double(clip_steps[i])));
    clips.push_back(spam_clip(rows[3 * i], largest, spam[i]));
  }
  pieces.each([&](int64_t piece, size_t i, int64_t begin, int64_t length) {
    if (extents[piece].largest > clips[i].threshold) {
      extents[piece].squares = clipped_squares(g[i].from(begin), length, clips[i]);
    }
  });
  std::vector<SpamGain> gains;
  std::vector<AdamWStep> adam;
  for (size_t i = 0; i < weights.size(); ++i) {
    double squares = 0;
    for (int64_t piece = pieces.first(i); piece < pieces.first(i + 1); ++piece) squares += extents[piece].squares;
    gains.push_back(spam_gain(rows[3 * i + 1], rows[3 * i + 2], std::sqrt(squares), spam[i]));
    const AdamStep step = adam_step(beta1, beta2, eps, bias1[i], bias2[i]);
    adam.push_back({step, float(lr), float(1 - lr * weight_decay), false});
  }
  over_elements(weights, [&](size_t i, int64_t begin, int64_t end) {
    stable_adamw(w[i].from(begin), g[i].from(begin), m[i].from(begin), v[i].from(begin), end - begin, adam[i],
                 clips[i], gains[i]);
  });
}

TORCH_LIBRARY_IMPL(megalr, CPU, library) {
  library.impl("momentum_reset", &momentum_reset);
  library.impl("low_rank_adam", &low_rank_adam);
  library.impl("projected_adam", &projected_adam);
  library.impl("stable_spam_adam", &stable_spam_adam);
}

}  // namespace
}  // namespace megalr::cpu

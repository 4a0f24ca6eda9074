// Stable-SPAM: entries clipped by a running maximum, the gradient scaled to a running norm, then AdamW. The formulas are
// in ../adam.h. Both statistics need the whole tensor before the next pass, so there are five kernels:
//   measure    each chunk's max|g| and sum of squares        clip_squares   the sum again where a chunk is clipped
//   set_clip   each tensor's M, and from it the clip         set_gain       each tensor's a, b, and from them the gain
//   update     AdamW
// Most chunks hold nothing to clip, and of these clip_squares reads no gradient. What a chunk found is kept in a place
// of its own and combined in one order, so that results can be repeated.
#include "adam_step.cuh"
#include "reduce.cuh"

namespace megalr::cuda {
namespace {

// What update needs of each tensor, written by set_clip and set_gain.
struct Scaling {
  SpamClip clip;
  SpamGain gain;
};

// The scratch memory: all chunks' sums and maxima, each tensor's scaling.
struct Scratch {
  double* squares;
  float* largest;
  Scaling* scaling;

  Scratch(void* memory, int64_t chunks)
      : squares(static_cast<double*>(memory)),
        largest(reinterpret_cast<float*>(squares + chunks)),
        scaling(reinterpret_cast<Scaling*>(largest + chunks)) {}
};

int64_t all_chunks(int count, const int64_t* sizes) {
  int64_t chunks = 0;
  for (int i = 0; i < count; ++i) chunks += chunks_of(sizes[i]);
  return chunks;
}

struct Index {
  int32_t tensor;  // of the whole call
};
using Grads = Table<1, Index>;

struct Update {
  Bias bias;
  int32_t tensor;
};
using Updates = Table<4, Update>;

// Where a tensor's chunks begin among all, and the three bias corrections of SpamStep.
struct Row {
  int64_t first, chunks;
  double theta_bias, gamma1_bias, gamma2_bias;
};

// One block for each tensor.
struct Rows {
  static constexpr int kTensors = kTableBytes / static_cast<int>(sizeof(Row));
  Row row[kTensors];

  __device__ __forceinline__ SpamStep own(SpamStep common) const {
    const Row& row_ = row[blockIdx.x];
    common.theta_bias = row_.theta_bias;
    common.gamma1_bias = row_.gamma1_bias;
    common.gamma2_bias = row_.gamma2_bias;
    return common;
  }
};

// f(g) for every element of a block's chunk of a gradient, and for zeros beyond its end.
template <typename G, typename F>
__device__ __forceinline__ void read_chunk(const Grads& table, const Chunk& chunk, F f) {
  const G* grad = table.template begin<G>(0, chunk);
  const bool packed = aligned(grad);
  for (int first = 0; first < chunk.size; first += kTile) {
    float g[kPack];
    load(grad, Tile(first, chunk.size, packed), g);
#pragma unroll
    for (int k = 0; k < kPack; ++k) f(g[k]);
  }
}

// largest, squares: of this launch's first block.
template <typename G>
__global__ void __launch_bounds__(kThreads)
    measure(const __grid_constant__ Grads table, float* largest, double* squares) {
  float found = 0.0f;
  double sum = 0.0;
  read_chunk<G>(table, table.own(), [&](float g) {
    found = Larger()(found, fabsf(g));
    sum += static_cast<double>(g) * g;
  });
  found = over_block(found, 0.0f, Larger());
  sum = over_block(sum, 0.0, Sum());
  if (threadIdx.x == 0) {
    largest[blockIdx.x] = found;
    squares[blockIdx.x] = sum;
  }
}

__global__ void __launch_bounds__(kThreads)
    set_clip(const __grid_constant__ Rows rows, SpamStep common, int begin, const float* largest, float* statistics,
             Scaling* scaling) {
  const Row& row = rows.row[blockIdx.x];
  float found = 0.0f;
  for (int64_t i = threadIdx.x; i < row.chunks; i += kThreads) found = Larger()(found, largest[row.first + i]);
  found = over_block(found, 0.0f, Larger());
  if (threadIdx.x == 0) {
    const int64_t tensor = begin + blockIdx.x;
    scaling[tensor].clip = spam_clip(statistics[3 * tensor], found, rows.own(common));
  }
}

template <typename G>
__global__ void __launch_bounds__(kThreads)
    clip_squares(const __grid_constant__ Grads table, const Scaling* scaling, const float* largest, double* squares) {
  const Chunk chunk = table.own();
  const SpamClip clip = scaling[table.extra[chunk.slot].tensor].clip;
  if (!(largest[blockIdx.x] > clip.threshold)) return;  // the whole block
  double sum = 0.0;
  read_chunk<G>(table, chunk, [&](float g) {
    const double clipped = spam_clipped(g, clip);
    sum += clipped * clipped;
  });
  sum = over_block(sum, 0.0, Sum());
  if (threadIdx.x == 0) squares[blockIdx.x] = sum;
}

__global__ void __launch_bounds__(kThreads)
    set_gain(const __grid_constant__ Rows rows, SpamStep common, int begin, const double* squares, float* statistics,
             Scaling* scaling) {
  const Row& row = rows.row[blockIdx.x];
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < row.chunks; i += kThreads) sum += squares[row.first + i];
  sum = over_block(sum, 0.0, Sum());
  if (threadIdx.x == 0) {
    const int64_t tensor = begin + blockIdx.x;
    float* own = statistics + 3 * tensor;
    scaling[tensor].gain = spam_gain(own[1], own[2], sqrt(sum), rows.own(common));
  }
}

template <typename W, typename G, typename M, typename V>
__global__ void __launch_bounds__(kThreads)
    update(const __grid_constant__ Updates table, AdamStep common, float lr, float decay, const Scaling* scaling) {
  const Chunk chunk = table.own();
  const Update& own = table.extra[chunk.slot];
  const AdamStep step = step_of(common, own.bias);
  const Scaling scale = scaling[own.tensor];
  update_chunk<W, G, M, V>(table, chunk, [&](float& w, float g, float& m, float& v) {
    w = adamw(w, adam_direction(spam_scaled(g, scale.clip, scale.gain), m, v, step), lr, decay);
  });
}

// launch(rows, tensors, begin) for as many tensors at a time as the arguments of a kernel have room for.
template <typename Launch>
void for_each_rows(int count, const int64_t* sizes, const int64_t* clip_steps, const StableSpam& spam, Launch launch) {
  Rows rows;
  int64_t first = 0;
  for (int begin = 0; begin < count; begin += Rows::kTensors) {
    const int tensors = count - begin < Rows::kTensors ? count - begin : Rows::kTensors;
    for (int i = 0; i < tensors; ++i) {
      const int64_t chunks = chunks_of(sizes[begin + i]);
      const SpamStep step = spam_step(spam.theta, spam.gamma1, spam.gamma2, spam.norm_eps,
                                      static_cast<double>(clip_steps[begin + i]));
      rows.row[i] = {first, chunks, step.theta_bias, step.gamma1_bias, step.gamma2_bias};
      first += chunks;
    }
    launch(rows, tensors, begin);
  }
}

}  // namespace

int64_t stable_spam_scratch(int count, const int64_t* sizes) {
  const int64_t of_chunk = sizeof(double) + sizeof(float);
  return all_chunks(count, sizes) * of_chunk + count * static_cast<int64_t>(sizeof(Scaling));
}

void stable_spam_adam(int count, const int64_t* sizes, List weights, List grads, List exp_avgs, List exp_avg_sqs,
                      float* statistics, void* memory, const int64_t* clip_steps, const double* bias1,
                      const double* bias2, const AdamW& adam, const StableSpam& spam, cudaStream_t stream) {
  const Scratch scratch(memory, all_chunks(count, sizes));
  const SpamStep common_spam = spam_step(spam.theta, spam.gamma1, spam.gamma2, spam.norm_eps, 1);

  const auto grad = [&](int, int i) { return grads.tensors[i]; };
  const auto index = [](int i) { return Index{i}; };
  // pass(table, blocks, first): `first` chunks have been in launches before.
  const auto for_each_grads = [&](auto pass) {
    int64_t first = 0;
    for_each_table<Grads>(count, sizes, grad, index, [&](const Grads& table, int blocks) {
      pass(table, blocks, first);
      first += blocks;
    });
  };

  for_each_grads([&](const Grads& table, int blocks, int64_t first) {
    const auto launch_as = [&](auto g) {
      launch(measure<decltype(g)>, blocks, kThreads, stream, table, scratch.largest + first, scratch.squares + first);
    };
    with_types(launch_as, grads.type);
  });
  for_each_rows(count, sizes, clip_steps, spam, [&](const Rows& rows, int tensors, int begin) {
    launch(set_clip, tensors, kThreads, stream, rows, common_spam, begin, scratch.largest, statistics,
           scratch.scaling);
  });
  for_each_grads([&](const Grads& table, int blocks, int64_t first) {
    const auto launch_as = [&](auto g) {
      launch(clip_squares<decltype(g)>, blocks, kThreads, stream, table, scratch.scaling, scratch.largest + first,
             scratch.squares + first);
    };
    with_types(launch_as, grads.type);
  });
  for_each_rows(count, sizes, clip_steps, spam, [&](const Rows& rows, int tensors, int begin) {
    launch(set_gain, tensors, kThreads, stream, rows, common_spam, begin, scratch.squares, statistics,
           scratch.scaling);
  });

  const List lists[] = {weights, grads, exp_avgs, exp_avg_sqs};
  const AdamStep common = common_step(adam.beta1, adam.beta2, adam.eps);
  const auto lr = static_cast<float>(adam.lr);
  const auto decay = static_cast<float>(1 - adam.lr * adam.weight_decay);
  const auto pointer = [&](int list, int i) { return lists[list].tensors[i]; };
  const auto extra = [&](int i) { return Update{Bias(bias1[i], bias2[i]), i}; };
  for_each_table<Updates>(count, sizes, pointer, extra, [&](const Updates& table, int blocks) {
    const auto launch_as = [&](auto w, auto g, auto m, auto v) {
      const auto kernel = update<decltype(w), decltype(g), decltype(m), decltype(v)>;
      launch(kernel, blocks, kThreads, stream, table, common, lr, decay, scratch.scaling);
    };
    with_types(launch_as, weights.type, grads.type, exp_avgs.type, exp_avg_sqs.type);
  });
}

}  // namespace megalr::cuda

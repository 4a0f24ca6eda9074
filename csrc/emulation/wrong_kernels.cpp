// Kernels with the mistakes that the emulation has to find, and some without, for its own tests.
#include <string>

#include "../cuda/reduce.cuh"

namespace {

// out[t] = in[t - 1], with in handed on through shared memory.
void neighbour(const float* in, float* out, bool barrier) {
  __shared__ float buffer[1024];
  const unsigned t = threadIdx.x;
  buffer[t] = in[t];
  if (barrier) __syncthreads();
  out[t] = buffer[t == 0 ? blockDim.x - 1 : t - 1];
  __syncthreads();
}

// out[t] = the sum of 4 rounds, each with the neighbour in the round before: without the second barrier of a round one
// thread writes what another has yet to read.
void rounds(const float* in, float* out, bool barrier) {
  __shared__ float buffer[1024];
  const unsigned t = threadIdx.x;
  float value = in[t];
  for (int round = 0; round < 4; ++round) {
    buffer[t] = value;
    __syncthreads();
    value += buffer[(t + 1) % blockDim.x];
    if (barrier) __syncthreads();
  }
  out[t] = value;
}

void barrier_of_some(float* out) {
  if (threadIdx.x % 2 == 1) __syncthreads();
  out[threadIdx.x] = 1;
}

void barrier_after_return(float* out) {
  if (threadIdx.x == 0) return;
  __syncthreads();
  out[threadIdx.x] = 1;
}

void two_barriers(float* out) {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
  out[threadIdx.x] = 1;
}

void shuffle_of_some(float* out) {
  float value = 1;
  if (threadIdx.x % 32 != 3) value = __shfl_xor_sync(0xffffffffu, value, 1);
  out[threadIdx.x] = value;
}

// Sums of a warp; and threads of one warp that wait for each other while another warp is at a barrier are no mistake.
void warp_sums(const float* in, float* out) {
  float value = in[threadIdx.x];
  if (threadIdx.x < 32) {
    for (unsigned bit = 16; bit > 0; bit /= 2) value += __shfl_xor_sync(0xffffffffu, value, bit);
  }
  __syncthreads();
  out[threadIdx.x] = value;
}

// The reduction of the real kernels, called again at once: a block's sums of in, of 2 in and of 3 in, added up.
void reductions(const float* in, float* out) {
  double sum = 0;
  for (int round = 1; round <= 3; ++round) {
    sum += megalr::cuda::over_block<double>(round * in[threadIdx.x], 0.0, megalr::cuda::Sum());
  }
  out[threadIdx.x] = static_cast<float>(sum);
}

}  // namespace

// Runs one of them by one block; null, or what the emulation found.
extern "C" const char* emulated_wrong_kernel(int order, unsigned seed, const char* name, int threads, const float* in,
                                             float* out) {
  static std::string message;
  const std::string kernel = name;
  megalr::emulation::set_order(static_cast<megalr::emulation::Order>(order), seed);
  try {
    megalr::emulation::run(1, threads, [&] {
      if (kernel == "neighbour") neighbour(in, out, true);
      if (kernel == "neighbour without its barrier") neighbour(in, out, false);
      if (kernel == "rounds") rounds(in, out, true);
      if (kernel == "rounds without the second barrier") rounds(in, out, false);
      if (kernel == "barrier of some") barrier_of_some(out);
      if (kernel == "barrier after return") barrier_after_return(out);
      if (kernel == "two barriers") two_barriers(out);
      if (kernel == "shuffle of some") shuffle_of_some(out);
      if (kernel == "warp sums") warp_sums(in, out);
      if (kernel == "reductions") reductions(in, out);
    });
    return nullptr;
  } catch (const std::exception& error) {
    message = error.what();
    return message.c_str();
  }
}

// One value from all threads of a block, combined in an order that never changes.
#pragma once

#include "elements.cuh"

namespace megalr::cuda {

// A NaN wins: a gradient that is not finite must not look like a small one.
struct Larger {
  __device__ __forceinline__ float operator()(float a, float b) const { return b > a || b != b ? b : a; }
};

struct Sum {
  __device__ __forceinline__ double operator()(double a, double b) const { return a + b; }
};

// Every thread of the block gets the result. `neutral` leaves the other operand as it is.
template <typename T, typename Combine>
__device__ __forceinline__ T over_block(T value, T neutral, Combine combine) {
  constexpr int kWarp = 32;
  __shared__ T of_warp[kThreads / kWarp];
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int warp = static_cast<int>(threadIdx.x) / kWarp;
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, bit));
  if (lane == 0) of_warp[warp] = value;
  __syncthreads();
  value = lane < kThreads / kWarp ? of_warp[lane] : neutral;
#pragma unroll
  for (int bit = kWarp / 2; bit > 0; bit /= 2) value = combine(value, __shfl_xor_sync(0xffffffffu, value, bit));
  __syncthreads();  // of_warp may be written again
  return value;
}

}  // namespace megalr::cuda

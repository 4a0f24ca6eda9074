// CUDA itself, or what stands in for it where a host compiler builds the kernels to test them.
#pragma once

#include "kernels.h"

#ifdef __CUDACC__

#include <cuda_bf16.h>
#include <cuda_runtime.h>

namespace megalr::cuda {

// A T in one load or store: p must be aligned to its size.
template <typename T, typename P>
__device__ __forceinline__ T* whole(P* p) {
  return reinterpret_cast<T*>(p);
}

template <typename... Formal, typename... Actual>
void launch(void (*kernel)(Formal...), int blocks, int threads, cudaStream_t stream, const Actual&... arguments) {
  kernel<<<blocks, threads, 0, stream>>>(arguments...);
}

}  // namespace megalr::cuda

#else

#include "../emulation/emulation.h"

namespace megalr::cuda {

template <typename T, typename P>
T* whole(P* p) {
  emulation::check_aligned(p, sizeof(T));
  return reinterpret_cast<T*>(p);
}

template <typename... Formal, typename... Actual>
void launch(void (*kernel)(Formal...), int blocks, int threads, cudaStream_t, const Actual&... arguments) {
  emulation::run(blocks, threads, [&] { kernel(arguments...); });
}

}  // namespace megalr::cuda

#endif

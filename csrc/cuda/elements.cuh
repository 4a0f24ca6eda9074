// Elements of a chunk on their way between memory, in fp32 or bf16, and a thread's registers, always in fp32.
#pragma once

#include <stdint.h>

#include "device.cuh"

namespace megalr::cuda {

constexpr int kThreads = 512;           // of a block
constexpr int kPack = 4;                // elements that a thread holds at once: 16 bytes of fp32
constexpr int kTile = kThreads * kPack;  // elements that a block holds at once

template <typename T>
struct alignas(kPack * sizeof(T)) Pack {
  T value[kPack];
};

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ void from_float(float x, float& to) { to = x; }
__device__ __forceinline__ void from_float(float x, __nv_bfloat16& to) { to = __float2bfloat16(x); }

template <typename T>
__device__ __forceinline__ bool aligned(const T* p) {
  return reinterpret_cast<uintptr_t>(p) % sizeof(Pack<T>) == 0;
}

// The block's part of a chunk of `size` elements. Where all lists are aligned a thread has kPack neighbours, in one
// load each; else, and at the chunk's end, elements kThreads apart, so that a warp still reads whole cache lines.
struct Tile {
  int first, size;
  bool packed;

  __device__ __forceinline__ Tile(int first, int size, bool aligned)
      : first(first), size(size), packed(aligned && first + kTile <= size) {}

  __device__ __forceinline__ int own_pack() const { return first + kPack * static_cast<int>(threadIdx.x); }
  __device__ __forceinline__ int own(int k) const { return first + k * kThreads + static_cast<int>(threadIdx.x); }
};

// Beyond the chunk's end there are zeros.
template <typename T>
__device__ __forceinline__ void load(const T* from, const Tile& tile, float (&x)[kPack]) {
  if (tile.packed) {
    const auto pack = *whole<const Pack<T>>(from + tile.own_pack());
#pragma unroll
    for (int k = 0; k < kPack; ++k) x[k] = to_float(pack.value[k]);
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k) x[k] = tile.own(k) < tile.size ? to_float(from[tile.own(k)]) : 0.0f;
  }
}

template <typename T>
__device__ __forceinline__ void store(const float (&x)[kPack], const Tile& tile, T* to) {
  if (tile.packed) {
    Pack<T> pack;
#pragma unroll
    for (int k = 0; k < kPack; ++k) from_float(x[k], pack.value[k]);
    *whole<Pack<T>>(to + tile.own_pack()) = pack;
  } else {
#pragma unroll
    for (int k = 0; k < kPack; ++k)
      if (tile.own(k) < tile.size) from_float(x[k], to[tile.own(k)]);
  }
}

// f(T(), U(), ...), with the C++ types that the lists hold.
template <typename F>
void with_types(F f) {
  f();
}

template <typename F, typename... Rest>
void with_types(F f, Type first, Rest... rest) {
  if (first == Type::float32) {
    with_types([&](auto... others) { f(float(), others...); }, rest...);
  } else {
    with_types([&](auto... others) { f(__nv_bfloat16(), others...); }, rest...);
  }
}

}  // namespace megalr::cuda

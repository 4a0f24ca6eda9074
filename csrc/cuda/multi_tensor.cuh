// Many tensors in few launches. Tensors are cut into chunks, one for each block; which block has which chunk of which
// tensor stands in a table that travels as the kernel's argument, so that nothing is copied to the device beforehand.
#pragma once

#include <stdint.h>

#include "elements.cuh"

// The emulation takes less of both, so that small tensors have several chunks and fill several tables.
#ifndef MEGALR_CHUNK
#define MEGALR_CHUNK 32768
#endif
#ifndef MEGALR_BLOCKS
#define MEGALR_BLOCKS 256
#endif

namespace megalr::cuda {

constexpr int kChunk = MEGALR_CHUNK;    // elements
constexpr int kBlocks = MEGALR_BLOCKS;  // of one launch; csrc/README.md says why so many
constexpr int kTableBytes = 3968;       // a kernel's arguments may have 4096; the rest is for an op's scalars
static_assert(kChunk % kTile == 0, "a chunk is as aligned as its tensor, and only a tensor's end is not a full tile");

constexpr int64_t chunks_of(int64_t size, int chunk = kChunk) { return (size + chunk - 1) / chunk; }

// What a block works on.
struct Chunk {
  int slot;       // of its tensor in the table
  int64_t first;  // element of the tensor
  int size;
};

struct Nothing {};

// Lists: how many tensors are meant by one, as a weight and its gradient and moments. Extra: what else an op has to
// know of each. Size: of a chunk.
template <int Lists, typename Extra = Nothing, int Size = kChunk>
struct Table {
  static constexpr int kLists = Lists, kSize = Size;
  static constexpr int kRoom = (kTableBytes - kBlocks * 5) / (8 * (Lists + 1) + static_cast<int>(sizeof(Extra)));
  static constexpr int kTensors = kRoom < 256 ? kRoom : 256;

  void* data[Lists][kTensors];
  int64_t size[kTensors];
  Extra extra[kTensors];
  int32_t chunk_of_block[kBlocks];
  uint8_t slot_of_block[kBlocks];

  __device__ __forceinline__ Chunk own() const {
    const int slot = slot_of_block[blockIdx.x];
    const int64_t first = static_cast<int64_t>(chunk_of_block[blockIdx.x]) * Size;
    const int64_t left = size[slot] - first;
    return {slot, first, static_cast<int>(left < Size ? left : Size)};
  }

  template <typename T>
  __device__ __forceinline__ T* begin(int list, const Chunk& chunk) const {
    return static_cast<T*>(data[list][chunk.slot]) + chunk.first;
  }
};

// Fills tables and calls launch(table, blocks) for each that is full, and for the last. A tensor of more chunks than
// the table has room for goes on in the next. pointer(list, i) and extra(i) describe tensor i.
template <typename Full, typename Pointer, typename Describe, typename Launch>
void for_each_table(int count, const int64_t* sizes, Pointer pointer, Describe extra, Launch launch) {
  static_assert(sizeof(Full) <= kTableBytes);
  Full table;
  int tensors = 0, blocks = 0;
  for (int i = 0; i < count; ++i) {
    const int64_t chunks = chunks_of(sizes[i], Full::kSize);
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      if (blocks == kBlocks || (chunk == 0 && tensors == Full::kTensors)) {
        launch(table, blocks);
        tensors = blocks = 0;
      }
      if (chunk == 0 || blocks == 0) {
        for (int list = 0; list < Full::kLists; ++list) table.data[list][tensors] = pointer(list, i);
        table.size[tensors] = sizes[i];
        table.extra[tensors] = extra(i);
        ++tensors;
      }
      table.slot_of_block[blocks] = static_cast<uint8_t>(tensors - 1);
      table.chunk_of_block[blocks] = static_cast<int32_t>(chunk);
      ++blocks;
    }
  }
  if (blocks > 0) launch(table, blocks);
}

}  // namespace megalr::cuda

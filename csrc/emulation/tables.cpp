// The tables of multi_tensor.cuh with the constants of a real build, for tensors too large for any memory: where each
// block's chunk begins in each list, and its size. Nothing is loaded or stored. Built by tests/kernels/emulated.py.
#undef MEGALR_CHUNK
#undef MEGALR_BLOCKS
#include "../cuda/multi_tensor.cuh"

namespace {

using namespace megalr::cuda;

struct Block {
  uint64_t begin[2];  // addresses
  int64_t size;
  int32_t launch, tensor;
};

struct Index {
  int32_t tensor;
};

template <typename Full, typename T>
int64_t record(int count, const int64_t* sizes, const uint64_t* addresses, int64_t room, Block* blocks) {
  int64_t found = 0;
  int32_t launches = 0;
  const auto pointer = [&](int list, int i) { return reinterpret_cast<void*>(addresses[2 * i + list]); };
  for_each_table<Full>(count, sizes, pointer, [](int i) { return Index{i}; }, [&](const Full& table, int of_launch) {
    for (int i = 0; i < of_launch; ++i, ++found) {
      blockIdx = {static_cast<unsigned>(i)};
      const Chunk chunk = table.own();
      if (found >= room) continue;
      const auto begin = [&](int list) { return reinterpret_cast<uint64_t>(table.template begin<T>(list, chunk)); };
      blocks[found] = {{begin(0), begin(1)}, chunk.size, launches, table.extra[chunk.slot].tensor};
    }
    ++launches;
  });
  return found;
}

}  // namespace

extern "C" {

// How many blocks all launches have, of which the first `room` are written. `addresses` has two for each tensor.
int64_t record_floats(int count, const int64_t* sizes, const uint64_t* addresses, int64_t room, Block* blocks) {
  return record<Table<2, Index>, float>(count, sizes, addresses, room, blocks);
}

// As momentum_reset has it: sizes and chunks in bytes.
int64_t record_bytes(int count, const int64_t* sizes, const uint64_t* addresses, int64_t room, Block* blocks) {
  return record<Table<2, Index, 8 * kChunk>, char>(count, sizes, addresses, room, blocks);
}

int chunk_elements() { return kChunk; }
int blocks_of_launch() { return kBlocks; }

}  // extern "C"

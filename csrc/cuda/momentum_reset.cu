// Zeros in many tensors.
#include "multi_tensor.cuh"

namespace megalr::cuda {
namespace {

using Regions = Table<1, Nothing, 8 * kChunk>;  // in bytes

struct alignas(16) Word {
  uint32_t part[4];
};

__global__ void __launch_bounds__(kThreads) fill(const __grid_constant__ Regions table) {
  const Chunk chunk = table.own();
  const int bytes = chunk.size;
  char* begin = table.template begin<char>(0, chunk);
  // Whole words, and the bytes before the first and behind the last.
  const int skew = static_cast<int>(reinterpret_cast<uintptr_t>(begin) % sizeof(Word));
  const int before = skew == 0 ? 0 : static_cast<int>(sizeof(Word)) - skew;
  const int head = before < bytes ? before : bytes;
  const int words = (bytes - head) / static_cast<int>(sizeof(Word));
  const int thread = static_cast<int>(threadIdx.x);
  for (int i = thread; i < words; i += kThreads) *whole<Word>(begin + head + i * sizeof(Word)) = Word{};
  if (thread < head) begin[thread] = 0;
  const int last = head + words * static_cast<int>(sizeof(Word)) + thread;
  if (last < bytes) begin[last] = 0;
}

}  // namespace

void momentum_reset(int count, void* const* tensors, const int64_t* bytes, cudaStream_t stream) {
  const auto pointer = [&](int, int i) { return tensors[i]; };
  const auto nothing = [](int) { return Nothing{}; };
  for_each_table<Regions>(count, bytes, pointer, nothing, [&](const Regions& table, int blocks) {
    launch(fill, blocks, kThreads, stream, table);
  });
}

}  // namespace megalr::cuda

// Stands in for CUDA where a host compiler builds the kernels, so that their logic runs without a GPU: one fiber for
// each thread of a block, blocks one after the other, a switch of fibers at every barrier and shuffle. Between two of
// these the threads run in a chosen order, forwards, backwards or shuffled, which makes a missing barrier show as a
// wrong result in at least one. A barrier that not all threads reach raises. csrc/README.md says what this cannot catch.
#pragma once

#include <stdint.h>
#include <string.h>
#include <ucontext.h>

#include <algorithm>
#include <exception>
#include <functional>
#include <memory>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#define __global__
#define __device__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ static  // blocks run one after the other

struct EmulatedIndex {
  unsigned x, y = 0, z = 0;
};
inline EmulatedIndex threadIdx, blockIdx, blockDim, gridDim;

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// To the nearest, ties to the even one; CUDA's NaN is 0x7fff.
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

namespace megalr::emulation {

constexpr unsigned kWarp = 32;

enum class Order { forward, reverse, random };

// Where a thread waits: a barrier of its block, or a shuffle of its warp.
struct Place {
  const char* file = nullptr;
  int line = 0;
  bool of_warp = false;

  bool operator==(const Place& other) const {
    return line == other.line && of_warp == other.of_warp && strcmp(file, other.file) == 0;
  }
  std::string text() const {
    return (of_warp ? "a shuffle, " : "a barrier, ") + std::string(file) + ":" + std::to_string(line);
  }
};

struct Fiber {
  static constexpr size_t kStack = 256 << 10;  // touched as far as it is used
  enum State { ready, waiting, ended };

  ucontext_t context;
  std::unique_ptr<char[]> stack{new char[kStack]};
  State state = ready;
  Place place;
  // What the thread gives to a shuffle. Two of them in turn: a thread may be at its next shuffle before the others
  // have read what it gave to the last.
  uint64_t given[2] = {};
  unsigned shuffles = 0;
};

// One for the process, and one thread of the operating system.
struct Machine {
  Order order = Order::forward;
  std::mt19937 random;
  std::vector<Fiber> fibers;
  ucontext_t scheduler;
  std::function<void()> body;
  std::exception_ptr failure;
};
inline Machine machine;

inline void set_order(Order order, unsigned seed) {
  machine.order = order;
  machine.random.seed(seed);
}

inline std::vector<unsigned> in_order(size_t count) {
  std::vector<unsigned> order(count);
  for (unsigned i = 0; i < count; ++i) order[i] = i;
  if (machine.order == Order::reverse) std::reverse(order.begin(), order.end());
  if (machine.order == Order::random) std::shuffle(order.begin(), order.end(), machine.random);
  return order;
}

inline void wait_at(const Place& place) {
  Fiber& own = machine.fibers[threadIdx.x];
  own.place = place;
  own.state = Fiber::waiting;
  swapcontext(&own.context, &machine.scheduler);
}

inline void start_thread() {
  try {
    machine.body();
  } catch (...) {
    machine.failure = std::current_exception();
  }
  machine.fibers[threadIdx.x].state = Fiber::ended;
}

// Lets threads [begin, end) go on if all of them wait at one place of this kind.
inline bool release(size_t begin, size_t end, bool of_warp) {
  auto& fibers = machine.fibers;
  for (size_t i = begin; i < end; ++i) {
    const bool together = fibers[i].state == Fiber::waiting && fibers[i].place == fibers[begin].place;
    if (!together || fibers[i].place.of_warp != of_warp) return false;
  }
  for (size_t i = begin; i < end; ++i) fibers[i].state = Fiber::ready;
  return true;
}

[[noreturn]] inline void raise_divergence() {
  const auto& fibers = machine.fibers;
  const auto described = [&](size_t i) {
    return "thread " + std::to_string(i) +
           (fibers[i].state == Fiber::ended ? " has ended" : " waits at " + fibers[i].place.text());
  };
  size_t one = 0, other = 0;
  while (fibers[one].state == Fiber::ended) ++one;
  const auto differs = [&](size_t i) {
    return fibers[i].state == Fiber::ended || !(fibers[i].place == fibers[one].place);
  };
  while (other + 1 < fibers.size() && !differs(other)) ++other;
  throw std::runtime_error("block " + std::to_string(blockIdx.x) + ": " + described(one) + ", and " +
                           described(other));
}

inline void run_block() {
  auto& fibers = machine.fibers;
  for (Fiber& fiber : fibers) {
    fiber.state = Fiber::ready;
    fiber.shuffles = 0;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = Fiber::kStack;
    fiber.context.uc_link = &machine.scheduler;
    makecontext(&fiber.context, start_thread, 0);
  }
  while (true) {
    for (unsigned i : in_order(fibers.size())) {
      if (fibers[i].state != Fiber::ready) continue;
      threadIdx.x = i;
      swapcontext(&machine.scheduler, &fibers[i].context);
      if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
    }
    const auto has_ended = [](const Fiber& fiber) { return fiber.state == Fiber::ended; };
    if (std::all_of(fibers.begin(), fibers.end(), has_ended)) return;
    bool released = release(0, fibers.size(), false);
    for (size_t i = 0; i < fibers.size(); i += kWarp) {
      released |= release(i, std::min(i + kWarp, fibers.size()), true);
    }
    if (!released) raise_divergence();
  }
}

// kernel<<<blocks, threads>>>, where body() is the kernel with its arguments.
inline void run(int blocks, int threads, std::function<void()> body) {
  if (blocks < 1 || threads < 1 || threads > 1024) throw std::runtime_error("a launch of no or too many threads");
  machine.body = std::move(body);
  machine.fibers.resize(threads);
  blockDim = {static_cast<unsigned>(threads)};
  gridDim = {static_cast<unsigned>(blocks)};
  for (unsigned block : in_order(blocks)) {
    blockIdx = {block};
    run_block();
  }
}

}  // namespace megalr::emulation

inline void __syncthreads(const char* file = __builtin_FILE(), int line = __builtin_LINE()) {
  megalr::emulation::wait_at({file, line, false});
}

// The value of the thread of this warp whose lane differs in these bits.
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, unsigned bits, const char* file = __builtin_FILE(),
                  int line = __builtin_LINE()) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) throw std::runtime_error("the emulation knows shuffles of whole warps only");
  auto& fibers = megalr::emulation::machine.fibers;
  const unsigned thread = threadIdx.x;
  const unsigned turn = fibers[thread].shuffles++ % 2;
  memcpy(&fibers[thread].given[turn], &value, sizeof(T));
  megalr::emulation::wait_at({file, line, true});
  const unsigned other = thread ^ bits;
  if (other / megalr::emulation::kWarp != thread / megalr::emulation::kWarp || other >= fibers.size()) {
    throw std::runtime_error("a shuffle with a thread of another warp");
  }
  memcpy(&value, &fibers[other].given[turn], sizeof(T));
  return value;
}

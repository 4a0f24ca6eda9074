// Stands in for CUDA where a host compiler builds the kernels, so that their logic runs without a GPU: one fiber for
// each thread of a block, blocks one after the other. A thread runs to its next barrier or shuffle, then others do: of a
// warp's threads, and of the warps that can go on, first the first, or the last, or any. So a missing barrier shows as a
// wrong result in at least one of these orders. A barrier or shuffle that not all threads reach raises.
// csrc/README.md says what this cannot find.
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

// A GPU faults where an x86 processor loads from anywhere.
inline void check_aligned(const volatile void* p, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(p) % bytes == 0) return;
  throw std::runtime_error("a load or store of " + std::to_string(bytes) + " bytes at an address that is no multiple");
}

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

inline size_t end_of(unsigned warp) { return std::min<size_t>((warp + 1) * kWarp, machine.fibers.size()); }

// To its threads' next shuffle or barrier. Out of a shuffle a warp may go on at once, ahead of the others.
inline void run_warp(unsigned warp) {
  const size_t begin = warp * kWarp, end = end_of(warp);
  for (unsigned lane : in_order(end - begin)) {
    Fiber& fiber = machine.fibers[begin + lane];
    if (fiber.state != Fiber::ready) continue;
    threadIdx.x = static_cast<unsigned>(begin) + lane;
    swapcontext(&machine.scheduler, &fiber.context);
    if (machine.failure) std::rethrow_exception(std::exchange(machine.failure, nullptr));
  }
  release(begin, end, true);
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
  const size_t warps = (fibers.size() + kWarp - 1) / kWarp;
  while (true) {
    const auto can_run = [&](unsigned warp) {
      const auto is_ready = [](const Fiber& fiber) { return fiber.state == Fiber::ready; };
      return std::any_of(fibers.begin() + warp * kWarp, fibers.begin() + end_of(warp), is_ready);
    };
    const auto order = in_order(warps);
    const auto next = std::find_if(order.begin(), order.end(), can_run);
    if (next != order.end()) {
      run_warp(*next);
    } else if (std::all_of(fibers.begin(), fibers.end(), [](const Fiber& f) { return f.state == Fiber::ended; })) {
      return;
    } else if (!release(0, fibers.size(), false)) {
      raise_divergence();
    }
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

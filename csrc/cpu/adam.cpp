#include "cpu/adam.h"

#include <string.h>

// One build runs on every x86: GCC compiles each loop several times, and the dynamic linker takes the widest that the
// machine has. Where that is not to be had (clang, macOS, musl, other processors) there is one version.
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__)
#if __GNUC__ >= 12
#define MEGALR_WIDEST __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MEGALR_WIDEST __attribute__((target_clones("arch=skylake-avx512", "arch=haswell", "default")))
#endif
#else
#define MEGALR_WIDEST
#endif

namespace megalr::cpu {
namespace {

constexpr int64_t kBlock = 1024;  // five blocks of fp32 are 20 KB

// f(i) for n elements, by the 16 of a cache line, with the lines of a kilobyte ahead asked for: the processor's own
// prefetching ends at every page, and four arrays come to a page's end at once.
template <typename F>
__attribute__((always_inline)) inline void each(int64_t n, const float* w, const float* g, const float* m,
                                                const float* v, const F& f) {
  constexpr int64_t line = 16, ahead = 256;
  int64_t i = 0;
  for (; i + line <= n; i += line) {
    __builtin_prefetch(w + i + ahead);
    __builtin_prefetch(g + i + ahead);
    __builtin_prefetch(m + i + ahead);
    __builtin_prefetch(v + i + ahead);
    for (int64_t j = 0; j < line; ++j) f(i + j);
  }
  for (; i < n; ++i) f(i);
}

MEGALR_WIDEST
void adamw_loop(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v, int64_t n,
                AdamStep s, float lr, float decay) {
  each(n, w, g, m, v, [=](int64_t i) __attribute__((always_inline)) {
    w[i] = megalr::adamw(w[i], adam_direction(g[i], m[i], v[i], s), lr, decay);
  });
}

MEGALR_WIDEST
void adamw_reset_loop(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                      int64_t n, AdamStep s, float lr, float decay) {
  each(n, w, g, m, v, [=](int64_t i) __attribute__((always_inline)) {
    float first = m[i], second = v[i];
    w[i] = megalr::adamw(w[i], adam_direction(g[i], first, second, s), lr, decay);
    m[i] = 0.0f;
    v[i] = 0.0f;
  });
}

MEGALR_WIDEST
void direction_loop(float* __restrict out, const float* __restrict g, float* __restrict m, float* __restrict v,
                    int64_t n, AdamStep s, float scale) {
  each(n, out, g, m, v, [=](int64_t i) __attribute__((always_inline)) {
    out[i] = scale * adam_direction(g[i], m[i], v[i], s);
  });
}

MEGALR_WIDEST
void stable_adamw_loop(float* __restrict w, const float* __restrict g, float* __restrict m, float* __restrict v,
                       int64_t n, AdamStep s, float lr, float decay, SpamClip clip, SpamGain gain) {
  each(n, w, g, m, v, [=](int64_t i) __attribute__((always_inline)) {
    w[i] = megalr::adamw(w[i], adam_direction(spam_scaled(g[i], clip, gain), m[i], v[i], s), lr, decay);
  });
}

MEGALR_WIDEST
void extent_loop(const float* __restrict g, int64_t n, float* largest, double* squares) {
  float most = *largest;
  double sum = 0;
#pragma omp simd reduction(max : most) reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const float size = fabsf(g[i]);
    most = size > most ? size : most;
    sum += double(size) * double(size);  // in double: a square in fp32 overflows from 2e19 on
  }
  *largest = most;
  *squares += sum;
}

MEGALR_WIDEST
void clipped_squares_loop(const float* __restrict g, int64_t n, SpamClip clip, double* squares) {
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double one = spam_clipped(g[i], clip);
    sum += one * one;
  }
  *squares += sum;
}

MEGALR_WIDEST
void widen(float* __restrict to, const uint16_t* __restrict from, int64_t n) {
  uint32_t* bits = reinterpret_cast<uint32_t*>(to);
  for (int64_t i = 0; i < n; ++i) bits[i] = uint32_t(from[i]) << 16;
}

// To the nearest, and between two of them to the even one; NaN stays NaN.
MEGALR_WIDEST
void narrow(uint16_t* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    memcpy(&bits, from + i, 4);
    const uint32_t rounded = bits + 0x7fff + ((bits >> 16) & 1);
    const bool nan = (bits & 0x7fffffff) > 0x7f800000;
    to[i] = uint16_t((nan ? bits | 0x400000 : rounded) >> 16);
  }
}

// A block of a run as fp32: where it is, or a widened copy that store() puts back.
class Block {
 public:
  float* load(Run run, int64_t n) {
    run_ = run;
    if (!run.bf16) return static_cast<float*>(run.data);
    widen(copy_, static_cast<const uint16_t*>(run.data), n);
    return copy_;
  }
  void store(int64_t n) const {
    if (run_.bf16) narrow(static_cast<uint16_t*>(run_.data), copy_, n);
  }

 private:
  Run run_;
  alignas(64) float copy_[kBlock];
};

// fp32 goes through in one piece.
template <typename F>
void in_blocks(int64_t n, bool any_bf16, const F& f) {
  const int64_t size = any_bf16 ? kBlock : n;
  for (int64_t begin = 0; begin < n; begin += size) f(begin, n - begin < size ? n - begin : size);
}

template <typename F>
void update(Run w, Run g, Run m, Run v, int64_t n, const F& loop) {
  Block weights, grads, firsts, seconds;
  in_blocks(n, w.bf16 || g.bf16 || m.bf16 || v.bf16, [&](int64_t at, int64_t some) {
    loop(weights.load(w.from(at), some), grads.load(g.from(at), some), firsts.load(m.from(at), some),
         seconds.load(v.from(at), some), some);
    weights.store(some);
    firsts.store(some);
    seconds.store(some);
  });
}

}  // namespace

void adamw(Run w, Run g, Run m, Run v, int64_t n, const AdamWStep& s) {
  update(w, g, m, v, n, [&](float* w, const float* g, float* m, float* v, int64_t n) {
    (s.reset ? adamw_reset_loop : adamw_loop)(w, g, m, v, n, s.adam, s.lr, s.decay);
  });
}

void stable_adamw(Run w, Run g, Run m, Run v, int64_t n, const AdamWStep& s, SpamClip clip, SpamGain gain) {
  update(w, g, m, v, n, [&](float* w, const float* g, float* m, float* v, int64_t n) {
    stable_adamw_loop(w, g, m, v, n, s.adam, s.lr, s.decay, clip, gain);
  });
}

void direction(float* out, Run g, Run m, Run v, int64_t n, const AdamStep& s, float scale) {
  Run into{out, false};
  update(into, g, m, v, n, [&](float* out, const float* g, float* m, float* v, int64_t n) {
    direction_loop(out, g, m, v, n, s, scale);
  });
}

Extent extent(Run g, int64_t n) {
  Extent all{0.0f, 0.0};
  Block grads;
  in_blocks(n, g.bf16, [&](int64_t at, int64_t some) {
    extent_loop(grads.load(g.from(at), some), some, &all.largest, &all.squares);
  });
  return all;
}

double clipped_squares(Run g, int64_t n, SpamClip clip) {
  double squares = 0;
  Block grads;
  in_blocks(n, g.bf16, [&](int64_t at, int64_t some) {
    clipped_squares_loop(grads.load(g.from(at), some), some, clip, &squares);
  });
  return squares;
}

}  // namespace megalr::cpu

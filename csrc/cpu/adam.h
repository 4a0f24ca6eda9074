// Loops over elements on one thread; raw pointers, no torch headers. Storage in bf16 is widened to fp32 and rounded
// back in blocks that stay in the first-level cache, so every formula has one loop.
#pragma once

#include <stdint.h>

#include "../adam.h"

namespace megalr::cpu {

// A run of elements in memory: fp32, or bf16.
struct Run {
  void* data;
  bool bf16;

  Run from(int64_t element) const { return {static_cast<char*>(data) + element * (bf16 ? 2 : 4), bf16}; }
};

// AdamW of n elements; with reset, zeros are stored for the moments.
struct AdamWStep {
  AdamStep adam;
  float lr, decay;
  bool reset;
};
void adamw(Run w, Run g, Run m, Run v, int64_t n, const AdamWStep& s);

// out (fp32) = scale * direction.
void direction(float* out, Run g, Run m, Run v, int64_t n, const AdamStep& s, float scale);

// The same as adamw, of gradients that are clipped and rescaled on the way.
void stable_adamw(Run w, Run g, Run m, Run v, int64_t n, const AdamWStep& s, SpamClip clip, SpamGain gain);

// max|g| and the sum of squares of n elements. A NaN among them shows in the sum.
struct Extent {
  float largest;
  double squares;
};
Extent extent(Run g, int64_t n);

// The sum of squares of n elements after clipping.
double clipped_squares(Run g, int64_t n, SpamClip clip);

}  // namespace megalr::cpu

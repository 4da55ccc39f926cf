// From a router's logits to the experts of each position: compiled once, for any processor, so that all choose the same.
#pragma once

#include "kernels.h"

namespace tpimpi {

// What a router does; see RouterSpec in tpimpi/compute/router.py.
struct Routing {
  enum class Bias { none, logits, choice };

  int64_t experts, chosen;
  bool sigmoid;  // else softmax
  bool normalized;
  double scale;
  Bias bias_of;
  const float* bias;  // [experts], or null
};

// The chosen experts [n, chosen] of positions with these logits [n, experts], which are changed, and their weights [n, chosen].
// False where a logit is not finite. `scratch` has 2 * experts numbers.
bool choose(const Routing& routing, int64_t n, double* logits, double* scratch, int32_t* experts, float* weights);

}  // namespace tpimpi

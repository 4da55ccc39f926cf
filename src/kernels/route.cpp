// Compile with -ffp-contract=off, and without -ffast-math: every operation is one that IEEE 754 defines to the bit. Their order is that of
// tpimpi/compute/backends/routing.py.
#include "route.h"

#include <algorithm>
#include <cmath>
#include <cstring>

namespace tpimpi {
namespace {

constexpr double kLeastSum = 1e-300;       // is added to the sum of scores: where all are zero, weights are zero and no NaN
constexpr double kLeastExponent = -708.0;  // under it e^x is taken for zero

constexpr double inverse_factorial(int k) {
  double product = 1;
  for (int i = 2; i <= k; ++i) product *= i;
  return 1 / product;
}

// e^x of x <= 0, to within 2 last places; 0 under -708. x = n ln 2 + r; ln 2 is in two parts, of which the first times n is exact.
double fixed_exp(double x) {
  constexpr double log2_e = 1.4426950408889634, ln2_high = 6.93147180369123816490e-01, ln2_low = 1.90821492927058770002e-10;
  constexpr double magic = 6755399441055744.0;  // 1.5 * 2^52: adding it rounds to an integer, ties to even
  constexpr int terms = 13;
  if (x < kLeastExponent) return 0;
  const double n = (x * log2_e + magic) - magic;
  const double r = (x - n * ln2_high) - n * ln2_low;
  static constexpr double coefficients[terms + 1] = {
      inverse_factorial(13), inverse_factorial(12), inverse_factorial(11), inverse_factorial(10), inverse_factorial(9),
      inverse_factorial(8),  inverse_factorial(7),  inverse_factorial(6),  inverse_factorial(5),  inverse_factorial(4),
      inverse_factorial(3),  inverse_factorial(2),  inverse_factorial(1),  inverse_factorial(0)};
  double power = coefficients[0];
  for (int k = 1; k <= terms; ++k) power = power * r + coefficients[k];
  const uint64_t bits = uint64_t(int64_t(n) + 1023) << 52;  // 2^n, n at least -1022
  double scale;
  std::memcpy(&scale, &bits, sizeof scale);
  return power * scale;
}

// Scores of one position's logits, as in the twin.
void score(const Routing& routing, const double* logits, double* scores) {
  const int64_t count = routing.experts;
  if (routing.sigmoid) {
    for (int64_t e = 0; e < count; ++e) {
      const double power = fixed_exp(-std::fabs(logits[e]));
      scores[e] = (logits[e] < 0 ? power : 1.0) / (1 + power);
    }
    return;
  }
  const double greatest = *std::max_element(logits, logits + count);
  for (int64_t e = 0; e < count; ++e) scores[e] = fixed_exp(logits[e] - greatest);
  if (routing.normalized && routing.bias_of != Routing::Bias::choice) return;
  double sum = 0;
  for (int64_t e = 0; e < count; ++e) sum += scores[e];
  for (int64_t e = 0; e < count; ++e) scores[e] /= sum;
}

// The `chosen` greatest of `values`, of equal ones the lower index, in their order.
void greatest_of(const double* values, int64_t count, int64_t chosen, int32_t* experts) {
  int64_t found = 0;
  for (int64_t e = 0; e < count; ++e) {
    if (found == chosen && !(values[e] > values[experts[found - 1]])) continue;
    int64_t place = found < chosen ? found++ : found - 1;
    for (; place > 0 && values[e] > values[experts[place - 1]]; --place) experts[place] = experts[place - 1];
    experts[place] = int32_t(e);
  }
}

}  // namespace

bool choose(const Routing& routing, int64_t n, double* logits, double* scratch, int32_t* experts, float* weights) {
  const int64_t count = routing.experts, chosen = routing.chosen;
  double *const scores = scratch, *const biased = scratch + count;
  for (; n > 0; --n, logits += count, experts += chosen, weights += chosen) {
    if (routing.bias_of == Routing::Bias::logits)
      for (int64_t e = 0; e < count; ++e) logits[e] += double(routing.bias[e]);
    for (int64_t e = 0; e < count; ++e)
      if (!std::isfinite(logits[e])) return false;
    score(routing, logits, scores);
    const double* order = logits;  // which is that of the scores
    if (routing.bias_of == Routing::Bias::choice) {
      for (int64_t e = 0; e < count; ++e) {
        biased[e] = scores[e] + double(routing.bias[e]);
        if (!std::isfinite(biased[e])) return false;
      }
      order = biased;
    }
    greatest_of(order, count, chosen, experts);
    double sum = 0;
    for (int64_t i = 0; i < chosen; ++i) sum += scores[experts[i]];
    for (int64_t i = 0; i < chosen; ++i) {
      const double own = scores[experts[i]];
      weights[i] = float((routing.normalized ? own / (sum + kLeastSum) : own) * routing.scale);
    }
  }
  return true;
}

}  // namespace tpimpi

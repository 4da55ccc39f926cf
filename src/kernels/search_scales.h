// Quantizing to blocks of 256 by the search that tpimpi/compute/formats/search_scales.py states, to the same bytes.
//
// Several blocks are worked on side by side, all arithmetic is single operations in f32, and sums are taken in the order of the
// weights.
#pragma once

#include "quantize.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// As many blocks as a vector of this level has lanes; compilers make its arithmetic and comparisons single instructions.
#if defined(__AVX512F__)
constexpr int kSide = 16;
#elif defined(__AVX__)
constexpr int kSide = 8;
#else
constexpr int kSide = 4;
#endif
typedef float Side __attribute__((vector_size(4 * kSide)));  // one number of each of the blocks

constexpr int kLargest = 256;  // weights of a block
constexpr int kMostParts = 16;

using Weights = Side[kLargest];  // a part of a block is a run of them
using Parts = Side[kMostParts];

// How far from the least and the greatest code the least and the greatest number are laid.
struct Margins {
  double low, high;
};

constexpr Margins kGridsOf4And5[] = {{0, 0},     {0, 0.5},  {-0.5, 0},  {-0.25, 0.25}, {0.25, 0.5},
                                     {0, -0.25}, {0.25, 0}, {-0.25, 0}, {0, -1},       {0.5, -0.5}};
constexpr Margins kGridsOf2[] = {{0, 0},      {0, -1},   {-0.25, 0.25}, {0, 0.5},   {-0.5, 0},
                                 {-0.4, 0.4}, {0.25, 0}, {0, -0.25},    {0.3, -0.3}};
constexpr float kTopsOf6[] = {-32, -31.5f, -31, -30.5f, -30, -32.5f, -33, 31, 31.5f};
constexpr float kTopsOf3[] = {-4, -4.5f, -3.5f, -4.25f, -3.75f, -5, 3, 3.5f, -3};
constexpr float kTopsOfIq4[] = {-127, -120, -113, -104, -134, -141, 113, 106, 120};
constexpr float kIq4Values[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};

inline Side all(float v) { return Side{} + v; }
inline Side magnitude(Side v) { return v < 0.0f ? -v : v; }
inline Side less_of(Side a, Side b) { return a < b ? a : b; }
inline Side more_of(Side a, Side b) { return a > b ? a : b; }
inline Side clamped(Side v, float low, float high) { return less_of(more_of(v, all(low)), all(high)); }
inline Side inverse_or_0(Side v) { return magnitude(v) < 1e-30f ? Side{} : 1.0f / v; }

inline Side rounded(Side v) {
  const float magic = 12582912.0f;  // as in quantize.h
  return (v + magic) - magic;
}

inline Side rounded_to_f16(Side v) {
  for (int l = 0; l < kSide; ++l) v[l] = rounded_to_f16(float(v[l]));
  return v;
}

// The nearest whole numbers to scales, of which those beyond any that a format has may be any such.
inline Side whole(Side v) { return rounded(clamped(v, -4e6f, 4e6f)); }

// What codes stand for, before they are multiplied by a scale.

// Whole numbers.
struct EvenLevels {
  float low, high;
  Side operator()(Side v) const { return rounded(clamped(v, low, high)); }
};

// The 16 values of iq4_nl and iq4_xs; half way between two it is the lower.
struct Iq4Levels {
  Side operator()(Side v) const {
    Side level = all(kIq4Values[0]);
    for (int i = 1; i < 16; ++i) level = v > (kIq4Values[i] + kIq4Values[i - 1]) / 2 ? all(kIq4Values[i]) : level;
    return level;
  }
};

// The scale of weights x [count] with the least error; each of `tops` is where the number of largest magnitude is laid.
template <class Levels, int n>
Side best_scale(const Side* x, int count, Levels levels, const float (&tops)[n]) {
  Side top = x[0], best = {}, least = {};
  for (int i = 1; i < count; ++i) top = magnitude(x[i]) > magnitude(top) ? x[i] : top;
  top = inverse_or_0(top);
  for (int i = 0; i < count; ++i) least += x[i] * x[i];
  for (float grid : tops) {
    Side products = {}, squares = {}, error = {};
    const Side up = grid * top;
    for (int i = 0; i < count; ++i) {
      const Side q = levels(x[i] * up);
      products += x[i] * q;
      squares += q * q;
    }
    const Side scale = products * inverse_or_0(squares), down = inverse_or_0(scale);
    for (int i = 0; i < count; ++i) {
      const Side e = x[i] - scale * levels(x[i] * down);
      error += e * e;
    }
    best = error < least ? scale : best;
    least = error < least ? error : least;
  }
  return best;
}

// The scale and the minimum, not above 0, of weights x [count] for codes of 0 to `high`.
template <int n>
void best_scale_and_minimum(const Side* x, int count, float high, const Margins (&grids)[n], Side& best_d, Side& best_m) {
  const EvenLevels levels{0, high};
  const float size = float(count);
  Side low = x[0], extent = x[0], total = x[0], least = {};
  for (int i = 1; i < count; ++i) {
    low = less_of(x[i], low);
    extent = more_of(x[i], extent);
    total += x[i];
  }
  low = less_of(low, Side{});
  extent = extent - low;
  best_d = extent / high;
  best_m = low;
  const Side first_ratio = inverse_or_0(best_d), up = inverse_or_0(extent);
  for (int i = 0; i < count; ++i) {
    const Side e = x[i] - (best_d * levels((x[i] - low) * first_ratio) + low);
    least += e * e;
  }
  for (const Margins& grid : grids) {
    const float steps = float(double(high) + grid.high - grid.low), start = float(grid.low);
    Side codes = {}, products = {}, squares = {}, error = {};
    const Side ratio = steps * up;
    for (int i = 0; i < count; ++i) {
      const Side q = levels((x[i] - low) * ratio + start);
      codes += q;
      products += x[i] * q;
      squares += q * q;
    }
    Side d = (size * products - total * codes) * inverse_or_0(size * squares - codes * codes);
    Side m = (total - d * codes) / size;
    d = m > 0.0f ? products * inverse_or_0(squares) : d;
    m = less_of(m, Side{});
    const Side down = inverse_or_0(d);
    for (int i = 0; i < count; ++i) {
      const Side e = x[i] - (d * levels((x[i] - m) * down) + m);
      error += e * e;
    }
    const auto better = (error < least) & (d > 0.0f);
    best_d = better ? d : best_d;
    best_m = better ? m : best_m;
    least = better ? error : least;
  }
}

// Blocks in parts with a whole scale each: a weight is d * scale * level.
struct Scaled {
  Side d;
  Parts scales;
};

template <class Levels>
Side error_of_scale(const Side* x, int count, Levels levels, Side product) {
  const Side down = inverse_or_0(product);
  Side error = {};
  for (int i = 0; i < count; ++i) {
    const Side e = x[i] - product * levels(x[i] * down);
    error += e * e;
  }
  return error;
}

template <class Levels, int n>
void scales_of_parts(const Weights x, int parts, Levels levels, const float (&tops)[n], Codes range, Scaled& out) {
  const int count = kLargest / parts;
  Parts scale;
  Side products = {}, squares = {}, old_error = {}, new_error = {};
  for (int p = 0; p < parts; ++p) scale[p] = best_scale(x + p * count, count, levels, tops);
  Side top = scale[0];
  for (int p = 1; p < parts; ++p) top = magnitude(scale[p]) > magnitude(top) ? scale[p] : top;
  out.d = rounded_to_f16(top / range.low);
  const Side down = inverse_or_0(out.d);
  for (int p = 0; p < parts; ++p) {
    const Side* part = x + p * count;
    const Side nearest = whole(scale[p] * down);
    Side best = clamped(nearest, range.low, range.high);
    Side least = error_of_scale(part, count, levels, out.d * best);
    for (int step = -1; step <= 1; step += 2) {
      const Side tried = clamped(nearest + float(step), range.low, range.high);
      const Side error = error_of_scale(part, count, levels, out.d * tried);
      best = error < least ? tried : best;
      least = error < least ? error : least;
    }
    out.scales[p] = best;
    old_error += least;
    const Side down_of_part = inverse_or_0(out.d * best);
    for (int i = 0; i < count; ++i) {
      const Side multiple = best * levels(part[i] * down_of_part);
      products += part[i] * multiple;
      squares += multiple * multiple;
    }
  }
  const Side fitted = rounded_to_f16(products * inverse_or_0(squares));
  for (int p = 0; p < parts; ++p) new_error += error_of_scale(x + p * count, count, levels, fitted * out.scales[p]);
  out.d = new_error < old_error ? fitted : out.d;
}

// Blocks in parts with a whole scale and minimum each: a weight is d * scale * code - dmin * minimum.
struct Affine {
  Side d, dmin;
  Parts scales, minima;
};

inline Side error_of_affine(const Side* x, int count, EvenLevels levels, Side product, Side minimum) {
  const Side down = inverse_or_0(product);
  Side error = {};
  for (int i = 0; i < count; ++i) {
    const Side e = x[i] - (product * levels((x[i] + minimum) * down) - minimum);
    error += e * e;
  }
  return error;
}

// Of whole scales and minima near those of each part, for d and dmin of `out`, those of least error; its sum.
inline Side best_neighbours(const Weights x, int parts, EvenLevels levels, float most, const Parts scale, const Parts low,
                            Affine& out) {
  const int count = kLargest / parts;
  const Side down_d = inverse_or_0(out.d), down_m = inverse_or_0(out.dmin);
  Side total = {};
  for (int p = 0; p < parts; ++p) {
    const Side near_d = whole(scale[p] * down_d), near_m = whole(-low[p] * down_m);
    Side best_d = clamped(near_d, 0, most), best_m = clamped(near_m, 0, most);
    Side least = error_of_affine(x + p * count, count, levels, out.d * best_d, out.dmin * best_m);
    for (int step_d = -1; step_d <= 1; ++step_d)
      for (int step_m = -1; step_m <= 1; ++step_m) {
        if (step_d == 0 && step_m == 0) continue;
        const Side d = clamped(near_d + float(step_d), 0, most), m = clamped(near_m + float(step_m), 0, most);
        const Side error = error_of_affine(x + p * count, count, levels, out.d * d, out.dmin * m);
        const auto better = error < least;
        best_d = better ? d : best_d;
        best_m = better ? m : best_m;
        least = better ? error : least;
      }
    out.scales[p] = best_d;
    out.minima[p] = best_m;
    total += least;
  }
  return total;
}

template <int n>
void scales_and_minima_of_parts(const Weights x, int parts, float high, float most, const Margins (&grids)[n], bool plain,
                                Affine& out) {
  const int count = kLargest / parts;
  Parts scale, low;
  for (int p = 0; p < parts; ++p) best_scale_and_minimum(x + p * count, count, high, grids, scale[p], low[p]);
  Side greatest = scale[0], least_m = low[0];
  for (int p = 1; p < parts; ++p) {
    greatest = more_of(scale[p], greatest);
    least_m = less_of(low[p], least_m);
  }
  out.d = rounded_to_f16(greatest / most);
  out.dmin = rounded_to_f16(-least_m / most);
  const Side least = best_neighbours(x, parts, EvenLevels{0, high}, most, scale, low, out);
  if (!plain) return;
  Affine other;
  other.d = rounded_to_f16(greatest);
  other.dmin = rounded_to_f16(-least_m);
  const Side error = best_neighbours(x, parts, EvenLevels{0, high}, most, scale, low, other);
  const auto better = error < least;
  out.d = better ? other.d : out.d;
  out.dmin = better ? other.dmin : out.dmin;
  for (int p = 0; p < parts; ++p) {
    out.scales[p] = better ? other.scales[p] : out.scales[p];
    out.minima[p] = better ? other.minima[p] : out.minima[p];
  }
}

}  // namespace
}  // namespace tpimpi

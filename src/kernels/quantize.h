// Quantizing to q8_0, q4_0 and q4_1 by the search that tpimpi/compute/formats/search.py states, to the same bytes.
//
// Sixteen blocks are worked on side by side, one in each lane, in loops that the compiler turns into vector code. All arithmetic
// is single operations in f32: compile with -ffp-contract=off.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

using Lanes = float[kLanes];
using Blocks = float[kBlock][kLanes];  // number i of each of the blocks

#define TPIMPI_LANES for (int l = 0; l < kLanes; ++l)

struct Codes {
  float low, high;
};

struct Grid {
  float low, high;  // the codes of the least and the greatest number of a block
};

constexpr float kCodesOfTop8[] = {127, 126, 125, 124, 123, 122, 121, 120};
constexpr float kCodesOfTop4[] = {-8, -8.5f, -7.25f, -8.75f, -7.75f, -8.25f, -9, -7, -7.5f, 7.5f, -6.75f, 8};
constexpr Grid kGrids[] = {{0, 15},      {0, 15.5f},   {-0.5f, 15},      {-0.25f, 15.25f}, {0.25f, 15.5f},
                           {0, 14.75f},  {1, 15},      {0.25f, 15},      {0, 15.25f},      {-0.25f, 15},
                           {-0.5f, 14.75f}, {0, 14},   {1, 14},          {-0.25f, 14}};

// The nearest integer, ties to even, of numbers below 2^22.
inline float rounded(float v) {
  const float magic = 12582912.0f;  // 1.5 * 2^23: its last place is one
  return (v + magic) - magic;
}

inline float clamped(float v, float low, float high) {
  v = v < low ? low : v;
  return v > high ? high : v;
}

// As f32, the nearest finite f16, ties to even; zero is +0.
inline float rounded_to_f16(float v) {
  v = clamped(v, -65504.0f, 65504.0f);
  uint32_t bits, sign, magnitude, normal;
  std::memcpy(&bits, &v, 4);
  sign = bits & 0x80000000u;
  magnitude = bits ^ sign;
  normal = (magnitude + 0xfff + ((magnitude >> 13) & 1)) & ~0x1fffu;
  float absolute, result;
  std::memcpy(&absolute, &magnitude, 4);
  // Below 2^-14 the last place of an f16 is 2^-24, which is that of an f32 between 0.5 and 1.
  const float small = (absolute + 0.5f) - 0.5f;
  uint32_t small_bits;
  std::memcpy(&small_bits, &small, 4);
  const uint32_t chosen = (magnitude < 0x38800000u ? small_bits : normal) | sign;
  std::memcpy(&result, &chosen, 4);
  return result + 0.0f;
}

// The bits of a number that is an f16.
inline uint16_t f16_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffffu;
  if (magnitude < 0x38800000u) return uint16_t(sign | uint32_t(std::fabs(v) * 16777216.0f));
  return uint16_t(sign | ((magnitude - 0x38000000u) >> 13));
}

inline float inverse(float d) { return d == 0 ? 0.0f : 1.0f / d; }

inline void sum(Blocks v, Lanes out) {
  for (int half = kBlock / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) TPIMPI_LANES v[i][l] = v[i][l] + v[i + half][l];
  TPIMPI_LANES out[l] = v[0][l];
}

inline void choose_codes(const Blocks x, const Lanes d, const Lanes m, Codes codes, Blocks q) {
  Lanes inverses;
  TPIMPI_LANES inverses[l] = inverse(d[l]);
  for (int i = 0; i < kBlock; ++i)
    TPIMPI_LANES q[i][l] = clamped(rounded(clamped((x[i][l] - m[l]) * inverses[l], -4e6f, 4e6f)), codes.low, codes.high);
}

inline void keep_if_better(const Blocks x, const Lanes d, const Lanes m, Codes codes, bool first, Lanes best_d, Lanes best_m,
                           Lanes best_error) {
  Blocks q;
  Lanes error;
  choose_codes(x, d, m, codes, q);
  for (int i = 0; i < kBlock; ++i) TPIMPI_LANES {
      const float e = x[i][l] - (q[i][l] * d[l] + m[l]);
      q[i][l] = e * e;
    }
  sum(q, error);
  TPIMPI_LANES {
    const bool better = first || error[l] < best_error[l];
    best_d[l] = better ? d[l] : best_d[l];
    best_m[l] = better ? m[l] : best_m[l];
    best_error[l] = better ? error[l] : best_error[l];
  }
}

// q8_0 and q4_0: the best scales of x.
inline void search_scale(const Blocks x, bool wide, Codes codes, Lanes best_d) {
  Lanes top, d, best_error, none = {}, best_none;
  TPIMPI_LANES top[l] = x[0][l];
  for (int i = 1; i < kBlock; ++i) TPIMPI_LANES top[l] = std::fabs(x[i][l]) > std::fabs(top[l]) ? x[i][l] : top[l];
  if (wide) TPIMPI_LANES top[l] = std::fabs(top[l]);
  TPIMPI_LANES d[l] = rounded_to_f16(top[l] / (wide ? 127.0f : -8.0f));
  keep_if_better(x, d, none, codes, true, best_d, best_none, best_error);
  const int count = wide ? int(sizeof kCodesOfTop8 / sizeof(float)) : int(sizeof kCodesOfTop4 / sizeof(float));
  for (int c = 0; c < count; ++c) {
    const float k = wide ? kCodesOfTop8[c] : kCodesOfTop4[c];
    Blocks q, squares, products;
    Lanes ratio, s, p;
    TPIMPI_LANES ratio[l] = std::fabs(top[l]) < 1e-30f ? 0.0f : k / top[l];
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES q[i][l] = clamped(rounded(x[i][l] * ratio[l]), codes.low, codes.high);
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES squares[i][l] = q[i][l] * q[i][l];
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES products[i][l] = x[i][l] * q[i][l];
    sum(squares, s);
    sum(products, p);
    TPIMPI_LANES d[l] = rounded_to_f16(s[l] > 0 ? p[l] / s[l] : 0.0f);
    keep_if_better(x, d, none, codes, false, best_d, best_none, best_error);
  }
}

// q4_1: the best scales and minima of x.
inline void search_affine(const Blocks x, Codes codes, Lanes best_d, Lanes best_m) {
  Lanes least, extent, total, d, m, best_error;
  TPIMPI_LANES least[l] = extent[l] = x[0][l];
  for (int i = 1; i < kBlock; ++i) TPIMPI_LANES {
      least[l] = x[i][l] < least[l] ? x[i][l] : least[l];
      extent[l] = x[i][l] > extent[l] ? x[i][l] : extent[l];
    }
  Blocks y, work;
  TPIMPI_LANES extent[l] = extent[l] - least[l];
  for (int i = 0; i < kBlock; ++i) TPIMPI_LANES work[i][l] = y[i][l] = x[i][l] - least[l];
  sum(work, total);
  TPIMPI_LANES d[l] = rounded_to_f16(extent[l] / 15.0f);
  TPIMPI_LANES m[l] = rounded_to_f16(least[l]);
  keep_if_better(x, d, m, codes, true, best_d, best_m, best_error);
  for (const Grid& grid : kGrids) {
    const float steps = grid.high - grid.low;
    Blocks q;
    Lanes ratio, s, products, squares;
    TPIMPI_LANES ratio[l] = extent[l] < 1e-30f ? 0.0f : steps / extent[l];
    for (int i = 0; i < kBlock; ++i)
      TPIMPI_LANES q[i][l] = clamped(rounded(y[i][l] * ratio[l] + grid.low), codes.low, codes.high);
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES work[i][l] = q[i][l];
    sum(work, s);
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES work[i][l] = y[i][l] * q[i][l];
    sum(work, products);
    for (int i = 0; i < kBlock; ++i) TPIMPI_LANES work[i][l] = q[i][l] * q[i][l];
    sum(work, squares);
    TPIMPI_LANES {
      const float n = 32.0f * products[l] - total[l] * s[l];
      const float p = 32.0f * squares[l] - s[l] * s[l];
      d[l] = rounded_to_f16(n > 0 && p > 0 ? n / p : extent[l] / steps);
      m[l] = rounded_to_f16(least[l] + (total[l] - d[l] * s[l]) / 32.0f);
    }
    keep_if_better(x, d, m, codes, false, best_d, best_m, best_error);
  }
}

// `blocks` blocks of 32 numbers at x, in GGML's row form. False, with nothing of use in `out`, where a number is not finite.
inline bool quantize(Format format, int64_t blocks, const float* x, uint8_t* out) {
  const bool wide = format == Format::q8_0, affine = format == Format::q4_1;
  const Codes codes = wide ? Codes{-127, 127} : affine ? Codes{0, 15} : Codes{-8, 7};
  for (int64_t first = 0; first < blocks; first += kLanes) {
    const int lanes = int(blocks - first < kLanes ? blocks - first : kLanes);
    Blocks v = {}, q;
    bool finite = true;
    for (int l = 0; l < lanes; ++l)
      for (int i = 0; i < kBlock; ++i) {
        const float number = x[(first + l) * kBlock + i];
        finite &= std::fabs(number) <= 3.402823466e38f;
        v[i][l] = clamped(number, -16777216.0f, 16777216.0f);
      }
    if (!finite) return false;
    Lanes d, m = {};
    if (affine)
      search_affine(v, codes, d, m);
    else
      search_scale(v, wide, codes, d);
    choose_codes(v, d, m, codes, q);
    for (int l = 0; l < lanes; ++l) {
      const uint16_t numbers[] = {f16_bits(d[l]), f16_bits(m[l])};
      std::memcpy(out, numbers, affine ? 4 : 2);
      out += affine ? 4 : 2;
      if (wide) {
        for (int i = 0; i < kBlock; ++i) *out++ = uint8_t(int8_t(q[i][l]));
      } else {
        const float shift = affine ? 0.0f : 8.0f;
        for (int i = 0; i < kBlock / 2; ++i)
          *out++ = uint8_t(int(q[i][l] + shift) | int(q[i + kBlock / 2][l] + shift) << 4);
      }
    }
  }
  return true;
}

#undef TPIMPI_LANES

}  // namespace
}  // namespace tpimpi

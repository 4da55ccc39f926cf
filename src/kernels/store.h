// Keys and values as they are stored, with the same bytes at every level: see tpimpi/compute/kv.py, which states them.
//
// In plain C++, in loops that the compiler turns into vector code: compile with -ffp-contract=off.
#pragma once

#include <cstring>

#include "kernels.h"
#include "quantize.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

constexpr uint16_t kNanF16 = 0x7e00;
constexpr float kMostOfQ8 = 65504.0f * 127;  // of a block: the largest f16 times the largest code

inline uint32_t magnitude_bits(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return bits & 0x7fffffffu;
}

// The bits of the nearest f16, ties to even; what is beyond its range becomes the largest that is finite. NaN stays NaN.
inline uint16_t nearest_f16(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  const uint32_t sign = bits >> 16 & 0x8000, whole = bits & 0x7fffffffu, magnitude = whole < 0x477fe000u ? whole : 0x477fe000u;
  float absolute;
  std::memcpy(&absolute, &magnitude, 4);
  // Below 2^-14 the last place of an f16 is 2^-24, which is that of an f32 between 0.5 and 1.
  const float shifted = absolute + 0.5f;
  uint32_t small;
  std::memcpy(&small, &shifted, 4);
  const uint32_t normal = (magnitude + 0xfff + (magnitude >> 13 & 1) - 0x38000000u) >> 13;
  const uint32_t chosen = magnitude < 0x38800000u ? small - 0x3f000000u : normal;
  return uint16_t(sign | (whole > 0x7f800000u ? kNanF16 : chosen));
}

// A block of 32 numbers: its scale, the nearest f16 to a 127th of the greatest, and its codes. With a NaN all are NaN.
inline void store_q8(const float* x, uint8_t* out) {
  uint32_t most = 0;
  for (int i = 0; i < kBlock; ++i) most = magnitude_bits(x[i]) > most ? magnitude_bits(x[i]) : most;
  if (most > 0x7f800000u) {
    std::memset(out, 0, size_t(block_bytes(Format::q8_0)));
    std::memcpy(out, &kNanF16, 2);
    return;
  }
  float greatest;
  std::memcpy(&greatest, &most, 4);
  const float scale = rounded_to_f16((greatest < kMostOfQ8 ? greatest : kMostOfQ8) / 127.0f), factor = inverse(scale);
  const uint16_t stored = f16_bits(scale);
  std::memcpy(out, &stored, 2);
  for (int i = 0; i < kBlock; ++i) out[2 + i] = uint8_t(int8_t(rounded(clamped(x[i] * factor, -127.0f, 127.0f))));
}

// See Level::store.
inline void store(Cached format, int64_t head_dim, int64_t n, const float* x, int64_t stride, uint8_t* out) {
  for (; n > 0; --n, x += head_dim, out += stride) {
    if (format == Cached::f32) {
      std::memcpy(out, x, size_t(head_dim) * 4);
    } else if (format == Cached::f16) {
      for (int64_t i = 0; i < head_dim; ++i) {
        const uint16_t bits = nearest_f16(x[i]);
        std::memcpy(out + i * 2, &bits, 2);
      }
    } else {
      for (int64_t i = 0; i < head_dim; i += kBlock) store_q8(x + i, out + cached_bytes(format, i));
    }
  }
}

}  // namespace
}  // namespace tpimpi

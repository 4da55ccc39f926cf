// What this processor can do at most with one thread, measured the way the kernels work: reading memory, and multiplying.
#pragma once

#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// The sum of the 8-byte words of `bytes` bytes (a multiple of 256): reads them, and nothing else.
inline uint64_t read(const uint8_t* data, int64_t bytes) {
  uint64_t sums[32] = {};
  for (int64_t i = 0; i < bytes; i += 256) {
    for (int line = 0; line < 4; ++line) __builtin_prefetch(data + i + 2048 + line * kLine);
    for (int w = 0; w < 32; ++w) {
      uint64_t word;
      std::memcpy(&word, data + i + w * 8, sizeof word);  // which may stand at any address
      sums[w] += word;
    }
  }
  for (int w = 1; w < 32; ++w) sums[0] += sums[w];
  return sums[0];
}

// Multiplications and additions, counted as two, that `rounds` rounds of this level's product for a format take. All operands
// stay in registers. `sink` gets a number, so that nothing is left out.
template <class S>
int64_t multiply_round(Format format, int64_t rounds, float* sink) {
  constexpr int chains = 12;
  static const int32_t one = 0x01010101;  // as int8
  [[maybe_unused]] static const int32_t small = 0x3f003f00;  // as bf16
  typename S::F sums[chains];
  typename S::I parts[chains];
  for (int c = 0; c < chains; ++c) {
    sums[c] = S::set(float(c));
    parts[c] = S::set_int(c);
  }
  alignas(kLine) uint8_t bytes[kLine];
  for (int i = 0; i < kLine; ++i) bytes[i] = uint8_t(!quantized(format) ? (i % 2 ? 0x3f : 0) : 1);
  const auto w = S::load_line(bytes);
  int64_t multiplied = 0;
  for (int64_t r = 0; r < rounds; ++r) {
    for (int c = 0; c < chains; ++c) {
      if (format == Format::f32 || format == Format::f16) {
        sums[c] = S::fma(sums[c], S::as_float(w), S::as_float(w));
      } else if (format == Format::bf16) {
        if constexpr (S::kBf16Pairs)
          sums[c] = S::dot_bf16(sums[c], w, &small);
        else
          sums[c] = S::fma(S::low_bf16(w), S::as_float(w), S::fma(S::high_bf16(w), S::as_float(w), sums[c]));
      } else {
        parts[c] = S::dot_u4(parts[c], w, &one);
      }
    }
    multiplied += chains * (format == Format::f32 || format == Format::f16 ? 16 : format == Format::bf16 ? 32 : 64);
  }
  float lanes[kPanelRows];
  *sink = 0;
  for (int c = 0; c < chains; ++c) {
    S::store(lanes, S::add(sums[c], S::to_float(parts[c])));
    *sink += lanes[0];
  }
  return 2 * multiplied;
}

}  // namespace
}  // namespace tpimpi

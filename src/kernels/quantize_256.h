// Quantizing to blocks of 256: what search_scales.h finds, in GGML's row form; and which search makes which format.
#pragma once

#include "search_scales.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// GGML's blocks of one lane: from the found scales, and the codes q [weights].

inline void put_f16(float v, uint8_t* out) {
  const uint16_t bits = f16_bits(v);
  std::memcpy(out, &bits, 2);
}

// Pairs of bits of codes of 256 weights: of each half of 128, byte j has those of weights j, 32 + j, 64 + j and 96 + j.
inline void put_pairs_of_bits(const uint8_t* q, int shift, uint8_t* out) {
  for (int half = 0; half < 2; ++half)
    for (int j = 0; j < 32; ++j) {
      int byte = 0;
      for (int unit = 0; unit < 4; ++unit) byte |= (q[128 * half + 32 * unit + j] >> shift & 3) << 2 * unit;
      out[32 * half + j] = uint8_t(byte);
    }
}

// A bit of the codes of 256 weights: byte j has those of weights j, 32 + j, 64 + j, ….
inline void put_high_bits(const uint8_t* q, int shift, uint8_t* out) {
  for (int j = 0; j < 32; ++j) {
    int byte = 0;
    for (int unit = 0; unit < 8; ++unit) byte |= (q[32 * unit + j] >> shift & 1) << unit;
    out[j] = uint8_t(byte);
  }
}

inline void put_affine(Format format, const Affine& found, int l, const uint8_t* q, uint8_t* out) {
  if (format == Format::q2_k) {
    for (int p = 0; p < 16; ++p) out[p] = uint8_t(int(found.scales[p][l]) | int(found.minima[p][l]) << 4);
    put_pairs_of_bits(q, 0, out + 16);
    put_f16(found.d[l], out + 80);
    put_f16(found.dmin[l], out + 82);
    return;
  }
  put_f16(found.d[l], out);
  put_f16(found.dmin[l], out + 2);
  for (int i = 0; i < 4; ++i) {
    const int near[] = {int(found.scales[i][l]), int(found.minima[i][l])};
    const int far[] = {int(found.scales[4 + i][l]), int(found.minima[4 + i][l])};
    for (int kind = 0; kind < 2; ++kind) out[4 + 4 * kind + i] = uint8_t(near[kind] | (far[kind] >> 4) << 6);
    out[12 + i] = uint8_t((far[0] & 15) | (far[1] & 15) << 4);
  }
  uint8_t* codes = out + 16;
  if (format == Format::q5_k) {
    put_high_bits(q, 4, codes);
    codes += 32;
  }
  for (int i = 0; i < 4; ++i)
    for (int j = 0; j < 32; ++j) codes[32 * i + j] = uint8_t((q[64 * i + j] & 15) | (q[64 * i + 32 + j] & 15) << 4);
}

inline void put_scaled(Format format, const Scaled& found, int l, const uint8_t* q, uint8_t* out) {
  if (format == Format::q6_k) {
    for (int half = 0; half < 2; ++half)
      for (int j = 0; j < 64; ++j)
        out[64 * half + j] = uint8_t((q[128 * half + j] & 15) | (q[128 * half + 64 + j] & 15) << 4);
    put_pairs_of_bits(q, 4, out + 128);
    for (int p = 0; p < 16; ++p) out[192 + p] = uint8_t(int8_t(found.scales[p][l]));
    put_f16(found.d[l], out + 208);
  } else if (format == Format::q3_k) {
    put_high_bits(q, 2, out);
    put_pairs_of_bits(q, 0, out + 32);
    for (int i = 0; i < 4; ++i) out[104 + i] = 0;
    for (int p = 0; p < 16; ++p) {
      const int scale = int(found.scales[p][l]) + 32;
      out[96 + p % 8] = uint8_t(p < 8 ? scale & 15 : out[96 + p % 8] | (scale & 15) << 4);
      out[104 + p % 4] = uint8_t(out[104 + p % 4] | (scale >> 4) << 2 * (p / 4));
    }
    put_f16(found.d[l], out + 108);
  } else {
    put_f16(found.d[l], out);
    uint32_t low = 0;
    int high = 0;
    for (int p = 0; p < 8; ++p) {
      const int scale = int(found.scales[p][l]) + 32;
      low |= uint32_t(scale & 15) << 4 * p;
      high |= (scale >> 4) << 2 * p;
    }
    const uint16_t high_bits = uint16_t(high);
    std::memcpy(out + 2, &high_bits, 2);
    std::memcpy(out + 4, &low, 4);
    for (int unit = 0; unit < 8; ++unit)
      for (int j = 0; j < 16; ++j) out[8 + 16 * unit + j] = uint8_t(q[32 * unit + j] | q[32 * unit + 16 + j] << 4);
  }
}

inline int iq4_code(float level) {
  int code = 0;
  for (int i = 1; i < 16; ++i) code += level >= kIq4Values[i];
  return code;
}

// The codes q [blocks][256] of weights, from the scales and minima of their parts.
template <class Levels, class Code>
void codes_of_parts(const Weights x, int parts, Levels levels, Code code, Side d, const Parts scales, Side dmin,
                    const Parts minima, uint8_t (*q)[kLargest]) {
  const int count = kLargest / parts;
  for (int p = 0; p < parts; ++p) {
    const Side down = inverse_or_0(d * scales[p]), minimum = dmin * minima[p];
    for (int i = p * count; i < (p + 1) * count; ++i) {
      const Side level = levels((x[i] + minimum) * down);
      for (int l = 0; l < kSide; ++l) q[l][i] = uint8_t(code(level[l]));
    }
  }
}

template <int n>
void affine_blocks(Format format, const Weights x, int lanes, int parts, float high, float most, const Margins (&grids)[n],
                   uint8_t* out) {
  Affine found;
  uint8_t q[kSide][kLargest];
  scales_and_minima_of_parts(x, parts, high, most, grids, format == Format::q2_k, found);
  codes_of_parts(x, parts, EvenLevels{0, high}, [](float level) { return int(level); }, found.d, found.scales, found.dmin,
                 found.minima, q);
  for (int l = 0; l < lanes; ++l) put_affine(format, found, l, q[l], out + l * block_bytes(format));
}

template <class Levels, class Code, int n>
void scaled_blocks(Format format, const Weights x, int lanes, int parts, Levels levels, Code code, const float (&tops)[n],
                   Codes range, uint8_t* out) {
  Scaled found;
  uint8_t q[kSide][kLargest];
  scales_of_parts(x, parts, levels, tops, range, found);
  codes_of_parts(x, parts, levels, code, found.d, found.scales, Side{}, found.scales, q);
  for (int l = 0; l < lanes; ++l) put_scaled(format, found, l, q[l], out + l * block_bytes(format));
}

// `blocks` blocks of 256 numbers at x, in GGML's row form; false, with nothing of use in `out`, where a number is not finite.
inline bool quantize_256(Format format, int64_t blocks, const float* x, uint8_t* out) {
  for (int64_t first = 0; first < blocks; first += kSide, x += kSide * kLargest, out += kSide * block_bytes(format)) {
    const int lanes = int(blocks - first < kSide ? blocks - first : kSide);
    Weights v = {};
    bool finite = true;
    for (int l = 0; l < lanes; ++l)
      for (int i = 0; i < kLargest; ++i) {
        const float number = x[l * kLargest + i];
        finite &= std::fabs(number) <= 3.402823466e38f;
        v[i][l] = clamped(number, -16777216.0f, 16777216.0f);
      }
    if (!finite) return false;
    switch (format) {
      case Format::q4_k: affine_blocks(format, v, lanes, 8, 15, 63, kGridsOf4And5, out); break;
      case Format::q5_k: affine_blocks(format, v, lanes, 8, 31, 63, kGridsOf4And5, out); break;
      case Format::q2_k: affine_blocks(format, v, lanes, 16, 3, 15, kGridsOf2, out); break;
      case Format::q6_k:
        scaled_blocks(format, v, lanes, 16, EvenLevels{-32, 31}, [](float level) { return int(level) + 32; }, kTopsOf6,
                      Codes{-128, 127}, out);
        break;
      case Format::q3_k:
        scaled_blocks(format, v, lanes, 16, EvenLevels{-4, 3}, [](float level) { return int(level) + 4; }, kTopsOf3,
                      Codes{-32, 31}, out);
        break;
      default: scaled_blocks(format, v, lanes, 8, Iq4Levels(), iq4_code, kTopsOfIq4, Codes{-32, 31}, out);
    }
  }
  return true;
}

// Blocks of any format that the kernels make: of 32 or of 256 numbers.
inline bool quantize_blocks(Format format, int64_t blocks, const float* x, uint8_t* out) {
  return block_weights(format) == kBlock ? quantize(format, blocks, x, out) : quantize_256(format, blocks, x, out);
}

}  // namespace
}  // namespace tpimpi

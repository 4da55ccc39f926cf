#include "pack.h"

#include <algorithm>
#include <cstring>

namespace tpimpi {
namespace {

constexpr int kUnits = 8;                 // of a block of 256
constexpr uint32_t kLow4 = 0x0f0f0f0fu;   // the low nibble of each byte
constexpr int kMostLines = 6 * kUnits;    // of codes of a block

uint32_t word_at(const uint8_t* bytes) {
  uint32_t word;
  std::memcpy(&word, bytes, 4);
  return word;
}

uint16_t half_at(const uint8_t* bytes) {
  uint16_t half;
  std::memcpy(&half, bytes, 2);
  return half;
}

// Where a row's words go: word `row` of each line of a panel.
struct Lines {
  uint8_t* at;
  int row;

  void word(int line, uint32_t value) const { std::memcpy(at + line * kLine + row * 4, &value, 4); }
  // A line of f16 numbers: 16 of one kind, then 16 of another.
  void half(int line, int kind, uint16_t value) const { std::memcpy(at + line * kLine + kind * 32 + row * 2, &value, 2); }
};

// Numbers and codes of a block of 256 of one row, in the order of packed form.
struct Block {
  uint16_t numbers[2];  // d and dmin, or what stands in its place
  uint32_t lines[kMostLines];
};

using Pairs = uint8_t[kUnits][2];  // scales and minima of the units of a block, or their two scales

// Lines of two units of 32 from the 8 words that hold the one's codes in low and the other's in high nibbles.
void swap_nibbles(const uint8_t* codes, int words, uint32_t* low, uint32_t* high) {
  for (int k = 0; k < words / 2; ++k) {
    const uint32_t even = word_at(codes + 8 * k), odd = word_at(codes + 8 * k + 4);
    low[k] = (even & kLow4) | (odd & kLow4) << 4;
    high[k] = (even >> 4 & kLow4) | (odd & ~kLow4);
  }
}

// Words with n fields of `bits` bits in each byte: field i of word k becomes field k of word i.
template <int n, int bits>
void transpose_fields(uint32_t* words) {
  for (int distance = 1; distance < n; distance *= 2) {
    const int shift = distance * bits;
    const uint32_t mask = shift == 1 ? 0x55555555u : shift == 2 ? 0x33333333u : kLow4;
    for (int k = 0; k < n; ++k)
      if (!(k & distance)) {
        const uint32_t changed = (words[k] >> shift ^ words[k + distance]) & mask;
        words[k + distance] ^= changed;
        words[k] ^= changed << shift;
      }
  }
}

// High bits of 8 units, a bit of each in each of 32 bytes: a line for each unit, `step` lines apart.
void high_bits(const uint8_t* bytes, int step, uint32_t* lines) {
  uint32_t words[8];
  std::memcpy(words, bytes, 32);
  transpose_fields<8, 1>(words);
  for (int unit = 0; unit < kUnits; ++unit) lines[unit * step] = words[unit];
}

// Pairs of bits of 8 units, those of four units in each of 32 bytes: two lines for each unit, `step` lines apart.
void pairs_of_bits(const uint8_t* bytes, int step, uint32_t* lines) {
  for (int half = 0; half < 2; ++half)
    for (int line = 0; line < 2; ++line) {
      uint32_t words[4];
      std::memcpy(words, bytes + 32 * half + 16 * line, 16);
      transpose_fields<4, 2>(words);
      for (int unit = 0; unit < 4; ++unit) lines[(4 * half + unit) * step + line] = words[unit];
    }
}

// The scales (and minima) of a block.
template <Format format>
void take_pairs(const uint8_t* block, Pairs pairs) {
  if constexpr (format == Format::q6_k || format == Format::q2_k) {
    std::memcpy(pairs, block + (format == Format::q6_k ? 192 : 0), 16);
  } else if constexpr (format == Format::q3_k) {
    for (int i = 0; i < 16; ++i) {
      const int low = block[96 + i % 8] >> (i < 8 ? 0 : 4) & 15, high = block[104 + i % 4] >> 2 * (i / 4) & 3;
      pairs[i / 2][i % 2] = uint8_t(low | high << 4);
    }
  } else if constexpr (format == Format::iq4_xs) {
    const uint32_t high = half_at(block + 2), low = word_at(block + 4);
    for (int unit = 0; unit < kUnits; ++unit) pairs[unit][0] = uint8_t((low >> 4 * unit & 15) | (high >> 2 * unit & 3) << 4);
  } else {
    for (int i = 0; i < 4; ++i)
      for (int kind = 0; kind < 2; ++kind) {
        const uint8_t high = block[4 + 4 * kind + i];
        pairs[i][kind] = high & 63;
        pairs[4 + i][kind] = uint8_t((block[12 + i] >> 4 * kind & 15) | (high >> 6) << 4);
      }
  }
}

// GGML's blocks, one function a format.

void take_q4_k(const uint8_t* block, Block& out) {
  std::memcpy(out.numbers, block, 4);
  for (int i = 0; i < 4; ++i) swap_nibbles(block + 16 + 32 * i, 8, out.lines + 8 * i, out.lines + 8 * i + 4);
}

void take_q5_k(const uint8_t* block, Block& out) {
  std::memcpy(out.numbers, block, 4);
  high_bits(block + 16, 5, out.lines);
  for (int i = 0; i < 4; ++i) swap_nibbles(block + 48 + 32 * i, 8, out.lines + 10 * i + 1, out.lines + 10 * i + 6);
}

void take_q6_k(const uint8_t* block, Block& out) {
  out.numbers[0] = half_at(block + 208);
  out.numbers[1] = 0;
  pairs_of_bits(block + 128, 6, out.lines);
  for (int half = 0; half < 2; ++half)
    for (int i = 0; i < 2; ++i) {
      uint32_t* lines = out.lines + 6 * (4 * half + i) + 2;
      swap_nibbles(block + 64 * half + 32 * i, 8, lines, lines + 12);
    }
}

void take_q3_k(const uint8_t* block, Block& out) {
  out.numbers[0] = half_at(block + 108);
  out.numbers[1] = 0;
  high_bits(block, 3, out.lines);
  pairs_of_bits(block + 32, 3, out.lines + 1);
}

void take_q2_k(const uint8_t* block, Block& out) {
  std::memcpy(out.numbers, block + 80, 4);
  pairs_of_bits(block + 16, 2, out.lines);
}

void take_iq4_xs(const uint8_t* block, Block& out) {
  std::memcpy(out.numbers, block, 4);
  for (int unit = 0; unit < kUnits; ++unit) {
    uint32_t* lines = out.lines + 4 * unit;
    swap_nibbles(block + 8 + 16 * unit, 4, lines, lines + 2);
  }
}

// The lines of scales of the units [begin, begin + units) of a block that is cut.
template <Format format>
void put_cut_scales(const uint8_t* block, int begin, int units, Lines lines) {
  Pairs all;
  take_pairs<format>(block, all);
  const uint8_t(*pairs)[2] = all + begin;
  uint8_t bytes[16] = {};
  if constexpr (format == Format::iq4_xs) {
    uint32_t low = 0;
    uint16_t high = 0;
    for (int unit = 0; unit < units; ++unit) {
      low |= uint32_t(pairs[unit][0] & 15) << 4 * unit;
      high = uint16_t(high | (pairs[unit][0] >> 4) << 2 * unit);
    }
    std::memcpy(bytes, &low, 4);
    lines.half(0, 1, high);
  } else if constexpr (format == Format::q6_k || format == Format::q2_k) {
    std::memcpy(bytes, pairs, size_t(2 * units));
  } else if (units <= 2) {
    for (int unit = 0; unit < units; ++unit)
      for (int kind = 0; kind < 2; ++kind) bytes[2 * kind + unit] = pairs[unit][kind];
  } else {
    for (int i = 0; i < 4; ++i)
      for (int kind = 0; kind < 2; ++kind) {
        const uint8_t near = i < units ? pairs[i][kind] : uint8_t(0), far = 4 + i < units ? pairs[4 + i][kind] : uint8_t(0);
        bytes[4 * kind + i] = uint8_t(near | (far >> 4) << 6);
        bytes[8 + i] = uint8_t(bytes[8 + i] | (far & 15) << 4 * kind);
      }
  }
  for (int line = 1; line < scale_lines(format, units); ++line) lines.word(line, word_at(bytes + 4 * (line - 1)));
}

// The lines of scales of a whole block: its bytes as they are, but for q3_k.
template <Format format>
void put_scales(const uint8_t* block, Lines lines) {
  if constexpr (format == Format::q3_k) return put_cut_scales<format>(block, 0, kUnits, lines);
  constexpr int start = format == Format::q6_k ? 192 : format == Format::q2_k ? 0 : 4;
  for (int line = 1; line < scale_lines(format, kUnits); ++line) lines.word(line, word_at(block + start + 4 * (line - 1)));
}

// The units [begin, begin + units) of a block of 256 of each row.
template <Format format, void (*take)(const uint8_t*, Block&)>
void pack_256(const uint8_t* stored, int64_t stride, int rows, int begin, int units, uint8_t* out) {
  constexpr int of_unit = unit_lines(format);
  for (int row = 0; row < rows; ++row) {
    const uint8_t* source = stored + row * stride;
    const Lines lines{out, row};
    Block block;
    take(source, block);
    for (int kind = 0; kind < 2; ++kind) lines.half(0, kind, block.numbers[kind]);
    if (units == kUnits) {
      put_scales<format>(source, lines);
      for (int line = 0; line < kUnits * of_unit; ++line) lines.word(scale_lines(format, kUnits) + line, block.lines[line]);
    } else {
      put_cut_scales<format>(source, begin, units, lines);
      const int scales = scale_lines(format, units);
      for (int line = 0; line < units * of_unit; ++line) lines.word(scales + line, block.lines[begin * of_unit + line]);
    }
  }
}

// A word of which bit j is column j's, as a line: bit k of byte i is that of column 4k + i.
uint32_t bits_to_line(uint32_t word) {
  uint32_t line = 0;
  for (int i = 0; i < 4; ++i) {
    uint32_t bits = word >> i & 0x11111111u;
    bits = (bits | bits >> 3) & 0x03030303u;
    bits = (bits | bits >> 6) & 0x000f000fu;
    line |= ((bits | bits >> 12) & 0xffu) << 8 * i;
  }
  return line;
}

// `blocks` blocks of 32 (a pair, or the last one) of each row.
template <Format format>
void pack_32(const uint8_t* stored, int64_t stride, int rows, int blocks, uint8_t* out) {
  constexpr int numbers = scale_lines(format, 2), words = unit_lines(format), size = 2 * numbers + 4 * words;
  for (int row = 0; row < rows; ++row) {
    const Lines lines{out, row};
    for (int b = 0; b < 2; ++b) {
      const uint8_t* block = stored + row * stride + b * size;
      for (int kind = 0; kind < numbers; ++kind) lines.half(kind, b, b < blocks ? half_at(block + 2 * kind) : uint16_t(0));
      for (int line = 0; b < blocks && line < words; ++line) {
        uint32_t word = word_at(block + 2 * numbers + 4 * line);
        if (format == Format::q8_0) word ^= 0x80808080u;
        if ((format == Format::q5_0 || format == Format::q5_1) && line == 0) word = bits_to_line(word);
        lines.word(numbers + b * words + line, word);
      }
    }
  }
}

// Up to four blocks of mxfp4 of each row.
void pack_mxfp4(const uint8_t* stored, int64_t stride, int rows, int blocks, uint8_t* out) {
  for (int row = 0; row < rows; ++row) {
    const Lines lines{out, row};
    uint32_t exponents = 0;
    for (int b = 0; b < blocks; ++b) {
      const uint8_t* block = stored + row * stride + 17 * b;
      exponents |= uint32_t(block[0]) << 8 * b;
      for (int line = 0; line < 4; ++line) lines.word(1 + 4 * b + line, word_at(block + 1 + 4 * line));
    }
    lines.word(0, exponents);
  }
}

// `units` units of 32 of each row, from unit `begin` of a block of 256 (0 in other formats) on: a group, or part of one.
void pack_group(Format format, const uint8_t* stored, int64_t stride, int rows, int begin, int units, uint8_t* out) {
  switch (format) {
    case Format::q4_k: return pack_256<Format::q4_k, take_q4_k>(stored, stride, rows, begin, units, out);
    case Format::q5_k: return pack_256<Format::q5_k, take_q5_k>(stored, stride, rows, begin, units, out);
    case Format::q6_k: return pack_256<Format::q6_k, take_q6_k>(stored, stride, rows, begin, units, out);
    case Format::q3_k: return pack_256<Format::q3_k, take_q3_k>(stored, stride, rows, begin, units, out);
    case Format::q2_k: return pack_256<Format::q2_k, take_q2_k>(stored, stride, rows, begin, units, out);
    case Format::iq4_xs: return pack_256<Format::iq4_xs, take_iq4_xs>(stored, stride, rows, begin, units, out);
    case Format::q8_0: return pack_32<Format::q8_0>(stored, stride, rows, units, out);
    case Format::q4_0: return pack_32<Format::q4_0>(stored, stride, rows, units, out);
    case Format::q4_1: return pack_32<Format::q4_1>(stored, stride, rows, units, out);
    case Format::q5_0: return pack_32<Format::q5_0>(stored, stride, rows, units, out);
    case Format::q5_1: return pack_32<Format::q5_1>(stored, stride, rows, units, out);
    case Format::iq4_nl: return pack_32<Format::iq4_nl>(stored, stride, rows, units, out);
    case Format::mxfp4: return pack_mxfp4(stored, stride, rows, units, out);
    case Format::f32:
    case Format::bf16:
    case Format::f16: break;
  }
}

// Rows of numbers, in pieces of `size` bytes: piece j of each of the 16 rows, for each j; the last line is filled with zeros.
template <int size>
void pack_numbers(int64_t bytes, const uint8_t* stored, int64_t stride, int rows, int64_t panel, uint8_t* out) {
  constexpr int64_t kTogether = 16;  // of each row: their lines stay in the cache
  const int64_t whole = bytes / size;
  for (int64_t first = 0; first < whole; first += kTogether)
    for (int row = 0; row < rows; ++row)
      for (int64_t j = first; j < std::min(whole, first + kTogether); ++j)
        std::memcpy(out + (j * kPanelRows + row) * size, stored + row * stride + j * size, size);
  uint8_t* rest = out + whole * kPanelRows * size;
  std::memset(rest, 0, size_t(out + panel - rest));
  if (const int64_t left = bytes % size)
    for (int row = 0; row < rows; ++row) std::memcpy(rest + row * size, stored + row * stride + whole * size, size_t(left));
}

}  // namespace

int64_t row_bytes(Format format, int64_t columns, int64_t first) {
  return divided_up(first + columns, block_weights(format)) * block_bytes(format);
}

void pack(Format format, int64_t rows, int64_t columns, int64_t first, const uint8_t* stored, int64_t stride, uint8_t* out) {
  const int64_t panel = panel_bytes(format, columns, first), units = divided_up(columns, kBlock);
  for (int64_t row = 0; row < rows; row += kPanelRows, out += panel) {
    const int present = int(std::min<int64_t>(kPanelRows, rows - row));
    const uint8_t* source = stored + row * stride;
    if (present < kPanelRows) std::memset(out, 0, size_t(panel));  // rows that are not there
    if (!quantized(format)) {
      const auto pack_them = format == Format::f16 ? pack_numbers<2> : pack_numbers<4>;
      pack_them(row_bytes(format, columns, 0), source, stride, present, panel, out);
      continue;
    }
    const int size = group_units(format), blocks = block_weights(format) == 256 ? 1 : size;
    uint8_t* lines = out;
    int begin = int(first / kBlock);
    for (int64_t done = 0; done < units; begin = 0) {
      const int count = int(std::min<int64_t>(size - begin, units - done));
      pack_group(format, source, stride, present, begin, count, lines);
      lines += (scale_lines(format, count) + count * unit_lines(format)) * kLine;
      source += blocks * block_bytes(format);
      done += count;
    }
  }
}

}  // namespace tpimpi

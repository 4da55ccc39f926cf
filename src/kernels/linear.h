// Matrix products for one level: y [n, rows] = x [n, columns] times the transpose of packed weights.
//
// Each weight is read from memory once, whatever the number of positions up to S::together, and stays in the cache for
// the next ones. Positions are taken in groups; a group's activations lie interleaved ("prepared"), so that one
// word of x is broadcast to the 16 rows of a panel.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// A group of n positions, prepared: for f32 [columns][n] floats; for bf16 [columns / 2][n] pairs; for quantized weights,
// for each block of 32 columns: words [8][n] (4 int8 each), scale [n] (f32), and third [n], which is what the sum starts
// with, int32 (it undoes the offset of unsigned weights), or for q4_1 the f32 sum of the block, which its minimum multiplies.
constexpr int kBlockWords = 10;

inline int64_t prepared_words(Format format, int64_t columns) {  // for one position
  if (format == Format::f32) return columns;
  if (format == Format::bf16) return divided_up(columns, 2);
  return divided_up(columns, kBlock) * kBlockWords;
}

inline uint32_t bits_of(float v) {
  uint32_t b;
  std::memcpy(&b, &v, 4);
  return b;
}

// Two numbers rounded to bf16, the first in the low half.
inline uint32_t bf16_pair(float low, float high) {
  uint32_t b[2] = {bits_of(low), bits_of(high)};
  for (uint32_t& v : b) {
    const bool nan = (v & 0x7fffffff) > 0x7f800000;
    v = nan ? v >> 16 | 0x40 : (v + 0x7fff + (v >> 16 & 1)) >> 16;
  }
  return b[0] | b[1] << 16;
}

// Quantize one block of one position, 32 numbers, to words [10][n]. The loops are such that compilers make vector code of them.
template <class S>
void prepare_block(Format format, const float* x, int32_t* words, int64_t n) {
  constexpr float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, ties to even, in its last places
  uint32_t greatest = 0;                // magnitudes are ordered as their bits are
  for (int i = 0; i < kBlock; ++i) {
    const uint32_t magnitude = bits_of(x[i]) & 0x7fffffff;
    greatest = greatest > magnitude ? greatest : magnitude;
  }
  float amax, scale = 0;
  std::memcpy(&amax, &greatest, 4);
  int8_t q[kBlock] = {};
  int32_t sum = 0;
  if (greatest >= 0x7f800000) {
    scale = NAN;
  } else if (amax >= 1e-30f) {
    scale = amax / 127;
    const float inverse = 127 / amax;
    int32_t rounded[kBlock];
    for (int i = 0; i < kBlock; ++i) rounded[i] = int32_t(bits_of(x[i] * inverse + magic) - bits_of(magic));
    for (int i = 0; i < kBlock; ++i) sum += rounded[i];
    for (int i = 0; i < kBlock; ++i) q[i] = int8_t(rounded[i]);
  }
  for (int j = 0; j < 8; ++j) std::memcpy(words + j * n, q + 4 * j, 4);
  std::memcpy(words + 8 * n, &scale, 4);
  if (format == Format::q4_1) {
    const float scaled = scale * float(sum);
    std::memcpy(words + 9 * n, &scaled, 4);
  } else {
    words[9 * n] = -sum * (format == Format::q8_0 ? S::kQ8Offset : 8);
  }
}

// Positions are taken in groups of S::together (8 or 16) while there are as many, then of 8, then what is left.
template <class S>
int64_t next_group(int64_t left) {
  return left >= S::together ? S::together : left >= 8 ? 8 : left;
}

template <class S>
void prepare(Format format, int64_t columns, int64_t positions, const float* x, uint8_t* prepared) {
  constexpr int64_t run = 4 * kBlock;  // columns after which the next position comes: what is written stays in the cache
  const int64_t size = prepared_words(format, columns);
  for (int64_t first = 0, n; first < positions; first += n) {
    n = next_group<S>(positions - first);
    int32_t* group = reinterpret_cast<int32_t*>(prepared) + first * size;
    for (int64_t column = 0; column < columns; column += run) {
      const int64_t end = column + run < columns ? column + run : columns;
      for (int64_t p = 0; p < n; ++p) {
        const float* row = x + (first + p) * columns;
        int64_t k = column;
        if (format == Format::f32) {
          for (; k < end; ++k) group[k * n + p] = int32_t(bits_of(row[k]));
        } else if (format == Format::bf16) {
          for (; k + 1 < end; k += 2) group[k / 2 * n + p] = int32_t(bf16_pair(row[k], row[k + 1]));
          if (k < end) group[k / 2 * n + p] = int32_t(bf16_pair(row[k], 0));
        } else {
          int32_t* words = group + k / kBlock * kBlockWords * n + p;
          for (; k + kBlock <= end; k += kBlock, words += kBlockWords * n) prepare_block<S>(format, row + k, words, n);
          if (k < end) {
            float last[kBlock] = {};
            std::memcpy(last, row + k, size_t(end - k) * sizeof(float));
            prepare_block<S>(format, last, words, n);
          }
        }
      }
    }
  }
}

// Have memory send weights that will be used some time after the line at w, of which `products` vector products are made. The
// hardware's own fetching stops at page ends, and falls behind where there is much to multiply. (Measured on Zen 4.)
template <int products>
inline void fetch_ahead(const uint8_t* w) {
  constexpr int second_cache = 2, first_cache = 3;
  if constexpr (products <= 4) {
    __builtin_prefetch(w + 2048, 0, first_cache);
  } else {  // so slow that few of the first cache's own requests would be under way: let the second cache run ahead of it
    __builtin_prefetch(w + 8192, 0, second_cache);
    __builtin_prefetch(w + 512, 0, first_cache);
  }
}

// What `lines` lines of f32 or bf16 weights give with N positions: sums [N], 16 rows each.
template <class S, Format format, int N>
inline void sum_lines(const uint8_t* w, int64_t lines, const int32_t* x, typename S::F* sums) {
  // With few positions more than one chain of sums keeps the multipliers busy.
  constexpr int chains = N <= 2 ? 4 : N <= 4 ? 2 : 1;
  typename S::F part[chains][N];
  for (int c = 0; c < chains; ++c)
    for (int p = 0; p < N; ++p) part[c][p] = S::zero();
  auto line = [&](int c, int64_t i) {
    const auto v = S::load_line(w + i * kLine);
    fetch_ahead<N>(w + i * kLine);
    for (int p = 0; p < N; ++p) {
      if constexpr (format == Format::bf16)
        part[c][p] = S::dot_bf16(part[c][p], v, x + i * N + p);
      else
        part[c][p] = S::fma(S::as_float(v), S::set(reinterpret_cast<const float*>(x)[i * N + p]), part[c][p]);
    }
  };
  int64_t i = 0;
  for (; i + 4 <= lines; i += 4)
    for (int c = 0; c < 4; ++c) line(c % chains, i + c);
  for (; i < lines; ++i) line(0, i);
  for (int p = 0; p < N; ++p) {
    sums[p] = part[0][p];
    for (int c = 1; c < chains; ++c) sums[p] = S::add(sums[p], part[c][p]);
  }
}

// Add to sums [n] what one block gives: its lines at w, the scales (and minima) of its 16 rows, its activations at x, of which
// positions [first, first + n) of N are taken.
template <class S, Format format, int N, int first, int n>
inline void add_block(const uint8_t* w, typename S::F scale, typename S::F minimum, const int32_t* x, typename S::F* sums) {
  typename S::I parts[n];
  x += first;
  for (int p = 0; p < n; ++p) parts[p] = S::set_int(format == Format::q4_1 ? 0 : x[9 * N + p]);
  if constexpr (format == Format::q8_0) {
    for (int j = 0; j < 8; ++j) {
      const auto v = S::load_line(w + j * kLine);
      for (int p = 0; p < n; ++p) parts[p] = S::dot_u8(parts[p], v, x + j * N + p);
    }
  } else {
    for (int j = 0; j < 4; ++j) {
      const auto v = S::load_line(w + j * kLine);
      const auto low = S::low_nibbles(v), high = S::high_nibbles(v);
      for (int p = 0; p < n; ++p) parts[p] = S::dot_u4(parts[p], low, x + j * N + p);
      for (int p = 0; p < n; ++p) parts[p] = S::dot_u4(parts[p], high, x + (j + 4) * N + p);
    }
  }
  const float* fx = reinterpret_cast<const float*>(x);
  for (int p = 0; p < n; ++p) {
    sums[p] = S::fma(S::to_float(parts[p]), S::mul(scale, S::set(fx[8 * N + p])), sums[p]);
    if constexpr (format == Format::q4_1) sums[p] = S::fma(minimum, S::set(fx[9 * N + p]), sums[p]);
  }
}

constexpr int block_lines(Format format) { return format == Format::q8_0 ? 8 : 4; }
constexpr int head_lines(Format format) { return format == Format::q4_1 ? 2 : 1; }  // scales and minima of two blocks

// What `blocks` blocks of quantized weights give with N positions: sums [N], 16 rows each.
template <class S, Format format, int N>
inline void sum_blocks(const uint8_t* w, int64_t blocks, const int32_t* x, typename S::F* sums) {
  constexpr int lines = block_lines(format), heads = head_lines(format);
  // Sums and the parts of a block must fit the registers; a block of many positions is gone through twice.
  constexpr int half = N > S::parts ? S::parts : N;
  for (int p = 0; p < N; ++p) sums[p] = S::zero();
  for (; blocks > 0; blocks -= 2) {
    const uint8_t* q = w + heads * kLine;
    for (int b = 0; b < (blocks > 1 ? 2 : 1); ++b) {
      for (int i = 0; i < lines + heads; ++i) fetch_ahead<format == Format::q8_0 ? N : 2 * N>(q + i * kLine);
      const auto scale = S::load_f16(w + b * 32), minimum = S::load_f16(w + (heads - 1) * kLine + b * 32);
      add_block<S, format, N, 0, half>(q, scale, minimum, x, sums);
      if constexpr (half < N) add_block<S, format, N, half, N - half>(q, scale, minimum, x, sums + half);
      q += lines * kLine;
      x += kBlockWords * N;
    }
    w = q;
  }
}

template <class S, Format format, int N>
void group_of_positions(const Matrix& w, int64_t panel, const int32_t* x, const float* bias, float* y) {
  typename S::F sums[N];
  const uint8_t* data = w.data + panel * panel_bytes(format, w.columns);
  if constexpr (quantized(format))
    sum_blocks<S, format, N>(data, divided_up(w.columns, kBlock), x, sums);
  else
    sum_lines<S, format, N>(data, panel_bytes(format, w.columns) / kLine, x, sums);
  const int64_t row = panel * kPanelRows;
  const int64_t rows = std::min<int64_t>(kPanelRows, w.rows - row);
  for (int p = 0; p < N; ++p) {
    if (rows == kPanelRows) {
      S::store(y + p * w.rows + row, bias ? S::add(sums[p], S::load(bias + row)) : sums[p]);
    } else {
      float last[kPanelRows];
      S::store(last, sums[p]);
      for (int64_t r = 0; r < rows; ++r) y[p * w.rows + row + r] = last[r] + (bias ? bias[row + r] : 0);
    }
  }
}

template <class S, Format format>
void multiply_format(const Matrix& w, int64_t first, int64_t last, int64_t positions, const uint8_t* prepared,
                     const float* bias, float* y) {
  using Function = void (*)(const Matrix&, int64_t, const int32_t*, const float*, float*);
  static constexpr Function few[] = {
      group_of_positions<S, format, 1>, group_of_positions<S, format, 2>, group_of_positions<S, format, 3>,
      group_of_positions<S, format, 4>, group_of_positions<S, format, 5>, group_of_positions<S, format, 6>,
      group_of_positions<S, format, 7>, group_of_positions<S, format, 8>};
  const int64_t size = prepared_words(format, w.columns);
  const int32_t* x = reinterpret_cast<const int32_t*>(prepared);
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t p = 0, n; p < positions; p += n) {
      n = next_group<S>(positions - p);
      const Function function = n > 8 ? group_of_positions<S, format, S::together> : few[n - 1];
      function(w, panel, x + p * size, bias, y + p * w.rows);
    }
  }
}

template <class S>
void multiply(const Matrix& w, int64_t first, int64_t last, int64_t positions, const uint8_t* prepared,
              const float* bias, float* y) {
  switch (w.format) {
    case Format::f32: return multiply_format<S, Format::f32>(w, first, last, positions, prepared, bias, y);
    case Format::bf16: return multiply_format<S, Format::bf16>(w, first, last, positions, prepared, bias, y);
    case Format::q8_0: return multiply_format<S, Format::q8_0>(w, first, last, positions, prepared, bias, y);
    case Format::q4_0: return multiply_format<S, Format::q4_0>(w, first, last, positions, prepared, bias, y);
    case Format::q4_1: return multiply_format<S, Format::q4_1>(w, first, last, positions, prepared, bias, y);
  }
}

}  // namespace
}  // namespace tpimpi

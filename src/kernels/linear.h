// Matrix products for one level: y [n, rows] = x [n, columns] times the transpose of packed weights.
//
// Each weight is read from memory once for many positions, and stays in the cache for one group of them after another. A
// group's activations lie interleaved ("prepared"), so that one word of x is broadcast to the 16 rows of a panel.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>

#include "blocks.h"
#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// A group of n positions, prepared: for f32 and f16 [columns][n] floats; for bf16 [columns / 2][n] pairs where a level multiplies
// those, else [columns][n] floats that are rounded to bf16, up to whole pairs; for quantized
// weights, for each unit of 32 columns: words [8][n] (4 int8 each), scale [n] (f32), and third [n], which is what the sum starts
// with, int32 (it undoes the offset of unsigned weights; where S::kNarrow, of codes below 8 bits, two int16, for the first and the
// last two columns of each word), or for formats with minima the f32 sum of the unit, which its minimum multiplies; where scales
// are for 16 columns, third is of the first 16, and then comes fourth [n] of the others.
template <class S>
int64_t prepared_words(Format format, int64_t columns) {  // for one position
  if (format == Format::bf16) return divided_up(columns, 2) * (S::kBf16Pairs ? 1 : 2);
  return quantized(format) ? divided_up(columns, kBlock) * unit_words(format) : columns;
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

// Quantize one unit of one position, 32 numbers, to words [10 or 11][n]. The loops are such that compilers make vector code of them.
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
  int32_t sums[2] = {};        // of each 16
  int32_t columns[2][4] = {};  // of each of the four columns of their words
  if (greatest >= 0x7f800000) {
    scale = NAN;
  } else if (amax >= 1e-30f) {
    scale = amax / 127;
    const float inverse = 127 / amax;
    int32_t rounded[kBlock];
    for (int i = 0; i < kBlock; ++i) rounded[i] = int32_t(bits_of(x[i] * inverse + magic) - bits_of(magic));
    for (int i = 0; i < kBlock / 2; ++i) sums[0] += rounded[i];
    for (int i = kBlock / 2; i < kBlock; ++i) sums[1] += rounded[i];
    for (int i = 0; i < kBlock; ++i) q[i] = int8_t(rounded[i]);
    if constexpr (S::kNarrow)
      for (int i = 0; i < kBlock; ++i) columns[i / 16][i % 4] += rounded[i];
  }
  for (int j = 0; j < 8; ++j) std::memcpy(words + j * n, q + 4 * j, 4);
  std::memcpy(words + 8 * n, &scale, 4);
  const Traits t = traits(format);
  if (!t.by_16) {
    sums[0] += sums[1];
    for (int c = 0; c < 4; ++c) columns[0][c] += columns[1][c];
  }
  for (int i = 0; i < (t.by_16 ? 2 : 1); ++i) {
    if (t.minima) {
      const float scaled = scale * float(sums[i]);
      std::memcpy(words + (9 + i) * n, &scaled, 4);
    } else if (S::kNarrow && !t.wide) {
      const int32_t* const c = columns[i];
      const int16_t halves[2] = {int16_t(-t.offset * (c[0] + c[1])), int16_t(-t.offset * (c[2] + c[3]))};
      std::memcpy(words + (9 + i) * n, halves, 4);
    } else {
      words[(9 + i) * n] = -sums[i] * (t.wide ? S::kQ8Offset : t.offset);
    }
  }
}

// Whether groups of 3, 5, 6 and 7 positions have code of their own. Of most quantized formats they are taken in fewer: each makes
// the kernels larger by as much again.
constexpr bool any_number_together(Format format) { return !quantized(format) || can_quantize(format); }

constexpr int64_t kMostApart = 8;  // positions of a group that is smaller than the largest

// Positions are taken in groups of S::together (S::blocks_together with quantized weights) while there are as many, then what is
// left.
template <class S>
constexpr int64_t next_group(Format format, int64_t left) {
  const int64_t together = quantized(format) ? S::blocks_together : S::together;
  // Eight are twice four where more do not fit: with two at last the multipliers would wait for one another's results.
  if (together == 6 && (left == 7 || left == 8)) return 4;
  if (left >= together) return together;
  if (left > kMostApart) return kMostApart;
  return any_number_together(format) ? left : left >= 4 ? 4 : left >= 2 ? 2 : 1;
}

// Whether there is code for every group that `next_group` gives (see ForGroups), on a level that may not run here.
template <class S>
constexpr bool has_all_groups() {
  for (int format = 0; format <= int(kLastFormat); ++format) {
    const int64_t together = quantized(Format(format)) ? S::blocks_together : S::together;
    for (int64_t left = 1; left <= 4 * together; ++left)
      if (const int64_t n = next_group<S>(Format(format), left); n < 1 || n > left || (n > kMostApart && n != together)) return false;
  }
  return true;
}

template <class S>
void prepare(Format format, int64_t columns, int64_t positions, const float* x, uint8_t* prepared) {
  static_assert(has_all_groups<S>());
  constexpr int64_t run = 4 * kBlock;  // columns after which the next position comes: what is written stays in the cache
  const int64_t size = prepared_words<S>(format, columns);
  for (int64_t first = 0, n; first < positions; first += n) {
    n = next_group<S>(format, positions - first);
    int32_t* group = reinterpret_cast<int32_t*>(prepared) + first * size;
    for (int64_t column = 0; column < columns; column += run) {
      const int64_t end = column + run < columns ? column + run : columns;
      for (int64_t p = 0; p < n; ++p) {
        const float* row = x + (first + p) * columns;
        int64_t k = column;
        if (format == Format::f32 || format == Format::f16) {
          for (; k < end; ++k) group[k * n + p] = int32_t(bits_of(row[k]));
        } else if (format == Format::bf16) {
          for (; k < end; k += 2) {
            const uint32_t pair = bf16_pair(row[k], k + 1 < end ? row[k + 1] : 0);
            if constexpr (S::kBf16Pairs) {
              group[k / 2 * n + p] = int32_t(pair);
            } else {
              group[k * n + p] = int32_t(pair << 16);
              group[(k + 1) * n + p] = int32_t(pair & 0xffff0000);
            }
          }
        } else {
          const int64_t size = unit_words(format) * n;
          int32_t* words = group + k / kBlock * size + p;
          for (; k + kBlock <= end; k += kBlock, words += size) prepare_block<S>(format, row + k, words, n);
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

// What P panels of f32, bf16 or f16 weights, `stride` bytes apart, give with N positions: sums [P][N], 16 rows each. A row's sum
// is one chain, from the first column to the last, whatever P and N are; with few positions several panels side by side keep the
// multipliers busy.
template <class S, Format format, int N, int P>
inline void sum_lines(const uint8_t* w, int64_t stride, int64_t columns, const int32_t* x, typename S::F (*result)[N]) {
  const float* fx = reinterpret_cast<const float*>(x);
  typename S::F sums[P][N];  // not what is returned, which would be written to memory at each line
  for (int r = 0; r < P; ++r)
    for (int p = 0; p < N; ++p) sums[r][p] = S::zero();
  const auto add = [&](int r, int64_t column, const typename S::F v) {
    for (int p = 0; p < N; ++p) sums[r][p] = S::fma(v, S::set(fx[column * N + p]), sums[r][p]);
  };
  const int64_t lines = format == Format::f32 ? columns : format == Format::bf16 ? divided_up(columns, 2) : columns / 2;
  for (int64_t i = 0; i < lines; ++i)
    for (int r = 0; r < P; ++r) {
      const uint8_t* line = w + r * stride + i * kLine;
      fetch_ahead<N>(line);
      if constexpr (format == Format::bf16) {
        const auto v = S::load_line(line);
        if constexpr (S::kBf16Pairs) {
          for (int p = 0; p < N; ++p) sums[r][p] = S::dot_bf16(sums[r][p], v, x + i * N + p);
        } else {
          add(r, 2 * i, S::low_bf16(v));
          add(r, 2 * i + 1, S::high_bf16(v));
        }
      } else if constexpr (format == Format::f32) {
        add(r, i, S::as_float(S::load_line(line)));
      } else {
        add(r, 2 * i, S::load_f16(line));
        add(r, 2 * i + 1, S::load_f16(line + kLine / 2));
      }
    }
  if (format == Format::f16 && columns % 2)
    for (int r = 0; r < P; ++r) add(r, columns - 1, S::load_f16(w + r * stride + lines * kLine));
  for (int r = 0; r < P; ++r)
    for (int p = 0; p < N; ++p) result[r][p] = sums[r][p];
}

template <class S>
void store_rows(const Matrix& w, int64_t panel, int64_t p, typename S::F sum, const float* bias, float* y) {
  const int64_t row = panel * kPanelRows;
  const int64_t rows = std::min<int64_t>(kPanelRows, w.rows - row);
  if (rows == kPanelRows) {
    S::store(y + p * w.rows + row, bias ? S::add(sum, S::load(bias + row)) : sum);
  } else {
    float last[kPanelRows];
    S::store(last, sum);
    for (int64_t r = 0; r < rows; ++r) y[p * w.rows + row + r] = last[r] + (bias ? bias[row + r] : 0);
  }
}

// N positions with P panels from `panel` on.
template <class S, Format format, int N, int P>
void group_of_positions(const Matrix& w, int64_t panel, const int32_t* x, const float* bias, float* y) {
  typename S::F sums[P][N];
  const int64_t size = panel_bytes(format, w.columns, w.first);
  const uint8_t* data = w.data + panel * size;
  if constexpr (quantized(format))
    sum_blocks<S, format, N>(data, w.columns, w.first, x, sums[0]);
  else
    sum_lines<S, format, N, P>(data, size, w.columns, x, sums);
  for (int r = 0; r < P; ++r)
    for (int p = 0; p < N; ++p) store_rows<S>(w, panel + r, p, sums[r][p], bias, y);
}

// Of so few positions so many panels are computed side by side, as far as their sums fit the registers.
template <class S>
constexpr int panels_together(int positions) {
  const int most = positions <= 2 ? 4 : positions <= 4 ? 2 : 1;
  return most * positions <= S::together ? most : most > 1 && most / 2 * positions <= S::together ? most / 2 : 1;
}

// Functions for groups of so many positions, of which `next_group` gives 1 to 8 and the most; for others they are 1's.
template <class Function>
struct ForGroups {
  Function of[kMostApart + 1];
};
template <class S, Format format, class Function, class Get>
constexpr ForGroups<Function> for_groups(Get get) {
  constexpr int most = quantized(format) ? S::blocks_together : S::together;
  constexpr bool any = any_number_together(format);
  return {{get.template operator()<1>(),
          get.template operator()<2>(),
          get.template operator()<(any && most > 2) ? 3 : 1>(),
          get.template operator()<4>(),
          get.template operator()<(any && most > 4) ? 5 : 1>(),
          get.template operator()<(any && most > 5) ? 6 : 1>(),
          get.template operator()<(any && most > 6) ? 7 : 1>(),
          get.template operator()<(most > 7) ? 8 : 1>(),
          get.template operator()<most>()}};
}

// More positions than one group, with quantized weights: a few units of a panel are taken apart, and multiplied with all groups
// of a run of positions, whose activations stay in the second cache.
template <class S, Format format>
void multiply_groups(const Matrix& w, int64_t first, int64_t last, int64_t positions, const int32_t* x, const float* bias,
                     float* y) {
  using Function = void (*)(const Unit<S, format>*, int, const int32_t*, float*, const uint8_t*, int);
  static constexpr auto add = for_groups<S, format, Function>([]<int N>() { return add_units<S, format, N>; });
  constexpr int64_t most = 64, least = 16, cache_words = 48 << 10;  // runs are whole groups but for the last
  const int64_t size = prepared_words<S>(format, w.columns);
  const int64_t run = std::clamp(cache_words / size / least * least, least, most);
  constexpr int apart = units_apart<S, format>();
  Unit<S, format> units[apart];
  alignas(kLine) float sums[most * kPanelRows];
  for (int64_t begin = 0; begin < positions; begin += run) {
    const int64_t n = std::min(run, positions - begin);
    for (int64_t panel = first; panel < last; ++panel) {
      const uint8_t* data = w.data + panel * panel_bytes(format, w.columns, w.first);
      const int32_t* group = x + begin * size;
      std::memset(sums, 0, size_t(n) * kLine);
      int64_t left = divided_up(w.columns, kBlock);
      for (int count, skipped = int(w.first / kBlock); left > 0; left -= count) {
        const int64_t done = divided_up(w.columns, kBlock) - left;
        const uint8_t* const began = data;
        for (count = 0; count < left && count + group_units(format) <= apart; skipped = 0)
          each_unit<S, format, 0>(data, left - count, skipped, [&](const uint8_t* lines, const Numbers<S>& numbers) {
            units[count++].set(lines, numbers);
          });
        // What comes next, as many lines as these were, is fetched while the first two groups are multiplied.
        const int lines = int(divided_up((data - began) / kLine, 2 * count));
        const uint8_t* ahead = data;
        for (int64_t p = 0, together; p < n; p += together, ahead += lines * count * kLine) {
          together = next_group<S>(format, n - p);
          add.of[std::min(together, kMostApart + 1) - 1](units, count, group + p * size + done * unit_words(format) * together,
                                                     sums + p * kPanelRows, ahead, ahead < data + (data - began) ? lines : 0);
        }
      }
      for (int64_t p = 0; p < n; ++p) store_rows<S>(w, panel, begin + p, S::load(sums + p * kPanelRows), bias, y);
    }
  }
}

template <class S, Format format>
void multiply_format(const Matrix& w, int64_t first, int64_t last, int64_t positions, const uint8_t* prepared,
                     const float* bias, float* y) {
  using Function = void (*)(const Matrix&, int64_t, const int32_t*, const float*, float*);
  static constexpr auto one =
      for_groups<S, format, Function>([]<int N>() { return group_of_positions<S, format, N, 1>; });
  constexpr int most = quantized(format) ? S::blocks_together : S::together;
  const int64_t size = prepared_words<S>(format, w.columns);
  const int32_t* x = reinterpret_cast<const int32_t*>(prepared);
  if constexpr (quantized(format)) {
    if (next_group<S>(format, positions) < positions)
      return multiply_groups<S, format>(w, first, last, positions, x, bias, y);
  } else {
    static constexpr Function several[] = {
        group_of_positions<S, format, 1, panels_together<S>(1)>, group_of_positions<S, format, 2, panels_together<S>(2)>,
        group_of_positions<S, format, 3, panels_together<S>(3)>, group_of_positions<S, format, 4, panels_together<S>(4)>};
    if (positions <= 4 && positions <= most)
      for (const int64_t step = panels_together<S>(int(positions)); first + step <= last; first += step)
        several[positions - 1](w, first, x, bias, y);
  }
  for (int64_t panel = first; panel < last; ++panel) {
    for (int64_t p = 0, n; p < positions; p += n) {
      n = next_group<S>(format, positions - p);
      one.of[std::min(n, kMostApart + 1) - 1](w, panel, x + p * size, bias, y + p * w.rows);
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
    case Format::q4_k: return multiply_format<S, Format::q4_k>(w, first, last, positions, prepared, bias, y);
    case Format::q6_k: return multiply_format<S, Format::q6_k>(w, first, last, positions, prepared, bias, y);
    case Format::q5_k: return multiply_format<S, Format::q5_k>(w, first, last, positions, prepared, bias, y);
    case Format::q3_k: return multiply_format<S, Format::q3_k>(w, first, last, positions, prepared, bias, y);
    case Format::q2_k: return multiply_format<S, Format::q2_k>(w, first, last, positions, prepared, bias, y);
    case Format::q5_0: return multiply_format<S, Format::q5_0>(w, first, last, positions, prepared, bias, y);
    case Format::q5_1: return multiply_format<S, Format::q5_1>(w, first, last, positions, prepared, bias, y);
    case Format::iq4_nl: return multiply_format<S, Format::iq4_nl>(w, first, last, positions, prepared, bias, y);
    case Format::iq4_xs: return multiply_format<S, Format::iq4_xs>(w, first, last, positions, prepared, bias, y);
    case Format::mxfp4: return multiply_format<S, Format::mxfp4>(w, first, last, positions, prepared, bias, y);
    case Format::f16: return multiply_format<S, Format::f16>(w, first, last, positions, prepared, bias, y);
  }
}

}  // namespace
}  // namespace tpimpi

// Products with quantized weights, for one level: a group of units of 32 columns at a time. What lines hold is specified in
// tpimpi/compute/formats.
//
// A unit's codes are dotted with its int8 activations in integers, exactly; then its scale and its minimum come in, in f32, unit
// after unit. So each row of a result is summed in one order, however many positions are computed at once.
#pragma once

#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

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

// What a format's kernel is made of.
struct Traits {
  bool by_16;         // scales are for 16 columns: two a unit
  bool minima;        // a weight has a minimum beside its scale
  bool wide;          // codes take 8 bits, offset by S::kQ8Offset: multiplied by dot_u8; where S::kNarrow with their signs
  int offset;         // what is taken off a code; 0 where there are minima; of wide ones S::kQ8Offset
  int narrow_words;   // where there are minima: of so many words of codes, products with int8 add up within 16 bits
  bool neighbours;    // a line of nibbles holds words 2j and 2j + 1 of a unit; else j and j + 4
};

constexpr Traits traits(Format format) {
  switch (format) {
    case Format::q8_0: return {false, false, true, 0, 0, false};
    case Format::q4_0: return {false, false, false, 8, 0, false};
    case Format::q4_1: return {false, true, false, 0, 8, false};
    case Format::q5_0: return {false, false, false, 16, 0, false};
    case Format::q5_1: return {false, true, false, 0, 4, false};
    case Format::q4_k: return {false, true, false, 0, 8, true};
    case Format::q5_k: return {false, true, false, 0, 4, true};
    case Format::q6_k: return {true, false, false, 32, 0, true};
    case Format::q3_k: return {true, false, false, 4, 0, true};
    case Format::q2_k: return {true, true, false, 0, 8, true};
    case Format::iq4_nl: return {false, false, true, 0, 0, false};
    case Format::iq4_xs: return {false, false, true, 0, 0, true};
    case Format::mxfp4: return {false, false, false, 12, 0, false};
    default: return {};
  }
}

// Words of a unit's activations: 8 of 4 int8 each, their scale, and what undoes an offset (int32) or multiplies a minimum (f32):
// one, or one for each 16.
constexpr int unit_words(Format format) { return traits(format).by_16 ? 11 : 10; }

// The values of codes of 4 bits that have no even steps, offset so that none is negative: GGML's iq4_nl by 128, as q8_0's codes
// are packed, and FP4 (E2M1) doubled by 12. Where S::kNarrow, iq4_nl's are taken as int8, and their magnitudes.
alignas(16) constexpr uint8_t kIq4[16] = {1, 24, 45, 63, 79, 93, 106, 118, 129, 141, 153, 166, 181, 197, 217, 241};
alignas(16) constexpr uint8_t kIq4Value[16] = {129, 152, 173, 191, 207, 221, 234, 246, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr uint8_t kIq4Magnitude[16] = {127, 104, 83, 65, 49, 35, 22, 10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr uint8_t kFp4[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};

// What is called for each word is to be inlined, however much that is: parts would else stand in memory.
#define TPIMPI_INLINE __attribute__((always_inline))

// Word k of the codes of a unit whose lines are at q: columns 4k to 4k + 3 of 16 rows, a byte each.
template <class S, Format format, int k>
TPIMPI_INLINE inline typename S::W code_word(const uint8_t* q, [[maybe_unused]] const uint8_t* table = kIq4) {
  constexpr Traits t = traits(format);
  if constexpr (format == Format::q8_0) {
    return S::load_line(q + k * kLine);
  } else if constexpr (format == Format::q3_k || format == Format::q2_k) {
    const uint8_t* pairs = q + (format == Format::q3_k ? 1 : 0) * kLine;
    const auto low = S::template masked<2 * (k % 4)>(S::load_line(pairs + k / 4 * kLine), 0x03030303);
    if constexpr (format == Format::q2_k) return low;
    return S::combined(low, S::template masked<k - 2>(S::load_line(q), 0x04040404));
  } else {
    constexpr int first = unit_lines(format) - 4;  // the lines before those of nibbles hold higher bits
    const auto line = S::load_line(q + (first + (t.neighbours ? k / 2 : k % 4)) * kLine);
    const auto nibbles = (t.neighbours ? k % 2 : k / 4) ? S::high_nibbles(line) : S::low_nibbles(line);
    if constexpr (format == Format::iq4_nl || format == Format::iq4_xs) return S::lookup(nibbles, table);
    if constexpr (format == Format::mxfp4) return S::lookup(nibbles, kFp4);
    if constexpr (format == Format::q5_k || format == Format::q5_0 || format == Format::q5_1)
      return S::combined(nibbles, S::template masked<k - 4>(S::load_line(q), 0x10101010));
    if constexpr (format == Format::q6_k)
      return S::combined(nibbles, S::template masked<2 * (k % 4) - 4>(S::load_line(q + k / 4 * kLine), 0x30303030));
    return nibbles;
  }
}

// The same of codes of 8 bits, as int8, and its magnitude.
template <class S>
struct Signed {
  typename S::W value, magnitude;
};
template <class S, Format format, int k>
TPIMPI_INLINE inline Signed<S> signed_word(const uint8_t* q) {
  if constexpr (format == Format::q8_0) {
    const auto value = S::without_128(code_word<S, format, k>(q));
    return {value, S::magnitude(value)};
  } else {
    return {code_word<S, format, k>(q, kIq4Value), code_word<S, format, k>(q, kIq4Magnitude)};
  }
}

// Call function.operator()<i>() for i in [from, to).
template <int from, int to, class Function>
TPIMPI_INLINE inline void unrolled(Function function) {
  if constexpr (from < to) {
    function.template operator()<from>();
    unrolled<from + 1, to>(function);
  }
}

// A unit's lines of codes as they are packed.
template <class S, Format format>
struct PackedCodes {
  static constexpr bool flips = false;
  const uint8_t* lines;
  template <int k>
  TPIMPI_INLINE typename S::W word() const { return code_word<S, format, k>(lines); }
  template <int k>
  TPIMPI_INLINE Signed<S> with_sign() const { return signed_word<S, format, k>(lines); }
};

// The scales of a unit's 16 rows, and what is added for their minima; the second ones where scales are for 16 columns.
template <class S>
struct Numbers {
  typename S::F scale, minimum, second_scale, second_minimum;
};

// A unit taken apart, to be multiplied with one group of positions after another.
//
// Where products with weights w of 8 bits are summed in 16 (S::kNarrow), their magnitudes stand here, and after them lines of bytes
// that are -1 where w < 0. Of x these bits are flipped: that is -x - 1, and |w| (-x - 1) = w x - |w|. The last line is what is then
// missing: the sum of these |w|. As |w| <= 128 and |x| <= 127, two products make at least -2 * 128 * 128, at most 2 * 127 * 127.
template <class S, Format format>
struct alignas(kLine) Unit {
  static constexpr bool flips = traits(format).wide && S::kNarrow;
  uint8_t codes[flips ? 17 : 8][kLine];
  float numbers[4][kPanelRows];  // as in Numbers; those that the format has

  template <int k>
  TPIMPI_INLINE typename S::W word() const { return S::load_line(codes[k]); }

  void set(const uint8_t* lines, const Numbers<S>& v) {
    if constexpr (flips) {
      auto less = S::set_int(0);
      unrolled<0, 8>([&]<int k>() TPIMPI_INLINE {
        const auto w = signed_word<S, format, k>(lines);
        S::store_line(codes[k], w.magnitude);
        S::store_line(codes[8 + k], S::negative(w.value));
        less = S::add_narrow(less, S::narrow(w.magnitude, S::negative(w.value)));
      });
      S::store_int(codes[16], S::negated(less));
    } else {
      unrolled<0, 8>([&]<int k>() TPIMPI_INLINE { S::store_line(codes[k], code_word<S, format, k>(lines)); });
    }
    S::store(numbers[0], v.scale);
    if constexpr (traits(format).minima) S::store(numbers[1], v.minimum);
    if constexpr (traits(format).by_16) S::store(numbers[2], v.second_scale);
    if constexpr (traits(format).minima && traits(format).by_16) S::store(numbers[3], v.second_minimum);
  }

  Numbers<S> get() const {
    Numbers<S> v;
    v.scale = S::load(numbers[0]);
    if constexpr (traits(format).minima) v.minimum = S::load(numbers[1]);
    if constexpr (traits(format).by_16) v.second_scale = S::load(numbers[2]);
    if constexpr (traits(format).minima && traits(format).by_16) v.second_minimum = S::load(numbers[3]);
    return v;
  }
};

// Add to parts [N] the products of words [from, to) of a unit with N positions' activations, which are at x. Of one position all
// products fit the registers, and to add them as the compiler likes is quicker.
template <class S, Format format, int from, int to, int N, class Codes>
TPIMPI_INLINE inline void dot_words(const Codes& codes, const int32_t* x, typename S::I* parts) {
  constexpr Traits t = traits(format);
  if constexpr (Codes::flips) {
    unrolled<from, to>([&]<int k>() TPIMPI_INLINE {
      auto magnitude = codes.template word<k>();
      if constexpr (N > 1) S::compute_now(magnitude);
      for (int p = 0; p < N; ++p) {
        parts[p] = S::dot_flipped(parts[p], magnitude, codes.template word<8 + k>(), x + k * N + p);
        if constexpr (N > 1) S::compute_now(parts[p]);
      }
    });
  } else if constexpr (t.wide && S::kNarrow) {
    unrolled<from, to>([&]<int k>() TPIMPI_INLINE {
      auto w = codes.template with_sign<k>();
      if constexpr (N > 1) S::compute_now(w.value), S::compute_now(w.magnitude);
      for (int p = 0; p < N; ++p) {
        parts[p] = S::dot_signed(parts[p], w.value, w.magnitude, x + k * N + p);
        if constexpr (N > 1) S::compute_now(parts[p]);
      }
    });
  } else if constexpr (!S::kNarrow) {
    unrolled<from, to>([&]<int k>() TPIMPI_INLINE {
      auto w = codes.template word<k>();
      if constexpr (N > 1) S::compute_now(w);
      for (int p = 0; p < N; ++p) {
        parts[p] = t.wide ? S::dot_u8(parts[p], w, x + k * N + p) : S::dot_u4(parts[p], w, x + k * N + p);
        if constexpr (N > 1) S::compute_now(parts[p]);
      }
    });
  } else if constexpr (t.offset != 0) {
    // Half of a word's columns each, from what undoes the offset on; sums within 16 bits at last may have gone round before.
    static_assert(2 * t.offset * 127 * (to - from) <= 32767);  // a code less its offset is between -offset and offset
    unrolled<from, to>([&]<int k>() TPIMPI_INLINE {
      auto w = codes.template word<k>();
      if constexpr (N > 1) S::compute_now(w);
      for (int p = 0; p < N; ++p) {
        parts[p] = S::add_narrow(parts[p], S::narrow(w, x + k * N + p));
        if constexpr (N > 1) S::compute_now(parts[p]);
      }
    });
    for (int p = 0; p < N; ++p) parts[p] = S::widened(parts[p]);
  } else if constexpr (from < to) {
    constexpr int end = from + t.narrow_words < to ? from + t.narrow_words : to;
    typename S::I narrow[N];
    unrolled<from, end>([&]<int k>() TPIMPI_INLINE {
      auto w = codes.template word<k>();
      if constexpr (N > 1) S::compute_now(w);
      for (int p = 0; p < N; ++p) {
        const auto products = S::narrow(w, x + k * N + p);
        narrow[p] = k == from ? products : S::add_narrow(narrow[p], products);
        if constexpr (N > 1) S::compute_now(narrow[p]);
      }
    });
    for (int p = 0; p < N; ++p) parts[p] = S::add_int(parts[p], S::widened(narrow[p]));
    dot_words<S, format, end, to, N>(codes, x, parts);
  }
}

// Add to sums [N] what one unit gives: its codes, the numbers of its 16 rows, its activations at x.
template <class S, Format format, int N, class Codes>
inline void add_unit(const Codes& codes, const Numbers<S>& v, const int32_t* x, typename S::F* sums) {
  constexpr Traits t = traits(format);
  const float* fx = reinterpret_cast<const float*>(x);
  typename S::I parts[N];
  for (int p = 0; p < N; ++p) {
    if constexpr (Codes::flips)
      parts[p] = S::load_int(codes.codes[16]);
    else
      parts[p] = S::set_int(t.minima ? 0 : x[9 * N + p]);
  }
  if constexpr (t.by_16) {
    typename S::F whole[N];
    dot_words<S, format, 0, 4, N>(codes, x, parts);
    for (int p = 0; p < N; ++p) {
      whole[p] = S::mul(S::to_float(parts[p]), v.scale);
      parts[p] = S::set_int(t.minima ? 0 : x[10 * N + p]);
    }
    dot_words<S, format, 4, 8, N>(codes, x, parts);
    for (int p = 0; p < N; ++p) {
      whole[p] = S::fma(S::to_float(parts[p]), v.second_scale, whole[p]);
      sums[p] = S::fma(whole[p], S::set(fx[8 * N + p]), sums[p]);
    }
  } else {
    dot_words<S, format, 0, 8, N>(codes, x, parts);
    for (int p = 0; p < N; ++p)
      sums[p] = S::fma(S::to_float(parts[p]), S::mul(v.scale, S::set(fx[8 * N + p])), sums[p]);
  }
  if constexpr (t.minima) {
    for (int p = 0; p < N; ++p) sums[p] = S::fma(v.minimum, S::set(fx[9 * N + p]), sums[p]);
    if constexpr (t.by_16)
      for (int p = 0; p < N; ++p) sums[p] = S::fma(v.second_minimum, S::set(fx[10 * N + p]), sums[p]);
  }
}

// A group's lines of scales, from which `at` takes the numbers of one of its units.
template <class S, Format format>
struct Scales {
  typename S::F d, dmin;
  typename S::W first[4], second[2];
  const uint8_t* lines;

  Scales(const uint8_t* w, int units) : lines(w) {
    if constexpr (group_units(format) < 8) {
      if constexpr (format == Format::mxfp4) first[0] = S::load_line(w);
    } else {
      d = S::load_f16(w);
      if constexpr (traits(format).minima) dmin = S::sub(S::zero(), S::load_f16(w + 32));
      w += kLine;
      if constexpr (format == Format::q4_k || format == Format::q5_k || format == Format::q3_k) {
        pairs_of_6_bits(w, units);
      } else if constexpr (format == Format::iq4_xs) {
        first[0] = S::load_line(w);
        second[0] = S::load_u16(w - 32);
      } else {
        for (int i = 0; i < (units + 1) / 2; ++i) first[i] = S::load_line(w + i * kLine);
      }
    }
  }

  Numbers<S> at(int u) const {
    Numbers<S> v;
    if constexpr (format == Format::mxfp4) {
      v.scale = S::power_field(first[0], 8 * u);
    } else if constexpr (group_units(format) < 8) {
      v.scale = S::load_f16(lines + u * 32);
      if constexpr (traits(format).minima) v.minimum = S::load_f16(lines + kLine + u * 32);
    } else if constexpr (format == Format::q4_k || format == Format::q5_k) {
      v.scale = S::mul(d, S::field(first[u / 4], u % 4 * 8, 63));
      v.minimum = S::mul(dmin, S::field(second[u / 4], u % 4 * 8, 63));
    } else if constexpr (format == Format::q3_k) {
      v.scale = S::mul(d, S::sub(S::field(first[u / 4], u % 4 * 8, 63), S::set(32)));
      v.second_scale = S::mul(d, S::sub(S::field(second[u / 4], u % 4 * 8, 63), S::set(32)));
    } else if constexpr (format == Format::q6_k) {
      v.scale = S::mul(d, S::signed_byte(first[u / 2], u % 2 * 16));
      v.second_scale = S::mul(d, S::signed_byte(first[u / 2], u % 2 * 16 + 8));
    } else if constexpr (format == Format::q2_k) {
      v.scale = S::mul(d, S::field(first[u / 2], u % 2 * 16, 15));
      v.minimum = S::mul(dmin, S::field(first[u / 2], u % 2 * 16 + 4, 15));
      v.second_scale = S::mul(d, S::field(first[u / 2], u % 2 * 16 + 8, 15));
      v.second_minimum = S::mul(dmin, S::field(first[u / 2], u % 2 * 16 + 12, 15));
    } else {  // iq4_xs
      const auto high = S::mul(S::field(second[0], 2 * u, 3), S::set(16));
      v.scale = S::mul(d, S::sub(S::add(S::field(first[0], 4 * u, 15), high), S::set(32)));
    }
    return v;
  }

 private:
  // Two numbers of 6 bits for each unit, into the bytes of `first` and `second`; the bits above them are others'.
  void pairs_of_6_bits(const uint8_t* w, int units) {
    first[0] = S::load_line(w);
    if (units <= 2) {
      second[0] = S::template masked<16>(first[0], 0xffff);
      return;
    }
    second[0] = S::load_line(w + kLine);
    if (units <= 4) return;
    const auto low = S::load_line(w + 2 * kLine);
    first[1] = S::combined(S::low_nibbles(low), S::template masked<2>(first[0], 0x30303030));
    second[1] = S::combined(S::high_nibbles(low), S::template masked<2>(second[0], 0x30303030));
  }
};

// Call add(lines, numbers) for the next units of a panel, of which `left` are left: for all that are left of a group, whose lines
// begin at w, which goes on behind them. Its first `skipped` units are another matrix's. How many they were. Memory is asked for
// what comes later as is best where so many vector products are made of each line; not at all where that is 0.
template <class S, Format format, int products, class Function>
inline int each_unit(const uint8_t*& w, int64_t left, int skipped, Function add) {
  constexpr int lines = unit_lines(format), size = group_units(format);
  const int units = left < size - skipped ? int(left) : size - skipped;
  const Scales<S, format> scales(w, units);
  w += scale_lines(format, units) * kLine;
  for (int u = 0; u < units; ++u) {
    if constexpr (products > 0)
      for (int i = 0; i < lines + 1; ++i) fetch_ahead<products>(w + i * kLine);
    add(w, scales.at(u));
    w += lines * kLine;
  }
  return units;
}

// What a panel at w gives with N positions: sums [N], 16 rows each.
template <class S, Format format, int N>
inline void sum_blocks(const uint8_t* w, int64_t columns, int64_t first, const int32_t* x, typename S::F* result) {
  typename S::F sums[N];
  for (int p = 0; p < N; ++p) sums[p] = S::zero();
  int64_t left = divided_up(columns, kBlock);
  for (int skipped = int(first / kBlock); left > 0; skipped = 0)
    left -= each_unit<S, format, format == Format::q8_0 ? N : 2 * N>(w, left, skipped, [&](const uint8_t* lines, const Numbers<S>& numbers) {
      add_unit<S, format, N>(PackedCodes<S, format>{lines}, numbers, x, sums);
      x += unit_words(format) * N;
    });
  for (int p = 0; p < N; ++p) result[p] = sums[p];
}

// Units of a panel that are taken apart at a time: they stay in the first cache.
template <class S, Format format>
constexpr int units_apart() {
  return Unit<S, format>::flips ? 8 : 16;
}

// Add to sums [N][16] what `count` units give with N positions; meanwhile memory sends `lines` lines for each, from `ahead` on.
template <class S, Format format, int N>
void add_units(const Unit<S, format>* units, int count, const int32_t* x, float* stored, const uint8_t* ahead, int lines) {
  typename S::F sums[N];
  for (int p = 0; p < N; ++p) sums[p] = S::load(stored + p * kPanelRows);
  for (const auto* unit = units; unit < units + count; ++unit) {
    for (int i = 0; i < lines; ++i, ahead += kLine) S::prefetch(ahead);
    add_unit<S, format, N>(*unit, unit->get(), x, sums);
    x += unit_words(format) * N;
  }
  for (int p = 0; p < N; ++p) S::store(stored + p * kPanelRows, sums[p]);
}

#undef TPIMPI_INLINE

}  // namespace
}  // namespace tpimpi

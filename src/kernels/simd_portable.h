// 16 lanes in plain C++, for any processor. It states what every function of a SIMD layer means; the other layers have the
// same functions.
#pragma once

#include <cstdint>
#include <cstring>

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

struct Portable {
  static constexpr const char* name = "portable";
  static constexpr int together = 4;   // positions whose sums fit the registers
  static constexpr int blocks_together = 4;  // of quantized weights, whose sums within a unit fit them
  static constexpr int parts = 4;      // keys, or columns of values, of attention that are taken together for 16 queries
  static constexpr int queries = 1;    // queries of attention whose sums with 4 keys fit the registers
  static constexpr int kQ8Offset = 128;  // what dot_u8 takes off a weight late: it multiplies q + kQ8Offset

  struct F { float v[16]; };
  struct I { int32_t v[16]; };
  struct W { uint32_t v[16]; };  // a line of weights: 16 words of 4 bytes

  static F zero() { return set(0); }
  static F set(float v) { return each([=](int) { return v; }); }
  static F load(const float* p) { return each([=](int i) { return p[i]; }); }
  static void store(float* p, F v) { std::memcpy(p, v.v, sizeof v); }
  static F add(F a, F b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
  static F sub(F a, F b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
  static F mul(F a, F b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
  static F div(F a, F b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return a.v[i] * b.v[i] + c.v[i]; }); }

  // The greater or the lesser; b where either is NaN.
  static F max(F a, F b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
  static F min(F a, F b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }

  // The nearest whole number, ties to even, of a number under 2^22; and v times 2 to the power of such a number, which
  // may underflow or overflow.
  static F round(F v) { return each([&](int i) { return (v.v[i] + 12582912.0f) - 12582912.0f; }); }
  static F scale2(F v, F n) {
    return each([&](int i) {
      // The number itself stands in the last bits of its sum with 1.5 * 2^23. Two steps: 2^n may be out of range.
      const int32_t power = int32_t(bits(n.v[i] + 12582912.0f) - bits(12582912.0f)), half = power >> 1;
      return v.v[i] * power_of_2(half) * power_of_2(power - half);
    });
  }

  // The first n lanes, n < 16, and zeros in the others; nothing beyond them is touched.
  static F load_some(const float* p, int64_t n) { return each([=](int i) { return i < n ? p[i] : 0.0f; }); }
  static void store_some(float* p, F v, int64_t n) { std::memcpy(p, v.v, size_t(n) * 4); }

  // 16-bit floats (IEEE 754 binary16), little-endian; storing rounds to nearest even.
  static F load_f16(const uint8_t* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    return each([&](int i) { return from_f16(h[i]); });
  }
  static F load_f16_some(const uint8_t* p, int64_t n) {
    uint8_t h[32] = {};
    std::memcpy(h, p, size_t(n) * 2);
    return load_f16(h);
  }
  // One of them in every lane; and 16 int8.
  static F set_f16(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    return set(from_f16(h));
  }
  static F load_i8(const uint8_t* p) { return each([=](int i) { return float(int8_t(p[i])); }); }
  // out[i] = the sum of the lanes of v[i], for 4 of them: halves are added, then quarters, then neighbours.
  static void sums4(const F* v, float* out) {
    for (int i = 0; i < 4; ++i) {
      float part[4];
      for (int k = 0; k < 4; ++k) part[k] = v[i].v[k] + v[i].v[8 + k] + (v[i].v[4 + k] + v[i].v[12 + k]);
      out[i] = part[0] + part[1] + (part[2] + part[3]);
    }
  }

  static I set_int(int32_t v) {
    I r;
    for (int i = 0; i < 16; ++i) r.v[i] = v;
    return r;
  }
  // Have the compiler compute this here. GCC puts sums of products off, and has no registers for so many products.
  template <class V>
  static void compute_now(V&) {}
  static F to_float(I a) { return each([&](int i) { return float(a.v[i]); }); }

  static W load_line(const uint8_t* p) {
    W w;
    std::memcpy(w.v, p, sizeof w);
    return w;
  }
  static void store_line(uint8_t* p, W w) { std::memcpy(p, w.v, sizeof w); }
  static W low_nibbles(W w) {
    for (auto& v : w.v) v &= 0x0f0f0f0f;
    return w;
  }
  static W high_nibbles(W w) {
    for (auto& v : w.v) v = v >> 4 & 0x0f0f0f0f;
    return w;
  }
  static F as_float(W w) { return each([&](int i) { return bits(w.v[i]); }); }

  // The bits of each word that `mask` has after a shift by `right` (to the left where it is negative); of both.
  template <int right>
  static W masked(W w, uint32_t mask) {
    for (auto& v : w.v) v = (right < 0 ? v << (right < 0 ? -right : 0) : v >> (right < 0 ? 0 : right)) & mask;
    return w;
  }
  static W combined(W a, W b) {
    for (int i = 0; i < 16; ++i) a.v[i] |= b.v[i];
    return a;
  }
  // Of each word the bits of `mask` from bit `shift` on, as a number; the byte from there, signed.
  static F field(W w, int shift, uint32_t mask) { return each([&](int i) { return float(w.v[i] >> shift & mask); }); }
  static F signed_byte(W w, int shift) { return each([&](int i) { return float(int8_t(w.v[i] >> shift)); }); }
  // 16 numbers of 16 bits, a word each.
  static W load_u16(const uint8_t* p) {
    uint16_t h[16];
    std::memcpy(h, p, sizeof h);
    W w;
    for (int i = 0; i < 16; ++i) w.v[i] = h[i];
    return w;
  }
  // 2 to the power of the lowest byte of each word after a shift, less 128: a scale of mxfp4 (E8M0), halved.
  static F power_field(W w, int shift) {
    return each([&](int i) {
      const uint32_t e = w.v[i] >> shift & 255;
      return bits(((e >> 1) + 63) << 23) * bits((e - (e >> 1) + 63) << 23);
    });
  }
  // table[b] for each byte b, which is at most 15.
  static W lookup(W w, const uint8_t* table) {
    for (auto& v : w.v) {
      uint32_t found = 0;
      for (int b = 0; b < 32; b += 8) found |= uint32_t(table[v >> b & 15]) << b;
      v = found;
    }
    return w;
  }

  // Each lane: sum + the four bytes of w (unsigned; in dot_u4 at most 63) times the four bytes of x (signed, not -128).
  static I dot_u8(I sum, W w, const int32_t* x) {
    for (int b = 0; b < 4; ++b) {
      const int32_t factor = int8_t(uint32_t(*x) >> 8 * b);
      for (int i = 0; i < 16; ++i) sum.v[i] += int32_t(w.v[i] >> 8 * b & 255) * factor;
    }
    return sum;
  }
  static I dot_u4(I sum, W w, const int32_t* x) { return dot_u8(sum, w, x); }

  // Where kNarrow is set: sums of products that are kept in 16 bits for a while, `narrow` as dot_u4 from 0.
  static constexpr bool kNarrow = false;
  static I narrow(W w, const int32_t* x) { return dot_u8(set_int(0), w, x); }
  static I add_narrow(I a, I b) { return add_int(a, b); }
  static I widened(I a) { return a; }
  static I add_int(I a, I b) {
    for (int i = 0; i < 16; ++i) a.v[i] += b.v[i];
    return a;
  }

  // Whether pairs of bf16 are multiplied as such (`dot_bf16`); else the first and the second of each word are widened.
  static constexpr bool kBf16Pairs = false;
  static F low_bf16(W w) { return each([&](int i) { return bits(w.v[i] << 16); }); }
  static F high_bf16(W w) { return each([&](int i) { return bits(w.v[i] & 0xffff0000); }); }

  static void prefetch(const uint8_t* p) {
#ifdef __GNUC__
    __builtin_prefetch(p);
#endif
  }

 private:
  template <class Function>
  static F each(Function function) {
    F r;
    for (int i = 0; i < 16; ++i) r.v[i] = function(i);
    return r;
  }

  static float bits(uint32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
  }
  static uint32_t bits(float v) {
    uint32_t b;
    std::memcpy(&b, &v, 4);
    return b;
  }
  static float power_of_2(int32_t n) { return bits(uint32_t(n + 127) << 23); }

  static float from_f16(uint16_t h) {
    const uint32_t b = uint32_t(h & 0x7fff) << 13, sign = uint32_t(h & 0x8000) << 16;
    if (b >= 0x7c00u << 13) return bits(b | 0x7f800000 | sign);  // infinity, NaN
    return bits(bits(bits(b) * 0x1p112f) | sign);                // the exponent's bias; makes subnormals normal
  }
};

}  // namespace
}  // namespace tpimpi

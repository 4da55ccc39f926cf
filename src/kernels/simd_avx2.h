// 16 lanes by AVX2, FMA and F16C, two registers of 8 each; with AVX-VNNI where the compiler is allowed it. See simd_portable.h for what each function means.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

struct Avx2 {
#ifdef __AVXVNNI__
  static constexpr const char* name = "avx-vnni";
  static constexpr int kQ8Offset = 128;  // dot_u8 takes weights as they are stored: q + 128
#else
  static constexpr const char* name = "avx2";
  static constexpr int kQ8Offset = 0;  // weights are made signed
#endif
  static constexpr int together = 6;
  static constexpr int blocks_together = 4;
  static constexpr int parts = 4;
  static constexpr int queries = 1;

  struct F { __m256 a, b; };
  struct I { __m256i a, b; };
  struct W { __m256i a, b; };

  static F zero() { return {_mm256_setzero_ps(), _mm256_setzero_ps()}; }
  static F set(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
  static F load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
  static void store(float* p, F v) {
    _mm256_storeu_ps(p, v.a);
    _mm256_storeu_ps(p + 8, v.b);
  }
  static F add(F x, F y) { return {_mm256_add_ps(x.a, y.a), _mm256_add_ps(x.b, y.b)}; }
  static F sub(F x, F y) { return {_mm256_sub_ps(x.a, y.a), _mm256_sub_ps(x.b, y.b)}; }
  static F mul(F x, F y) { return {_mm256_mul_ps(x.a, y.a), _mm256_mul_ps(x.b, y.b)}; }
  static F div(F x, F y) { return {_mm256_div_ps(x.a, y.a), _mm256_div_ps(x.b, y.b)}; }
  static F fma(F x, F y, F z) { return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)}; }
  static F max(F x, F y) { return {_mm256_max_ps(x.a, y.a), _mm256_max_ps(x.b, y.b)}; }
  static F min(F x, F y) { return {_mm256_min_ps(x.a, y.a), _mm256_min_ps(x.b, y.b)}; }

  static F round(F v) { return {_mm256_round_ps(v.a, kNearest), _mm256_round_ps(v.b, kNearest)}; }
  static F scale2(F v, F n) { return {scale2(v.a, n.a), scale2(v.b, n.b)}; }

  static F load_some(const float* p, int64_t n) {
    float lanes[16] = {};
    std::memcpy(lanes, p, size_t(n) * 4);
    return load(lanes);
  }
  static void store_some(float* p, F v, int64_t n) {
    float lanes[16];
    store(lanes, v);
    std::memcpy(p, lanes, size_t(n) * 4);
  }

  static F load_f16(const uint8_t* p) {
    return {_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p + 1))};
  }
  static F load_f16_some(const uint8_t* p, int64_t n) {
    uint8_t lanes[32] = {};
    std::memcpy(lanes, p, size_t(n) * 2);
    return load_f16(lanes);
  }
  static F set_f16(const uint8_t* p) {
    int16_t h;
    std::memcpy(&h, p, sizeof h);
    const __m256 v = _mm256_cvtph_ps(_mm_set1_epi16(h));
    return {v, v};
  }
  static F load_i8(const uint8_t* p) {
    return to_float(I{_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)p)), _mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)(p + 8)))});
  }
  static void sums4(const F* v, float* out) {
    _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(quarter(v[0]), quarter(v[1])), _mm_hadd_ps(quarter(v[2]), quarter(v[3]))));
  }

  static I set_int(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
  template <class V>
  static void compute_now(V& v) {
#ifdef __GNUC__
    __asm__("" : "+x"(v.a), "+x"(v.b));
#endif
  }
  static F to_float(I v) { return {_mm256_cvtepi32_ps(v.a), _mm256_cvtepi32_ps(v.b)}; }

  static W load_line(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
  }
  static void store_line(uint8_t* p, W w) {
    _mm256_storeu_si256((__m256i*)p, w.a);
    _mm256_storeu_si256((__m256i*)p + 1, w.b);
  }
  static W low_nibbles(W w) {
    const __m256i mask = _mm256_set1_epi8(15);
    return {_mm256_and_si256(w.a, mask), _mm256_and_si256(w.b, mask)};
  }
  static W high_nibbles(W w) { return low_nibbles({_mm256_srli_epi16(w.a, 4), _mm256_srli_epi16(w.b, 4)}); }
  static F as_float(W w) { return {_mm256_castsi256_ps(w.a), _mm256_castsi256_ps(w.b)}; }

  template <int right>
  static W masked(W w, uint32_t mask) {
    const __m256i kept = _mm256_set1_epi32(int32_t(mask));
    if constexpr (right < 0)
      return {_mm256_and_si256(_mm256_slli_epi32(w.a, -right), kept), _mm256_and_si256(_mm256_slli_epi32(w.b, -right), kept)};
    else
      return {_mm256_and_si256(_mm256_srli_epi32(w.a, right), kept), _mm256_and_si256(_mm256_srli_epi32(w.b, right), kept)};
  }
  static W combined(W x, W y) { return {_mm256_or_si256(x.a, y.a), _mm256_or_si256(x.b, y.b)}; }
  static F field(W w, int shift, uint32_t mask) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    const __m256i kept = _mm256_set1_epi32(int32_t(mask));
    return to_float(I{_mm256_and_si256(_mm256_srl_epi32(w.a, count), kept), _mm256_and_si256(_mm256_srl_epi32(w.b, count), kept)});
  }
  static F signed_byte(W w, int shift) {
    const __m128i count = _mm_cvtsi32_si128(24 - shift);
    return to_float(I{_mm256_srai_epi32(_mm256_sll_epi32(w.a, count), 24), _mm256_srai_epi32(_mm256_sll_epi32(w.b, count), 24)});
  }
  static W load_u16(const uint8_t* p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), _mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p + 1))};
  }
  static F power_field(W w, int shift) {
    const __m128i count = _mm_cvtsi32_si128(shift);
    return {half_power(_mm256_srl_epi32(w.a, count)), half_power(_mm256_srl_epi32(w.b, count))};
  }
  static W lookup(W w, const uint8_t* table) {
    const __m256i entries = _mm256_broadcastsi128_si256(_mm_loadu_si128((const __m128i*)table));
    return {_mm256_shuffle_epi8(entries, w.a), _mm256_shuffle_epi8(entries, w.b)};
  }

#ifdef __AVXVNNI__
  static constexpr bool kNarrow = false;
  static I dot_u8(I sum, W w, const int32_t* x) {
    const __m256i xs = _mm256_set1_epi32(*x);
    return {_mm256_dpbusd_avx_epi32(sum.a, w.a, xs), _mm256_dpbusd_avx_epi32(sum.b, w.b, xs)};
  }
  static I dot_u4(I sum, W w, const int32_t* x) { return dot_u8(sum, w, x); }
  static I narrow(W w, const int32_t* x) { return dot_u8(set_int(0), w, x); }
  static I add_narrow(I x, I y) { return add_int(x, y); }
  static I widened(I v) { return v; }
#else
  static I dot_u4(I sum, W w, const int32_t* x) {
    const __m256i xs = _mm256_set1_epi32(*x);
    return {add_products(sum.a, w.a, xs), add_products(sum.b, w.b, xs)};
  }

  // Products of two and their sum fit 16 bits for weights up to 129; their sums for a few of them, if the weights are small.
  static constexpr bool kNarrow = true;
  static I narrow(W w, const int32_t* x) {
    const __m256i xs = _mm256_set1_epi32(*x);
    return {_mm256_maddubs_epi16(w.a, xs), _mm256_maddubs_epi16(w.b, xs)};
  }
  static I narrow(W w, W x) { return {_mm256_maddubs_epi16(w.a, x.a), _mm256_maddubs_epi16(w.b, x.b)}; }
  static I add_narrow(I x, I y) { return {_mm256_add_epi16(x.a, y.a), _mm256_add_epi16(x.b, y.b)}; }
  static I widened(I v) {
    const __m256i one = _mm256_set1_epi16(1);
    return {_mm256_madd_epi16(v.a, one), _mm256_madd_epi16(v.b, one)};
  }
  static I negated(I v) {  // of what is narrow, widened
    const __m256i minus = _mm256_set1_epi16(-1);
    return {_mm256_madd_epi16(v.a, minus), _mm256_madd_epi16(v.b, minus)};
  }

  // The instruction multiplies unsigned by signed and saturates sums of two in 16 bits: |w| and x with the sign of w, or its bits
  // flipped where w is negative, stay within them (2 * 128 * 127, -2 * 128 * 128), while w + 128 would not.
  static W without_128(W w) {
    const __m256i sign = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(w.a, sign), _mm256_xor_si256(w.b, sign)};
  }
  static W magnitude(W w) { return {_mm256_abs_epi8(w.a), _mm256_abs_epi8(w.b)}; }
  static W negative(W w) {
    const __m256i zero = _mm256_setzero_si256();
    return {_mm256_cmpgt_epi8(zero, w.a), _mm256_cmpgt_epi8(zero, w.b)};
  }
  static I dot_signed(I sum, W w, W magnitude, const int32_t* x) {
    const __m256i xs = _mm256_set1_epi32(*x);
    return {add_products(sum.a, magnitude.a, _mm256_sign_epi8(xs, w.a)), add_products(sum.b, magnitude.b, _mm256_sign_epi8(xs, w.b))};
  }
  static I dot_flipped(I sum, W w, W flips, const int32_t* x) {
    const __m256i xs = _mm256_set1_epi32(*x);
    return {add_products(sum.a, w.a, _mm256_xor_si256(xs, flips.a)), add_products(sum.b, w.b, _mm256_xor_si256(xs, flips.b))};
  }
  static I load_int(const uint8_t* p) {
    return {_mm256_loadu_si256((const __m256i*)p), _mm256_loadu_si256((const __m256i*)p + 1)};
  }
  static void store_int(uint8_t* p, I v) {
    _mm256_storeu_si256((__m256i*)p, v.a);
    _mm256_storeu_si256((__m256i*)p + 1, v.b);
  }
#endif
  static I add_int(I x, I y) { return {_mm256_add_epi32(x.a, y.a), _mm256_add_epi32(x.b, y.b)}; }

  static constexpr bool kBf16Pairs = false;
  static F low_bf16(W w) { return as_float(W{_mm256_slli_epi32(w.a, 16), _mm256_slli_epi32(w.b, 16)}); }
  static F high_bf16(W w) {
    const __m256i high = _mm256_set1_epi32(int32_t(0xffff0000));
    return as_float(W{_mm256_and_si256(w.a, high), _mm256_and_si256(w.b, high)});
  }

  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

 private:
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static __m128 quarter(F v) {
    const __m256 half = _mm256_add_ps(v.a, v.b);
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
  [[maybe_unused]] static __m256i add_products(__m256i sum, __m256i w, __m256i x) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(_mm256_maddubs_epi16(w, x), _mm256_set1_epi16(1)));
  }
  static __m256 scale2(__m256 v, __m256 n) {  // in two steps: 2^n itself may be out of range
    const __m256i power = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(power, 1);
    return _mm256_mul_ps(_mm256_mul_ps(v, power_of_2(half)), power_of_2(_mm256_sub_epi32(power, half)));
  }
  static __m256 half_power(__m256i v) {
    const __m256i e = _mm256_and_si256(v, _mm256_set1_epi32(255)), half = _mm256_srli_epi32(e, 1);
    return _mm256_mul_ps(power_of_2(_mm256_sub_epi32(half, _mm256_set1_epi32(64))),
                         power_of_2(_mm256_sub_epi32(_mm256_sub_epi32(e, half), _mm256_set1_epi32(64))));
  }
  static __m256 power_of_2(__m256i n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(n, _mm256_set1_epi32(127)), 23));
  }
};

}  // namespace
}  // namespace tpimpi

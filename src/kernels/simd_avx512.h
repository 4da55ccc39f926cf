// 16 lanes by AVX-512 (F, BW, DQ, VL, VNNI), and BF16 where the compiler is allowed it. See simd_portable.h for what each
// function means.
#pragma once

// GCC 12 warns of its own intrinsics (its bug 105593).
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#include <immintrin.h>
#pragma GCC diagnostic pop

#include <cstdint>
#include <cstring>

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

struct Avx512 {
#ifdef __AVX512BF16__
  static constexpr const char* name = "avx512-bf16";
#else
  static constexpr const char* name = "avx512";
#endif
  static constexpr int together = 16;     // positions whose sums fit the registers
  static constexpr int blocks_together = 8;
  static constexpr int parts = 8;         // of attention that are taken together for 16 queries
  static constexpr int queries = 4;       // of attention, whose sums with 4 keys fit the registers
  static constexpr int kQ8Offset = 128;   // dot_u8 takes weights as they are stored: q + 128

  using F = __m512;   // 16 f32
  using I = __m512i;  // 16 int32
  using W = __m512i;  // a line: 16 words of 4 bytes

  static F zero() { return _mm512_setzero_ps(); }
  static F set(float v) { return _mm512_set1_ps(v); }
  static F load(const float* p) { return _mm512_loadu_ps(p); }
  static void store(float* p, F v) { _mm512_storeu_ps(p, v); }
  static F add(F a, F b) { return _mm512_add_ps(a, b); }
  static F sub(F a, F b) { return _mm512_sub_ps(a, b); }
  static F mul(F a, F b) { return _mm512_mul_ps(a, b); }
  static F div(F a, F b) { return _mm512_div_ps(a, b); }
  static F fma(F a, F b, F c) { return _mm512_fmadd_ps(a, b, c); }
  static F max(F a, F b) { return _mm512_max_ps(a, b); }
  static F min(F a, F b) { return _mm512_min_ps(a, b); }

  static F round(F v) { return _mm512_roundscale_ps(v, kNearest); }
  static F scale2(F v, F n) { return _mm512_scalef_ps(v, n); }

  static F load_some(const float* p, int64_t n) { return _mm512_maskz_loadu_ps(first(n), p); }
  static void store_some(float* p, F v, int64_t n) { _mm512_mask_storeu_ps(p, first(n), v); }

  static F load_f16(const uint8_t* p) { return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p)); }
  static F load_f16_some(const uint8_t* p, int64_t n) {
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first(n), p));
  }

  static F set_f16(const uint8_t* p) {
    int16_t h;
    std::memcpy(&h, p, sizeof h);
    return _mm512_cvtph_ps(_mm256_set1_epi16(h));
  }
  static F load_i8(const uint8_t* p) { return to_float(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)p))); }

  static void sums4(const F* v, float* out) {
    _mm_storeu_ps(out, _mm_hadd_ps(_mm_hadd_ps(quarter(v[0]), quarter(v[1])), _mm_hadd_ps(quarter(v[2]), quarter(v[3]))));
  }

  static I set_int(int32_t v) { return _mm512_set1_epi32(v); }
  template <class V>
  static void compute_now(V&) {}
  static F to_float(I v) { return _mm512_cvtepi32_ps(v); }

  static W load_line(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static void store_line(uint8_t* p, W w) { _mm512_storeu_si512(p, w); }
  static W low_nibbles(W w) { return _mm512_and_si512(w, _mm512_set1_epi8(15)); }
  static W high_nibbles(W w) { return _mm512_and_si512(_mm512_srli_epi16(w, 4), _mm512_set1_epi8(15)); }
  static F as_float(W w) { return _mm512_castsi512_ps(w); }

  template <int right>
  static W masked(W w, uint32_t mask) {
    const W kept = _mm512_set1_epi32(int32_t(mask));
    if constexpr (right < 0)
      return _mm512_and_si512(_mm512_slli_epi32(w, -right), kept);
    else
      return _mm512_and_si512(_mm512_srli_epi32(w, right), kept);
  }
  static W combined(W a, W b) { return _mm512_or_si512(a, b); }
  static F field(W w, int shift, uint32_t mask) {
    return to_float(_mm512_and_si512(_mm512_srl_epi32(w, _mm_cvtsi32_si128(shift)), _mm512_set1_epi32(int32_t(mask))));
  }
  static F signed_byte(W w, int shift) {
    return to_float(_mm512_srai_epi32(_mm512_sll_epi32(w, _mm_cvtsi32_si128(24 - shift)), 24));
  }
  static W load_u16(const uint8_t* p) { return _mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)p)); }
  static F power_field(W w, int shift) {
    return scale2(set(1), sub(field(w, shift, 255), set(128)));
  }
  static W lookup(W w, const uint8_t* table) {
    return _mm512_shuffle_epi8(_mm512_broadcast_i32x4(_mm_loadu_si128((const __m128i*)table)), w);
  }

  // Each lane: sum + the four bytes of w (unsigned) times the four bytes of x (signed).
  static I dot(I sum, W w, const int32_t* x) { return _mm512_dpbusd_epi32(sum, w, _mm512_set1_epi32(*x)); }
  static I dot_u4(I sum, W w, const int32_t* x) { return dot(sum, w, x); }
  static I dot_u8(I sum, W w, const int32_t* x) { return dot(sum, w, x); }

  static constexpr bool kNarrow = false;
  static I narrow(W w, const int32_t* x) { return dot(_mm512_setzero_si512(), w, x); }
  static I add_narrow(I a, I b) { return add_int(a, b); }
  static I widened(I a) { return a; }
  static I add_int(I a, I b) { return _mm512_add_epi32(a, b); }

#ifdef __AVX512BF16__
  // Each lane: sum + the two bf16 of w times the two of x.
  static constexpr bool kBf16Pairs = true;
  static F dot_bf16(F sum, W w, const int32_t* x) {
    return _mm512_dpbf16_ps(sum, (__m512bh)w, (__m512bh)_mm512_set1_epi32(*x));
  }
#else
  static constexpr bool kBf16Pairs = false;
  static F low_bf16(W w) { return as_float(_mm512_slli_epi32(w, 16)); }
  static F high_bf16(W w) { return as_float(_mm512_and_si512(w, _mm512_set1_epi32(int32_t(0xffff0000)))); }
#endif

  static void prefetch(const uint8_t* p) { _mm_prefetch((const char*)p, _MM_HINT_T0); }

 private:
  static constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;

  static __mmask16 first(int64_t n) { return __mmask16((1 << n) - 1); }
  static __m128 quarter(F v) {
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(v), _mm512_extractf32x8_ps(v, 1));
    return _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  }
};

}  // namespace
}  // namespace tpimpi

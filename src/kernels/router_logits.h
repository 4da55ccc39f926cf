// The logits of a router, for one level: sums in f64 over 16 lanes in a fixed order, so that every level gives the same bits.
//
// The product of two f32 is exact in f64. Compile with -ffp-contract=off, and without -ffast-math. The order of the sums is that of
// tpimpi/compute/backends/routing.py.
#pragma once

#if defined(__AVX2__)
#include <immintrin.h>
#endif

#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// As many f64 as a register of the level holds, as a compiler's own vector: its arithmetic is that of single numbers.
#if defined(__AVX512F__)
constexpr int kWide = 8;
#elif defined(__AVX2__)
constexpr int kWide = 4;
#else
constexpr int kWide = 2;
#endif
constexpr int kLaneVectors = kLanes / kWide;

typedef double F64s __attribute__((vector_size(kWide * 8)));

// Positions that are computed side by side: their sums fit the registers.
constexpr int kRoutedTogether = kWide == 8 ? 4 : 2;

// Compilers convert vectors in halves; x86 has an instruction.
#if defined(__AVX512F__)
inline F64s load_wide(const float* p) { return _mm512_cvtps_pd(_mm256_loadu_ps(p)); }
inline F64s load_wide(const uint16_t* p) {
  const __m256i words = _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)p)), 16);
  return _mm512_cvtps_pd(_mm256_castsi256_ps(words));
}
#elif defined(__AVX2__)
inline F64s load_wide(const float* p) { return _mm256_cvtps_pd(_mm_loadu_ps(p)); }
inline F64s load_wide(const uint16_t* p) {
  const __m128i words = _mm_unpacklo_epi16(_mm_setzero_si128(), _mm_loadl_epi64((const __m128i*)p));
  return _mm256_cvtps_pd(_mm_castsi128_ps(words));
}
#else
inline F64s load_wide(const float* p) {
  F64s v = {};
  for (int i = 0; i < kWide; ++i) v[i] = double(p[i]);
  return v;
}
inline F64s load_wide(const uint16_t* p) {
  F64s v = {};
  for (int i = 0; i < kWide; ++i) {
    const uint32_t bits = uint32_t(p[i]) << 16;
    float number;
    std::memcpy(&number, &bits, sizeof number);
    v[i] = double(number);
  }
  return v;
}
#endif

// logits of E rows, `hidden` apart, with P positions; of each row [experts] apart.
template <class T, int E, int P>
inline void logits_of(const T* rows, int64_t hidden, const double* x, int64_t experts, double* logits) {
  F64s sums[E][P][kLaneVectors] = {};
  const auto add = [&](const T* row, const double* of, int64_t stride_rows, int64_t stride_x) {
    for (int k = 0; k < kLaneVectors; ++k) {
      F64s w[E] = {};
      for (int e = 0; e < E; ++e) w[e] = load_wide(row + e * stride_rows + k * kWide);
      for (int p = 0; p < P; ++p) {
        F64s v;
        std::memcpy(&v, of + p * stride_x + k * kWide, sizeof v);
        for (int e = 0; e < E; ++e) sums[e][p][k] += v * w[e];
      }
    }
  };
  int64_t i = 0;
  for (; i + kLanes <= hidden; i += kLanes) add(rows + i, x + i, hidden, hidden);
  if (i < hidden) {
    T last_rows[E * kLanes] = {};
    double last[P * kLanes] = {};
    for (int e = 0; e < E; ++e) std::memcpy(last_rows + e * kLanes, rows + e * hidden + i, size_t(hidden - i) * sizeof(T));
    for (int p = 0; p < P; ++p) std::memcpy(last + p * kLanes, x + p * hidden + i, size_t(hidden - i) * sizeof(double));
    add(last_rows, last, kLanes, kLanes);
  }
  for (int e = 0; e < E; ++e) {
    for (int p = 0; p < P; ++p) {
      double lanes[kLanes];
      std::memcpy(lanes, sums[e][p], sizeof lanes);
      for (int half = kLanes / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; ++lane) lanes[lane] += lanes[lane + half];
      logits[p * experts + e] = lanes[0];
    }
  }
}

template <class T>
void logits_of_rows(const Router& router, int64_t first, int64_t last, int64_t n, const double* x, double* logits) {
  const T* rows = static_cast<const T*>(router.rows);
  const int64_t hidden = router.hidden, experts = router.experts;
  for (int64_t e = first, together; e < last; e += together) {
    together = e + 1 < last ? 2 : 1;
    int64_t p = 0;
    for (; p + kRoutedTogether <= n; p += kRoutedTogether)
      for (int64_t own = e; own < e + together; ++own)
        logits_of<T, 1, kRoutedTogether>(rows + own * hidden, hidden, x + p * hidden, experts, logits + p * experts + own);
    for (; p < n; ++p)  // two experts, so that there are chains enough
      (together == 2 ? logits_of<T, 2, 1> : logits_of<T, 1, 1>)(rows + e * hidden, hidden, x + p * hidden, experts,
                                                                 logits + p * experts + e);
  }
}

inline void router_logits(const Router& router, int64_t first, int64_t last, int64_t n, const double* x, double* logits) {
  if (router.bf16)
    logits_of_rows<uint16_t>(router, first, last, n, x, logits);
  else
    logits_of_rows<float>(router, first, last, n, x, logits);
}

}  // namespace
}  // namespace tpimpi

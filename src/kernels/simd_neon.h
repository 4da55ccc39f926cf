// 16 lanes by NEON of AArch64, four registers of 4 each; with the dot product instruction where the compiler is allowed it.
// See simd_portable.h for what each function means.
#pragma once

#include <arm_neon.h>

#include <cstdint>
#include <cstring>

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

struct Neon {
#ifdef __ARM_FEATURE_DOTPROD
  static constexpr const char* name = "neon-dot";
#else
  static constexpr const char* name = "neon";
#endif
  static constexpr int together = 6;
  static constexpr int blocks_together = 4;
  static constexpr int parts = 4;
  static constexpr int queries = 1;
  static constexpr int kQ8Offset = 0;  // dot_u8 makes the weights signed

  struct F { float32x4_t v[4]; };
  struct I { int32x4_t v[4]; };
  struct W { uint8x16_t v[4]; };

  static F zero() { return set(0); }
  static F set(float v) { return {{vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v), vdupq_n_f32(v)}}; }
  static F load(const float* p) { return {{vld1q_f32(p), vld1q_f32(p + 4), vld1q_f32(p + 8), vld1q_f32(p + 12)}}; }
  static void store(float* p, F v) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, v.v[i]);
  }
  static F add(F a, F b) { return each([&](int i) { return vaddq_f32(a.v[i], b.v[i]); }); }
  static F sub(F a, F b) { return each([&](int i) { return vsubq_f32(a.v[i], b.v[i]); }); }
  static F mul(F a, F b) { return each([&](int i) { return vmulq_f32(a.v[i], b.v[i]); }); }
  static F div(F a, F b) { return each([&](int i) { return vdivq_f32(a.v[i], b.v[i]); }); }
  static F fma(F a, F b, F c) { return each([&](int i) { return vfmaq_f32(c.v[i], a.v[i], b.v[i]); }); }
  static F max(F a, F b) { return each([&](int i) { return vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); }); }
  static F min(F a, F b) { return each([&](int i) { return vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]); }); }

  static F round(F v) { return each([&](int i) { return vrndnq_f32(v.v[i]); }); }
  static F scale2(F v, F n) {
    return each([&](int i) {
      const int32x4_t power = vcvtq_s32_f32(n.v[i]), half = vshrq_n_s32(power, 1);  // 2^power may be out of range
      return vmulq_f32(vmulq_f32(v.v[i], power_of_2(half)), power_of_2(vsubq_s32(power, half)));
    });
  }

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
    return each([=](int i) { return vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(p + 8 * i))); });
  }
  static F load_f16_some(const uint8_t* p, int64_t n) {
    uint8_t lanes[32] = {};
    std::memcpy(lanes, p, size_t(n) * 2);
    return load_f16(lanes);
  }
  static F set_f16(const uint8_t* p) {
    uint16_t h;
    std::memcpy(&h, p, sizeof h);
    const float32x4_t v = vcvt_f32_f16(vreinterpret_f16_u16(vdup_n_u16(h)));
    return {{v, v, v, v}};
  }
  static F load_i8(const uint8_t* p) {
    const int8x16_t all = vreinterpretq_s8_u8(vld1q_u8(p));
    const int16x8_t low = vmovl_s8(vget_low_s8(all)), high = vmovl_high_s8(all);
    return {{vcvtq_f32_s32(vmovl_s16(vget_low_s16(low))), vcvtq_f32_s32(vmovl_high_s16(low)),
             vcvtq_f32_s32(vmovl_s16(vget_low_s16(high))), vcvtq_f32_s32(vmovl_high_s16(high))}};
  }
  static void sums4(const F* v, float* out) {
    const float32x4_t first = vpaddq_f32(quarter(v[0]), quarter(v[1])), second = vpaddq_f32(quarter(v[2]), quarter(v[3]));
    vst1q_f32(out, vpaddq_f32(first, second));
  }

  static I set_int(int32_t v) { return {{vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v), vdupq_n_s32(v)}}; }
  template <class V>
  static void compute_now(V&) {}
  static F to_float(I a) { return each([&](int i) { return vcvtq_f32_s32(a.v[i]); }); }

  static W load_line(const uint8_t* p) { return {{vld1q_u8(p), vld1q_u8(p + 16), vld1q_u8(p + 32), vld1q_u8(p + 48)}}; }
  static void store_line(uint8_t* p, W w) {
    for (int i = 0; i < 4; ++i) vst1q_u8(p + 16 * i, w.v[i]);
  }
  static W low_nibbles(W w) {
    for (auto& v : w.v) v = vandq_u8(v, vdupq_n_u8(15));
    return w;
  }
  static W high_nibbles(W w) {
    for (auto& v : w.v) v = vshrq_n_u8(v, 4);
    return w;
  }
  static F as_float(W w) { return each([&](int i) { return vreinterpretq_f32_u8(w.v[i]); }); }

  template <int right>
  static W masked(W w, uint32_t mask) {
    for (auto& v : w.v) {
      uint32x4_t words = vreinterpretq_u32_u8(v);
      if constexpr (right < 0)
        words = vshlq_n_u32(words, -right);
      else if constexpr (right > 0)
        words = vshrq_n_u32(words, right);
      v = vreinterpretq_u8_u32(vandq_u32(words, vdupq_n_u32(mask)));
    }
    return w;
  }
  static W combined(W a, W b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vorrq_u8(a.v[i], b.v[i]);
    return a;
  }
  static F field(W w, int shift, uint32_t mask) {
    return each([&](int i) { return vcvtq_f32_u32(vandq_u32(right_by(w, i, shift), vdupq_n_u32(mask))); });
  }
  static F signed_byte(W w, int shift) {
    const int32x4_t left = vdupq_n_s32(24 - shift);
    return each([&](int i) { return vcvtq_f32_s32(vshrq_n_s32(vshlq_s32(vreinterpretq_s32_u8(w.v[i]), left), 24)); });
  }
  static W load_u16(const uint8_t* p) {
    W w;
    for (int i = 0; i < 4; ++i) w.v[i] = vreinterpretq_u8_u32(vmovl_u16(vreinterpret_u16_u8(vld1_u8(p + 8 * i))));
    return w;
  }
  static F power_field(W w, int shift) {
    return each([&](int i) {
      const int32x4_t e = vreinterpretq_s32_u32(vandq_u32(right_by(w, i, shift), vdupq_n_u32(255))), half = vshrq_n_s32(e, 1);
      return vmulq_f32(power_of_2(vsubq_s32(half, vdupq_n_s32(64))), power_of_2(vsubq_s32(vsubq_s32(e, half), vdupq_n_s32(64))));
    });
  }
  static W lookup(W w, const uint8_t* table) {
    const uint8x16_t entries = vld1q_u8(table);
    for (auto& v : w.v) v = vqtbl1q_u8(entries, v);
    return w;
  }

  static I dot_u4(I sum, W w, const int32_t* x) {
    const int8x16_t xs = vreinterpretq_s8_s32(vld1q_dup_s32(x));
    for (int i = 0; i < 4; ++i) sum.v[i] = add_products(sum.v[i], vreinterpretq_s8_u8(w.v[i]), xs);
    return sum;
  }
  static I dot_u8(I sum, W w, const int32_t* x) {
    for (auto& v : w.v) v = veorq_u8(v, vdupq_n_u8(128));
    return dot_u4(sum, w, x);
  }

  static constexpr bool kNarrow = false;
  static I narrow(W w, const int32_t* x) { return dot_u4(set_int(0), w, x); }
  static I add_narrow(I a, I b) { return add_int(a, b); }
  static I widened(I a) { return a; }
  static I add_int(I a, I b) {
    for (int i = 0; i < 4; ++i) a.v[i] = vaddq_s32(a.v[i], b.v[i]);
    return a;
  }

  static constexpr bool kBf16Pairs = false;
  static F low_bf16(W w) {
    return each([&](int i) { return vreinterpretq_f32_u32(vshlq_n_u32(vreinterpretq_u32_u8(w.v[i]), 16)); });
  }
  static F high_bf16(W w) {
    return each([&](int i) {
      return vreinterpretq_f32_u32(vandq_u32(vreinterpretq_u32_u8(w.v[i]), vdupq_n_u32(0xffff0000)));
    });
  }

  static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }

 private:
  template <class Function>
  static F each(Function function) {
    return {{function(0), function(1), function(2), function(3)}};
  }

  static uint32x4_t right_by(W w, int i, int shift) { return vshlq_u32(vreinterpretq_u32_u8(w.v[i]), vdupq_n_s32(-shift)); }
  static float32x4_t power_of_2(int32x4_t n) {
    return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(n, vdupq_n_s32(127)), 23));
  }
  static float32x4_t quarter(F v) { return vaddq_f32(vaddq_f32(v.v[0], v.v[2]), vaddq_f32(v.v[1], v.v[3])); }

  static int32x4_t add_products(int32x4_t sum, int8x16_t w, int8x16_t x) {
#ifdef __ARM_FEATURE_DOTPROD
    return vdotq_s32(sum, w, x);
#else
    // Sums of two products fit 16 bits: 2 * 128 * 127.
    const int16x8_t low = vmull_s8(vget_low_s8(w), vget_low_s8(x)), high = vmull_high_s8(w, x);
    return vpadalq_s16(sum, vpaddq_s16(low, high));
#endif
  }
};

}  // namespace
}  // namespace tpimpi

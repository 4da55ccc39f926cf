// What a layer computes beside its matrix products, for one level: norm, rotation, activation.
//
// S is a SIMD layer (see simd_portable.h). All sums are in f32.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// e^x, relative error under 3e-7 (tested); 0 under -104, infinity over 88.73, NaN of NaN. x = n ln 2 + r, and a polynomial
// for e^r (coefficients of the Cephes library's expf).
template <class S>
inline typename S::F exponential(typename S::F x) {
  x = S::max(S::set(-105), S::min(S::set(89), x));  // the bounds first: a NaN passes
  const auto n = S::round(S::mul(x, S::set(1.44269504f)));
  auto r = S::fma(n, S::set(-0.693359375f), x);
  r = S::fma(n, S::set(2.12194440e-4f), r);
  auto p = S::set(1.9875691500e-4f);
  p = S::fma(p, r, S::set(1.3981999507e-3f));
  p = S::fma(p, r, S::set(8.3334519073e-3f));
  p = S::fma(p, r, S::set(4.1665795894e-2f));
  p = S::fma(p, r, S::set(1.6666665459e-1f));
  p = S::fma(p, r, S::set(5.0000001201e-1f));
  return S::scale2(S::add(S::fma(p, S::mul(r, r), r), S::set(1)), n);
}

// Call function(i, n) for every run of n lanes that [0, size) is cut into: 16 of them, and what is left at last.
template <class Function>
inline void each_run(int64_t size, Function function) {
  int64_t i = 0;
  for (; i + kLanes <= size; i += kLanes) function(i, kLanes);
  if (i < size) function(i, size - i);
}

template <class S>
inline typename S::F load_run(const float* p, int64_t n) {
  return n == kLanes ? S::load(p) : S::load_some(p, n);
}

template <class S>
inline void store_run(float* p, typename S::F v, int64_t n) {
  if (n == kLanes)
    S::store(p, v);
  else
    S::store_some(p, v, n);
}

template <class S>
void rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, float eps, float* y) {
  for (; rows > 0; --rows, x += size, y += size) {
    typename S::F squares[4] = {S::zero(), S::zero(), S::zero(), S::zero()};  // chains, which keep the multipliers busy
    each_run(size, [&](int64_t i, int64_t n) {
      const auto v = load_run<S>(x + i, n);
      auto& sum = squares[i / kLanes % 4];
      sum = S::fma(v, v, sum);
    });
    float sums[4];
    S::sums4(squares, sums);
    const float mean = (sums[0] + sums[1] + (sums[2] + sums[3])) / float(size);
    const auto inverse = S::set(1 / std::sqrt(mean + eps));
    each_run(size, [&](int64_t i, int64_t n) {
      store_run<S>(y + i, S::mul(S::mul(load_run<S>(x + i, n), inverse), load_run<S>(weight + i, n)), n);
    });
  }
}

template <class S>
void rope(int64_t n, int64_t heads, int64_t head_dim, const float* x, const float* cos, const float* sin, float* y) {
  const int64_t half = head_dim / 2;
  for (; n > 0; --n, cos += half, sin += half) {
    for (int64_t head = 0; head < heads; ++head, x += head_dim, y += head_dim) {
      each_run(half, [&](int64_t i, int64_t lanes) {
        const auto c = load_run<S>(cos + i, lanes), s = load_run<S>(sin + i, lanes);
        const auto first = load_run<S>(x + i, lanes), second = load_run<S>(x + half + i, lanes);
        store_run<S>(y + i, S::sub(S::mul(first, c), S::mul(second, s)), lanes);
        store_run<S>(y + half + i, S::add(S::mul(second, c), S::mul(first, s)), lanes);
      });
    }
  }
}

template <class S>
void swiglu(int64_t size, const float* gate, const float* up, float* y) {
  each_run(size, [&](int64_t i, int64_t n) {
    const auto g = load_run<S>(gate + i, n), one = S::set(1);
    const auto silu = S::div(g, S::add(one, exponential<S>(S::sub(S::zero(), g))));
    store_run<S>(y + i, S::mul(silu, load_run<S>(up + i, n)), n);
  });
}

}  // namespace
}  // namespace tpimpi

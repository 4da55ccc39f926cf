// What a layer computes beside its matrix products, for one level: norms, rotation, activations.
//
// S is a SIMD layer (see simd_portable.h). Sums are in f32, but those of fixed_rms_norm.
#pragma once

#include <cmath>
#include <cstring>

#include "kernels.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// e^x = 2^n (1 + m), for x between -105 and 89: n is returned through `n`. x = n ln 2 + r, and m is a polynomial for e^r - 1
// (coefficients of the Cephes library's expf).
template <class S>
inline typename S::F exponential_parts(typename S::F x, typename S::F& n) {
  n = S::round(S::mul(x, S::set(1.44269504f)));
  auto r = S::fma(n, S::set(-0.693359375f), x);
  r = S::fma(n, S::set(2.12194440e-4f), r);
  auto p = S::set(1.9875691500e-4f);
  p = S::fma(p, r, S::set(1.3981999507e-3f));
  p = S::fma(p, r, S::set(8.3334519073e-3f));
  p = S::fma(p, r, S::set(4.1665795894e-2f));
  p = S::fma(p, r, S::set(1.6666665459e-1f));
  p = S::fma(p, r, S::set(5.0000001201e-1f));
  return S::fma(p, S::mul(r, r), r);
}

// e^x, relative error under 3e-7 (tested); 0 under -104, infinity over 88.73, NaN of NaN.
template <class S>
inline typename S::F exponential(typename S::F x) {
  typename S::F n;
  const auto m = exponential_parts<S>(S::max(S::set(-105), S::min(S::set(89), x)), n);  // the bounds first: a NaN passes
  return S::scale2(S::add(m, S::set(1)), n);
}

// c tanh(v / c), as tanh(u) = e / (e + 2) with e = e^(2 u) - 1 = 2^n m + (2^n - 1), which is exact to a few last places also
// where it is small. Over 10, tanh is 1.
template <class S>
inline typename S::F capped(typename S::F v, float c) {
  typename S::F n;
  const auto m = exponential_parts<S>(S::max(S::set(-20), S::min(S::set(20), S::mul(v, S::set(2 / c)))), n);
  const auto power = S::scale2(S::set(1), n), e = S::fma(power, m, S::sub(power, S::set(1)));
  return S::mul(S::set(c), S::div(e, S::add(e, S::set(2))));
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

// In plain C++, each operation of which IEEE 754 defines to the bit: compile with -ffp-contract=off, and without -ffast-math. The
// order of the sums is that of tpimpi/compute/backends/reference.py.
inline void fixed_rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, double eps, float* y) {
  for (; rows > 0; --rows, x += size, y += size) {
    double sums[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= size; i += kLanes)
      for (int lane = 0; lane < kLanes; ++lane) sums[lane] += double(x[i + lane]) * double(x[i + lane]);
    for (int lane = 0; i + lane < size; ++lane) sums[lane] += double(x[i + lane]) * double(x[i + lane]);
    for (int half = kLanes / 2; half > 0; half /= 2)
      for (int lane = 0; lane < half; ++lane) sums[lane] += sums[lane + half];
    const double inverse = 1 / std::sqrt(sums[0] / double(size) + eps);
    for (i = 0; i < size; ++i) y[i] = float(double(x[i]) * inverse * double(weight[i]));
  }
}

template <class S>
void rope(int64_t n, int64_t heads, int64_t head_dim, int64_t rotated, const float* x, const float* cos, const float* sin, float* y) {
  const int64_t half = rotated / 2;
  for (; n > 0; --n, cos += half, sin += half) {
    for (int64_t head = 0; head < heads; ++head, x += head_dim, y += head_dim) {
      each_run(half, [&](int64_t i, int64_t lanes) {
        const auto c = load_run<S>(cos + i, lanes), s = load_run<S>(sin + i, lanes);
        const auto first = load_run<S>(x + i, lanes), second = load_run<S>(x + half + i, lanes);
        store_run<S>(y + i, S::sub(S::mul(first, c), S::mul(second, s)), lanes);
        store_run<S>(y + half + i, S::add(S::mul(second, c), S::mul(first, s)), lanes);
      });
      if (rotated < head_dim && y != x) std::memcpy(y + rotated, x + rotated, size_t(head_dim - rotated) * sizeof(float));
    }
  }
}

// gelu(g) = g / (1 + e^(-2 u)) with u = sqrt(2 / pi) (g + 0.044715 g^3), as 1 + tanh(u) = 2 / (1 + e^(-2 u)).
template <class S>
void geglu(int64_t size, const float* gate, const float* up, float* y) {
  each_run(size, [&](int64_t i, int64_t n) {
    const auto g = load_run<S>(gate + i, n), one = S::set(1);
    const auto slope = S::mul(S::set(-1.5957691216f), S::fma(S::mul(S::set(0.044715f), g), g, one));
    const auto gelu = S::div(g, S::add(one, exponential<S>(S::mul(slope, g))));
    store_run<S>(y + i, S::mul(gelu, load_run<S>(up + i, n)), n);
  });
}

template <class S>
void swiglu(int64_t size, const float* gate, const float* up, float* y) {
  each_run(size, [&](int64_t i, int64_t n) {
    const auto g = load_run<S>(gate + i, n), one = S::set(1);
    const auto silu = S::div(g, S::add(one, exponential<S>(S::sub(S::zero(), g))));
    store_run<S>(y + i, S::mul(silu, load_run<S>(up + i, n)), n);
  });
}

template <class S>
void clamped_swiglu(int64_t size, float limit, const float* gate, const float* up, float* y) {
  each_run(size, [&](int64_t i, int64_t n) {
    // The limits first: a NaN passes.
    const auto most = S::set(limit), one = S::set(1), g = S::min(most, load_run<S>(gate + i, n));
    const auto u = S::max(S::set(-limit), S::min(most, load_run<S>(up + i, n)));
    const auto silu = S::div(g, S::add(one, exponential<S>(S::mul(S::set(-1.702f), g))));
    store_run<S>(y + i, S::mul(silu, S::add(u, one)), n);
  });
}

}  // namespace
}  // namespace tpimpi

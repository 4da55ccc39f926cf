// One rank's kernels: a level, its threads, and the memory that calls reuse.
#pragma once

#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "route.h"

namespace tpimpi {

// Not for use by two threads at once. Shapes are the caller's to check.
class Session {
 public:
  Session(const Level& level, int threads);

  const Level& level() const { return level_; }
  int threads() const { return pool_.threads(); }

  // y [positions, rows] = x [positions, columns] times the transpose of w, plus bias [rows] unless it is null.
  void linear(const Matrix& w, int64_t positions, const float* x, const float* bias, float* y);
  void attention(const Attention& a);
  void rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, float eps, float* y);
  void fixed_rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, double eps, float* y);
  // experts, weights [positions, chosen] of x [positions, hidden]. False where a logit is not finite.
  bool route(const Router& router, const Routing& routing, int64_t positions, const float* x, int32_t* experts, float* weights);
  void rope(int64_t n, int64_t heads, int64_t head_dim, int64_t rotated, const float* x, const float* cos, const float* sin, float* y);
  void swiglu(int64_t size, const float* gate, const float* up, float* y);
  void geglu(int64_t size, const float* gate, const float* up, float* y);
  void clamped_swiglu(int64_t size, float limit, const float* gate, const float* up, float* y);

  // `blocks` blocks of numbers in GGML's row form; false where a number is not finite.
  bool quantize(Format format, int64_t blocks, const float* x, uint8_t* out);

  // See limits.h: the sum of all words, read by all threads; operations a second of one thread.
  uint64_t read(const uint8_t* data, int64_t bytes);
  double multiply_peak(Format format, double seconds) const;

 private:
  // In how many parts `items` are dealt, where all of them take `work` operations.
  int parts(int64_t items, int64_t work) const;
  // Call work(part, first, last) on as many threads, for equal runs of [0, items).
  template <class Work>
  void deal(int parts, int64_t items, Work work);
  // Reused memory of at least so many bytes, aligned to a line.
  uint8_t* scratch(int64_t bytes);

  const Level& level_;
  Pool pool_;
  std::unique_ptr<uint8_t[]> scratch_;
  int64_t scratch_bytes_ = 0;
};

}  // namespace tpimpi

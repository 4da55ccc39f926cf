// One rank's kernels: a level, its threads, and the memory that calls reuse.
#pragma once

#include <algorithm>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pool.h"
#include "route.h"

namespace tpimpi {

// One expert (or tile of one) of a mixture, and the positions that use it; see ExpertUse in tpimpi/compute/experts.py.
struct Expert {
  Matrix gate, up, down;  // [columns, hidden] twice, [hidden, columns]; of no columns no rows, and nothing else of them is read
  const float *gate_bias, *up_bias, *down_bias;  // or null
  int64_t count;
  const int32_t* rows;   // [count]
  const float* weights;  // [count]
};

struct Activation {
  enum class Kind { silu, gelu_tanh, clamped_silu };

  Kind kind;
  float limit;  // of clamped_silu
};

// Not for use by two threads at once. Shapes are the caller's to check.
class Session {
 public:
  Session(const Level& level, int threads);

  const Level& level() const { return level_; }
  int threads() const { return pool_.threads(); }

  // y [positions, rows] = x [positions, columns] times the transpose of w, plus bias [rows] unless it is null.
  void linear(const Matrix& w, int64_t positions, const float* x, const float* bias, float* y);
  // Adds weights[i] times the expert's result for x[rows[i]] to out[rows[i]], x and out [n, hidden], one expert after another. The same
  // bits as of one product after another.
  void experts(const std::vector<Expert>& experts, const Activation& activation, int64_t hidden, const float* x, float* out);
  void attention(const Attention& a);
  // Puts k and v [n, heads, head_dim] of rows into the pages of KV heads from `first_head`.
  void store(const KVPages& pages, const KVRows& rows, int64_t first_head, int64_t heads, const float* k, const float* v, uint8_t* k_pages,
             uint8_t* v_pages);
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
  void deal(int parts, int64_t items, Work work) {
    if (parts == 1) return work(0, int64_t(0), items);
    pool_.run(parts, [&](int part) { work(part, items * part / parts, items * (part + 1) / parts); });
  }
  // Call work(part, index, first, last) for runs of the items of every stretch, so that the threads have about equal operations.
  struct Stretch {
    int64_t items, cost;  // operations of one item
  };
  template <class Work>
  void deal_stretches(const std::vector<Stretch>& stretches, Work work) {
    int64_t items = 0, total = 0;
    for (const Stretch& s : stretches) {
      items += s.items;
      total += s.items * s.cost;
    }
    if (total == 0) return;
    const int64_t count = parts(items, total);
    deal(int(count), count, [&](int part, int64_t first_part, int64_t last_part) {
      int64_t low = total * first_part / count, high = total * last_part / count;
      for (size_t i = 0; i < stretches.size(); ++i) {
        const auto [all, cost] = stretches[i];
        if (all == 0) continue;
        // An item is of the thread in whose share of the costs it begins.
        const int64_t first = std::min(divided_up(std::max<int64_t>(low, 0), cost), all);
        const int64_t last = std::min(divided_up(std::max<int64_t>(high, 0), cost), all);
        if (first < last) work(part, i, first, last);
        low -= all * cost;
        high -= all * cost;
      }
    });
  }
  // Reused memory of at least so many bytes, aligned to a line.
  uint8_t* scratch(int64_t bytes);

  const Level& level_;
  Pool pool_;
  std::unique_ptr<uint8_t[]> scratch_;
  int64_t scratch_bytes_ = 0;
};

}  // namespace tpimpi

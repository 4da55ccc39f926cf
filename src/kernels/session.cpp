#include "session.h"

#include <algorithm>
#include <atomic>
#include <chrono>

namespace tpimpi {
namespace {

// Operations below which another thread costs more time than it saves: it takes about 2 us to call one.
constexpr int64_t kWorthAThread = 1 << 18;

}  // namespace

Session::Session(const Level& level, int threads) : level_(level), pool_(threads) {}

int Session::parts(int64_t items, int64_t work) const {
  return int(std::max<int64_t>(1, std::min({int64_t(threads()), items, work / kWorthAThread})));
}

uint8_t* Session::scratch(int64_t bytes) {
  if (bytes > scratch_bytes_) {
    scratch_.reset();
    scratch_bytes_ = 0;
    scratch_.reset(new uint8_t[size_t(bytes) + kLine]);
    scratch_bytes_ = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(scratch_.get());
  return reinterpret_cast<uint8_t*>((address + kLine - 1) / kLine * kLine);
}

void Session::linear(const Matrix& w, int64_t positions, const float* x, const float* bias, float* y) {
  if (positions == 0) return;
  const int64_t panels = divided_up(w.rows, kPanelRows);
  uint8_t* prepared = scratch(level_.prepared_words(w.format, w.columns) * 4 * positions);
  level_.prepare(w.format, w.columns, positions, x, prepared);
  deal(parts(panels, w.rows * w.columns * positions), panels, [&](int, int64_t first, int64_t last) {
    level_.multiply(w, first, last, positions, prepared, bias, y);
  });
}

void Session::attention(const Attention& a) {
  std::vector<Span> spans;
  std::vector<Stretch> stretches;
  for (int64_t row = 0; row < a.rows.n; row = spans.back().last) {
    const Span& span = spans.emplace_back(span_from(a.rows, row));
    int64_t seen = 0;
    for (; row < span.last; ++row) {
      const int64_t keys = a.rows.position[row] + 1;
      seen += a.window && a.window < keys ? a.window : keys;
    }
    stretches.push_back({a.heads * (span.last - span.first), divided_up(seen, span.last - span.first) * a.kv.head_dim * 2});
  }
  const int64_t own = divided_up(level_.attention_scratch(a), kLine / 4) * (kLine / 4);
  float* memory = reinterpret_cast<float*>(scratch(own * 4 * threads()));
  deal_stretches(stretches, [&](int part, size_t i, int64_t first, int64_t last) {
    level_.attention(a, spans[i], first, last, memory + part * own);
  });
}

void Session::store(const KVPages& pages, const KVRows& rows, int64_t first_head, int64_t heads, const float* k, const float* v,
                    uint8_t* k_pages, uint8_t* v_pages) {
  const int64_t size = heads * pages.head_dim, row_bytes = cached_bytes(pages.format, pages.head_dim);
  deal(parts(rows.n, rows.n * size * 8), rows.n, [&](int, int64_t first, int64_t last) {
    for (int64_t row = first; row < last; ++row) {
      const int64_t page = rows.position[row] / pages.page, in_page = rows.position[row] % pages.page;
      const int64_t at = rows.table(row)[page] * pages.page_stride + first_head * pages.head_stride + in_page * row_bytes;
      level_.store(pages.format, pages.head_dim, heads, k + row * size, pages.head_stride, k_pages + at);
      level_.store(pages.format, pages.head_dim, heads, v + row * size, pages.head_stride, v_pages + at);
    }
  });
}

void Session::rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, float eps, float* y) {
  deal(parts(rows, rows * size * 4), rows, [&](int, int64_t first, int64_t last) {
    level_.rms_norm(last - first, size, x + first * size, weight, eps, y + first * size);
  });
}

void Session::fixed_rms_norm(int64_t rows, int64_t size, const float* x, const float* weight, double eps, float* y) {
  deal(parts(rows, rows * size * 4), rows, [&](int, int64_t first, int64_t last) {
    level_.fixed_rms_norm(last - first, size, x + first * size, weight, eps, y + first * size);
  });
}

bool Session::route(const Router& router, const Routing& routing, int64_t positions, const float* x, int32_t* experts, float* weights) {
  constexpr int64_t kRun = 16;  // positions, whose vectors stay in the second cache
  const int64_t hidden = router.hidden, count = router.experts, run = std::min(positions, kRun);
  double* const wide = reinterpret_cast<double*>(scratch((run * (hidden + count) + 2 * count) * int64_t(sizeof(double))));
  double *const logits = wide + run * hidden, *const scores = logits + run * count;
  for (int64_t begin = 0; begin < positions; begin += run) {
    const int64_t n = std::min(run, positions - begin);
    std::copy(x + begin * hidden, x + (begin + n) * hidden, wide);
    deal(parts(count, count * hidden * n * 4), count, [&](int, int64_t first, int64_t last) {
      level_.router_logits(router, first, last, n, wide, logits);
    });
    const int64_t at = begin * routing.chosen;
    if (!choose(routing, n, logits, scores, experts + at, weights + at)) return false;
  }
  return true;
}

void Session::rope(int64_t n, int64_t heads, int64_t head_dim, int64_t rotated, const float* x, const float* cos, const float* sin,
                   float* y) {
  const int64_t size = heads * head_dim, half = rotated / 2;
  deal(parts(n, n * size * 4), n, [&](int, int64_t first, int64_t last) {
    level_.rope(last - first, heads, head_dim, rotated, x + first * size, cos + first * half, sin + first * half, y + first * size);
  });
}

void Session::swiglu(int64_t size, const float* gate, const float* up, float* y) {
  deal(parts(size, size * 16), size, [&](int, int64_t first, int64_t last) {
    level_.swiglu(last - first, gate + first, up + first, y + first);
  });
}

void Session::geglu(int64_t size, const float* gate, const float* up, float* y) {
  deal(parts(size, size * 16), size, [&](int, int64_t first, int64_t last) {
    level_.geglu(last - first, gate + first, up + first, y + first);
  });
}

void Session::clamped_swiglu(int64_t size, float limit, const float* gate, const float* up, float* y) {
  deal(parts(size, size * 16), size, [&](int, int64_t first, int64_t last) {
    level_.clamped_swiglu(last - first, limit, gate + first, up + first, y + first);
  });
}

bool Session::quantize(Format format, int64_t blocks, const float* x, uint8_t* out) {
  std::atomic<bool> finite{true};
  const int64_t weights = block_weights(format);
  deal(parts(blocks / 16, blocks * weights * 300), blocks, [&](int, int64_t first, int64_t last) {
    if (!level_.quantize(format, last - first, x + first * weights, out + first * block_bytes(format))) finite = false;
  });
  return finite;
}

uint64_t Session::read(const uint8_t* data, int64_t bytes) {
  constexpr int64_t kPiece = 256;  // what is left over is not read
  const int64_t pieces = bytes / kPiece;
  std::atomic<uint64_t> sum{0};
  deal(parts(pieces, bytes), pieces, [&](int, int64_t first, int64_t last) {
    sum += level_.read(data + first * kPiece, (last - first) * kPiece);
  });
  return sum;
}

double Session::multiply_peak(Format format, double seconds) const {
  using Clock = std::chrono::steady_clock;
  constexpr int64_t kRounds = 20000;
  float sink;
  double best = 0;
  const auto until = Clock::now() + std::chrono::duration<double>(seconds);
  do {  // the best of many short runs: the rest was somebody else's
    const auto began = Clock::now();
    const int64_t operations = level_.multiply_round(format, kRounds, &sink);
    best = std::max(best, double(operations) / std::chrono::duration<double>(Clock::now() - began).count());
  } while (Clock::now() < until);
  return best;
}

}  // namespace tpimpi

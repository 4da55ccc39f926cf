// Runs the kernels of every level that this processor has on cases from a file, for tests/compute/test_kernels.py: with sanitizers,
// which see an access beyond an array because each is allocated with its exact size; and on other processors, emulated.
//
//     cases INPUT OUTPUT
//
// Input: cases one after another, all numbers little-endian int64. A case: operation; number of parameters, parameters; number
// of arrays, and each as its bytes' number and the bytes; number of bytes of the result. Output: for each level the length of
// its name, its name, and the results, one after another.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "kernels.h"
#include "pack.h"
#include "route.h"

using namespace tpimpi;

namespace {

[[noreturn]] void fail(const char* what) {
  std::fprintf(stderr, "cases: %s\n", what);
  std::exit(1);
}

// Memory of exactly so many bytes; what is not written to is 0xff, a NaN.
struct Buffer {
  explicit Buffer(int64_t bytes) : size(bytes), data(static_cast<uint8_t*>(std::malloc(size_t(bytes))), std::free) {
    if (bytes > 0) std::memset(data.get(), 0xff, size_t(bytes));
  }

  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data.get());
  }

  int64_t size;
  std::unique_ptr<uint8_t, void (*)(void*)> data;
};

enum Operation { kLinear, kRmsNorm, kFixedRmsNorm, kRope, kSwiglu, kGeglu, kAttention, kQuantize, kRead, kPack, kRoute, kClampedSwiglu, kStore };

struct Case {
  int64_t operation;
  std::vector<int64_t> parameters;
  std::vector<Buffer> arrays;
  int64_t result_bytes;

  const float* floats(size_t i) const { return arrays.at(i).as<const float>(); }
};

// Call work(first, last) for `parts` runs of [0, items).
template <class Work>
void in_parts(int64_t parts, int64_t items, Work work) {
  for (int64_t i = 0; i < parts; ++i) work(items * i / parts, items * (i + 1) / parts);
}

// n, hidden, experts, chosen, whether bf16, sigmoid, normalized, what the bias is of, parts; x, router, bias or nothing, scale (f64). The
// result: the experts, then their weights; of logits that are not finite all bytes 0xff.
void route(const Level& level, const Case& c, const Buffer& result) {
  const auto& p = c.parameters;
  const int64_t n = p.at(0), hidden = p.at(1), experts = p.at(2), chosen = p.at(3);
  const Router router{experts, hidden, p.at(4) != 0, c.arrays.at(1).as<const void>()};
  const Routing routing{experts, chosen, p.at(5) != 0, p.at(6) != 0, *c.arrays.at(3).as<const double>(), Routing::Bias(p.at(7)),
                        c.arrays.at(2).size ? c.floats(2) : nullptr};
  const Buffer wide(n * hidden * 8), logits(n * experts * 8), scores(2 * experts * 8);
  std::copy(c.floats(0), c.floats(0) + n * hidden, wide.as<double>());
  in_parts(p.at(8), experts, [&](int64_t first, int64_t last) {
    level.router_logits(router, first, last, n, wide.as<const double>(), logits.as<double>());
  });
  if (!choose(routing, n, logits.as<double>(), scores.as<double>(), result.as<int32_t>(), result.as<float>() + n * chosen))
    std::memset(result.as<uint8_t>(), 0xff, size_t(result.size));
}

// Format, head_dim, page, page_stride, head_stride (bytes).
KVPages pages_of(const Case& c) {
  const auto& p = c.parameters;
  return {Cached(p.at(0)), p.at(1), p.at(2), p.at(3), p.at(4)};
}

// Rows, table_size; sequence, position, tables from array `i`.
KVRows rows_of(const Case& c, size_t i) {
  return {c.parameters.at(5), c.arrays.at(i).as<const int32_t>(), c.arrays.at(i + 1).as<const int32_t>(),
          c.arrays.at(i + 2).as<const int32_t>(), c.parameters.at(6)};
}

void run(const Level& level, const Case& c, const Buffer& result) {
  const auto& p = c.parameters;
  float* y = result.as<float>();
  switch (c.operation) {
    case kLinear: {  // format, rows, columns, positions, parts, first; data, x, and bias or nothing
      const Matrix w{Format(p.at(0)), p.at(1), p.at(2), p.at(5), c.arrays.at(0).as<const uint8_t>()};
      const Buffer prepared(level.prepared_words(w.format, w.columns) * 4 * p.at(3));
      level.prepare(w.format, w.columns, p[3], c.floats(1), prepared.as<uint8_t>());
      in_parts(p.at(4), divided_up(w.rows, kPanelRows), [&](int64_t first, int64_t last) {
        level.multiply(w, first, last, p[3], prepared.as<const uint8_t>(), c.arrays.at(2).size ? c.floats(2) : nullptr, y);
      });
      return;
    }
    case kRmsNorm: {  // rows, size, whether in place; x, weight, eps
      if (p.at(2)) std::memcpy(y, c.floats(0), size_t(result.size));
      return level.rms_norm(p.at(0), p.at(1), p[2] ? y : c.floats(0), c.floats(1), *c.floats(2), y);
    }
    case kFixedRmsNorm: {  // the same; eps is f64
      if (p.at(2)) std::memcpy(y, c.floats(0), size_t(result.size));
      const double eps = *c.arrays.at(2).as<const double>();
      return level.fixed_rms_norm(p.at(0), p.at(1), p[2] ? y : c.floats(0), c.floats(1), eps, y);
    }
    case kRope: {  // n, heads, head_dim, rotated elements, whether in place; x, cos, sin
      if (p.at(4)) std::memcpy(y, c.floats(0), size_t(result.size));
      return level.rope(p.at(0), p.at(1), p.at(2), p.at(3), p[4] ? y : c.floats(0), c.floats(1), c.floats(2), y);
    }
    case kSwiglu:
    case kGeglu: {  // size, which array is the result's too (2: neither); gate, up
      if (p.at(1) < 2) std::memcpy(y, c.floats(size_t(p[1])), size_t(result.size));
      const auto gated = c.operation == kSwiglu ? level.swiglu : level.geglu;
      return gated(p.at(0), p[1] == 0 ? y : c.floats(0), p[1] == 1 ? y : c.floats(1), y);
    }
    case kAttention: {  // form, heads, window, parts; q, k, v, q_to_kv, [scale, softcap], sinks or nothing, sequence, position, tables
      const Attention a{rows_of(c, 6), pages_of(c), p.at(7), p.at(8), c.floats(4)[0], c.floats(4)[1], c.floats(0), c.floats(1), c.floats(2),
                        c.arrays.at(3).as<const int64_t>(), c.arrays.at(5).size ? c.floats(5) : nullptr, y};
      const Buffer scratch(level.attention_scratch(a) * 4);
      for (Span span{0, 0}; span.last < a.rows.n;) {
        span = span_from(a.rows, span.last);
        in_parts(p.at(9), (span.last - span.first) * a.heads,
                 [&](int64_t first, int64_t last) { level.attention(a, span, first, last, scratch.as<float>()); });
      }
      return;
    }
    case kStore:  // format, head_dim, n, stride; x. What is between is 0xff.
      return level.store(Cached(p.at(0)), p.at(1), p.at(2), c.floats(0), p.at(3), result.as<uint8_t>());
    case kQuantize:  // format, blocks; x
      if (!level.quantize(Format(p.at(0)), p.at(1), c.floats(0), result.as<uint8_t>()))
        std::memset(result.as<uint8_t>(), 0xff, size_t(result.size));
      return;
    case kRead: {  // bytes; data
      const uint64_t sum = level.read(c.arrays.at(0).as<const uint8_t>(), p.at(0));
      std::memcpy(result.as<uint8_t>(), &sum, sizeof sum);
      return;
    }
    case kPack:  // format, rows, columns, first, stride; rows in row form
      return pack(Format(p.at(0)), p.at(1), p.at(2), p.at(3), c.arrays.at(0).as<const uint8_t>(), p.at(4), result.as<uint8_t>());
    case kRoute: return route(level, c, result);
    case kClampedSwiglu: {  // size, which array is the result's too; gate, up, limit
      if (p.at(1) < 2) std::memcpy(y, c.floats(size_t(p[1])), size_t(result.size));
      return level.clamped_swiglu(p.at(0), *c.floats(2), p[1] == 0 ? y : c.floats(0), p[1] == 1 ? y : c.floats(1), y);
    }
  }
  fail("an operation is unknown");
}

bool read_int(std::FILE* file, int64_t& value) { return std::fread(&value, 8, 1, file) == 1; }

int64_t read_count(std::FILE* file) {
  int64_t value;
  if (!read_int(file, value) || value < 0) fail("the input ends early");
  return value;
}

std::vector<Case> read_cases(const char* path) {
  std::FILE* file = std::fopen(path, "rb");
  if (!file) fail("cannot open the input");
  std::vector<Case> cases;
  for (int64_t operation; read_int(file, operation);) {
    Case c{operation, std::vector<int64_t>(size_t(read_count(file))), {}, 0};
    for (auto& parameter : c.parameters) parameter = read_count(file);
    const int64_t arrays = read_count(file);
    for (int64_t i = 0; i < arrays; ++i) {
      const Buffer& array = c.arrays.emplace_back(read_count(file));
      if (std::fread(array.as<uint8_t>(), 1, size_t(array.size), file) != size_t(array.size)) fail("the input ends early");
    }
    c.result_bytes = read_count(file);
    cases.push_back(std::move(c));
  }
  std::fclose(file);
  return cases;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 3) fail("give an input and an output file");
  const std::vector<Case> cases = read_cases(argv[1]);
  std::FILE* out = std::fopen(argv[2], "wb");
  if (!out) fail("cannot open the output");
  int count;
  const Level* const* all = levels(&count);
  for (int i = 0; i < count; ++i) {
    const Level& level = *all[i];
    const int64_t length = int64_t(std::strlen(level.name));
    bool written = std::fwrite(&length, 8, 1, out) == 1 && std::fwrite(level.name, size_t(length), 1, out) == 1;
    for (const Case& c : cases) {
      const Buffer result(c.result_bytes);
      run(level, c, result);
      written &= std::fwrite(result.as<uint8_t>(), 1, size_t(result.size), out) == size_t(result.size);
    }
    if (!written) fail("cannot write the output");
  }
  if (std::fclose(out) != 0) fail("cannot write the output");
}

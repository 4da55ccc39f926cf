// The kernels' interface: what a level (an instruction set) provides, and the packed weights that it reads.
//
// All arrays are row-major. The packed form of weights is specified in tpimpi/compute/formats: panels of 16 rows, each made of
// lines of 64 bytes that hold one 4-byte word of each row. Every operation has a twin of the same meaning in
// tpimpi/compute/backends/reference.py.
#pragma once

#include <cstddef>
#include <cstdint>

namespace tpimpi {

constexpr int kPanelRows = 16;
constexpr int kLanes = 16;     // numbers that a level computes side by side
constexpr int kBlock = 32;      // numbers of activations that share a scale, and where rows of blocks may be cut
constexpr int kLine = 64;       // bytes: one word of each row of a panel

enum class Format { f32, bf16, q8_0, q4_0, q4_1, q4_k, q6_k, q5_k, q3_k, q2_k, q5_0, q5_1, iq4_nl, iq4_xs, mxfp4, f16 };

constexpr Format kLastFormat = Format::f16;

// Functions that levels use are static: levels are compiled with different flags, and must not share code.
static constexpr bool quantized(Format format) { return format >= Format::q8_0 && format != Format::f16; }

// Whether the kernels make blocks of this format (`Level::quantize`).
static constexpr bool can_quantize(Format format) {
  return (format >= Format::q8_0 && format <= Format::q2_k) || format == Format::iq4_xs;
}

static constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of a block in row form, GGML's; of a number where there are no blocks.
static constexpr int block_bytes(Format format) {
  switch (format) {
    case Format::f32: return 4;
    case Format::bf16:
    case Format::f16: return 2;
    case Format::q8_0: return 34;
    case Format::q4_0:
    case Format::iq4_nl: return 18;
    case Format::q4_1: return 20;
    case Format::q5_0: return 22;
    case Format::q5_1: return 24;
    case Format::mxfp4: return 17;
    case Format::q4_k: return 144;
    case Format::q5_k: return 176;
    case Format::q6_k: return 210;
    case Format::q3_k: return 110;
    case Format::q2_k: return 84;
    case Format::iq4_xs: return 136;
  }
  return 0;
}

// Quantized weights are packed in groups of units of 32 columns: first a group's lines of scales, then each unit's lines of codes.
static constexpr int group_units(Format format) {
  switch (format) {
    case Format::q4_k:
    case Format::q5_k:
    case Format::q6_k:
    case Format::q3_k:
    case Format::q2_k:
    case Format::iq4_xs: return 8;
    case Format::mxfp4: return 4;
    default: return 2;
  }
}

// Weights of a block in row form.
static constexpr int block_weights(Format format) {
  return !quantized(format) ? 1 : group_units(format) == 8 ? 256 : kBlock;
}

static constexpr int unit_lines(Format format) {
  switch (format) {
    case Format::q8_0: return 8;
    case Format::q6_k: return 6;
    case Format::q5_k:
    case Format::q5_0:
    case Format::q5_1: return 5;
    case Format::q3_k: return 3;
    case Format::q2_k: return 2;
    default: return 4;
  }
}

// Lines of scales of a group of so many units: fewer than all where a matrix begins or ends within a block of 256.
static constexpr int scale_lines(Format format, int units) {
  switch (format) {
    case Format::q4_1:
    case Format::q5_1:
    case Format::iq4_xs: return 2;
    case Format::q4_k:
    case Format::q5_k:
    case Format::q3_k: return 1 + (units <= 2 ? 1 : units <= 4 ? 2 : 3);
    case Format::q6_k:
    case Format::q2_k: return 1 + (units + 1) / 2;
    default: return 1;
  }
}

// Bytes of a panel of `columns` columns, of which the first is column `first` of a block of 256 (0 in other formats).
static constexpr int64_t panel_bytes(Format format, int64_t columns, int64_t first) {
  if (format == Format::f32) return columns * kLine;
  if (!quantized(format)) return divided_up(columns, 2) * kLine;
  const int64_t units = divided_up(columns, kBlock), size = group_units(format), skipped = first / kBlock;
  const int64_t lead = skipped ? (units < size - skipped ? units : size - skipped) : 0;
  const int64_t whole = (units - lead) / size, last = (units - lead) % size;
  const int64_t scales = (lead ? scale_lines(format, int(lead)) : 0) + whole * scale_lines(format, int(size)) +
                         (last ? scale_lines(format, int(last)) : 0);
  return (scales + units * unit_lines(format)) * kLine;
}

struct Matrix {
  Format format;
  int64_t rows, columns;
  int64_t first;        // where in a block of 256 the first column stands: a multiple of 32; 0 in other formats
  const uint8_t* data;  // panel_bytes(format, columns, first) for each 16 rows
};

// How keys and values are stored: a head's numbers as they are, as f16, or in GGML's blocks of q8_0 (head_dim is a multiple of 32).
enum class Cached { f32, f16, q8_0 };

constexpr Cached kLastCached = Cached::q8_0;

// Bytes of so many numbers; of q8_0 a multiple of 32, or 16: the first half of a block.
static constexpr int64_t cached_bytes(Cached format, int64_t numbers) {
  return format == Cached::f32 ? numbers * 4 : format == Cached::f16 ? numbers * 2 : numbers * block_bytes(Format::q8_0) / kBlock;
}

constexpr int kLeastPage = 16;  // positions

// The form of pages of keys, or of values, of one layer: of each KV head `page` positions, one after another.
struct KVPages {
  Cached format;
  int64_t head_dim;
  int64_t page;                      // positions; kLeastPage or more
  int64_t page_stride, head_stride;  // bytes from a page to the next, and from a KV head to the next
};

// Rows of a step: each has a sequence, and a position in it. The page of positions [i page, (i + 1) page) of a sequence is the
// i-th of its table.
struct KVRows {
  int64_t n;
  const int32_t *sequence, *position;  // [n]
  const int32_t* tables;               // [sequences, table_size]
  int64_t table_size;

  const int32_t* table(int64_t row) const { return tables + sequence[row] * table_size; }
};

// Rows that follow each other and are of one sequence.
struct Span {
  int64_t first, last;
};

// The span that begins with row `first`.
static inline Span span_from(const KVRows& rows, int64_t first) {
  int64_t last = first + 1;
  while (last < rows.n && rows.sequence[last] == rows.sequence[first]) ++last;
  return {first, last};
}

// Grouped-query attention of rows over the keys and values of their sequences, up to their own positions.
struct Attention {
  KVRows rows;
  KVPages kv;
  int64_t heads;
  int64_t window;              // a query sees so many positions, itself included; 0: all before it
  float scale;                 // of scores
  float softcap;               // c > 0: scores become c tanh(score / c)
  const float* q;              // [n, heads, head_dim]
  const void *k, *v;           // pages
  const int64_t* q_to_kv;      // [heads]
  const float* sinks;          // [heads]: a score without a value in each head's softmax; or null
  float* y;                    // [n, heads, head_dim]
};

// The router of a mixture of experts.
struct Router {
  int64_t experts, hidden;
  bool bf16;
  const void* rows;  // [experts, hidden], f32 or bf16
};

// What one level provides. Pointers never overlap unless a comment says so.
struct Level {
  const char* name;

  // Words of 4 bytes that `prepare` fills for one position.
  int64_t (*prepared_words)(Format format, int64_t columns);

  // Rearrange (for bf16 round, for quantized weights quantize) x [positions, columns] for `multiply`.
  void (*prepare)(Format format, int64_t columns, int64_t positions, const float* x, uint8_t* prepared);

  // Panels [first, last) of y [positions, rows] = x times the transpose of w, plus bias [rows] unless it is null.
  void (*multiply)(const Matrix& w, int64_t first, int64_t last, int64_t positions, const uint8_t* prepared,
                   const float* bias, float* y);

  // y [rows, size] = rows of x over the root of their mean square plus eps, times weight [size]. y may be x.
  void (*rms_norm)(int64_t rows, int64_t size, const float* x, const float* weight, float eps, float* y);

  // The same with the same bits at every level: in f64, sums over 16 lanes in a fixed order. y may be x.
  void (*fixed_rms_norm)(int64_t rows, int64_t size, const float* x, const float* weight, double eps, float* y);

  // Experts [first, last) of logits [n, experts] = x [n, hidden] times the transpose of the router, in f64: the same bits at every
  // level, as fixed_rms_norm's.
  void (*router_logits)(const Router& router, int64_t first, int64_t last, int64_t n, const double* x, double* logits);

  // y [n, heads, head_dim] = x, of which the first `rotated` elements of each head are rotated by the angles of cos, sin
  // [n, rotated / 2]; i pairs with i + rotated / 2. y may be x.
  void (*rope)(int64_t n, int64_t heads, int64_t head_dim, int64_t rotated, const float* x, const float* cos, const float* sin,
               float* y);

  // y [size] = silu(gate) * up. y may be gate or up.
  void (*swiglu)(int64_t size, const float* gate, const float* up, float* y);

  // y [size] = gelu(gate) * up, gelu by its tanh formula. y may be gate or up.
  void (*geglu)(int64_t size, const float* gate, const float* up, float* y);

  // y [size] = g sigmoid(1.702 g) (u + 1), with g = min(gate, limit) and u = up between -limit and limit. y may be gate or up.
  void (*clamped_swiglu)(int64_t size, float limit, const float* gate, const float* up, float* y);

  // Items [first, last) of the pairs (head, row) of a span, item = head * rows of the span + row in it, of an attention.
  // `scratch` has attention_scratch(a) floats.
  void (*attention)(const Attention& a, const Span& span, int64_t first, int64_t last, float* scratch);
  int64_t (*attention_scratch)(const Attention& a);

  // x [n, head_dim] as keys and values are stored, each of the n `stride` bytes from the next. See store.h.
  void (*store)(Cached format, int64_t head_dim, int64_t n, const float* x, int64_t stride, uint8_t* out);

  // Blocks of numbers to GGML's row form; false where a number is not finite. See quantize.h and quantize_256.h.
  bool (*quantize)(Format format, int64_t blocks, const float* x, uint8_t* out);

  // The limits that kernels are measured against; see limits.h.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  int64_t (*multiply_round)(Format format, int64_t rounds, float* sink);
};

// The levels that this build has and this processor runs, best first; the last is the portable one.
const Level* const* levels(int* count);

}  // namespace tpimpi

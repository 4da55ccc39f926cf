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
constexpr int kBlock = 32;      // weights that share a scale
constexpr int kLine = 64;       // bytes: one word of each row of a panel

enum class Format { f32, bf16, q8_0, q4_0, q4_1 };

// Functions that levels use are static: levels are compiled with different flags, and must not share code.
static constexpr bool quantized(Format format) { return format >= Format::q8_0; }

static constexpr int64_t divided_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Bytes of a block of quantized weights in GGML's row form.
static constexpr int64_t block_bytes(Format format) { return format == Format::q8_0 ? 34 : format == Format::q4_0 ? 18 : 20; }

// Bytes of a panel of `columns` columns.
static constexpr int64_t panel_bytes(Format format, int64_t columns) {
  const int64_t blocks = divided_up(columns, kBlock), pairs = divided_up(blocks, 2);
  switch (format) {
    case Format::f32: return columns * kLine;
    case Format::bf16: return divided_up(columns, 2) * kLine;
    case Format::q8_0: return (pairs + 8 * blocks) * kLine;
    case Format::q4_0: return (pairs + 4 * blocks) * kLine;
    case Format::q4_1: return (2 * pairs + 4 * blocks) * kLine;
  }
  return 0;
}

struct Matrix {
  Format format;
  int64_t rows, columns;
  const uint8_t* data;  // panel_bytes(format, columns) for each 16 rows
};

// Grouped-query attention of n query positions over a cache. Strides count elements.
struct Attention {
  int64_t n, heads, head_dim;
  int64_t start;               // position of the first query; keys 0 .. start + n - 1 are there
  int64_t window;              // a query sees so many positions, itself included; 0: all before it
  const float* q;              // [n, heads, head_dim]
  const void* k;               // [kv_heads, start + n, head_dim], f32 or f16, with kv_stride between heads
  const void* v;
  bool f16;
  int64_t kv_stride;
  const int64_t* q_to_kv;      // [heads]
  float* y;                    // [n, heads, head_dim]
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

  // y [n, heads, head_dim] = x rotated by the angles of cos, sin [n, head_dim / 2]; i pairs with i + head_dim / 2. y may be x.
  void (*rope)(int64_t n, int64_t heads, int64_t head_dim, const float* x, const float* cos, const float* sin, float* y);

  // y [size] = silu(gate) * up. y may be gate or up.
  void (*swiglu)(int64_t size, const float* gate, const float* up, float* y);

  // Items [first, last) of the n * heads pairs (position, head), item = head * n + position, of an attention.
  // `scratch` has attention_scratch(a) floats.
  void (*attention)(const Attention& a, int64_t first, int64_t last, float* scratch);
  int64_t (*attention_scratch)(const Attention& a);

  // Blocks of 32 numbers to GGML's row form; false where a number is not finite. See quantize.h.
  bool (*quantize)(Format format, int64_t blocks, const float* x, uint8_t* out);

  // The limits that kernels are measured against; see limits.h.
  uint64_t (*read)(const uint8_t* data, int64_t bytes);
  int64_t (*multiply_round)(Format format, int64_t rounds, float* sink);
};

// The levels that this build has and this processor runs, best first; the last is the portable one.
const Level* const* levels(int* count);

}  // namespace tpimpi

// What attention reads for one level: queries that go together, and a block of their keys and values, page by page.
#pragma once

#include "kernels.h"
#include "layer.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

constexpr int kKeys = 64;        // of a block: its keys and values stay in the first cache
constexpr int kParts = kKeys / kLeastPage + 2;  // of a block, each in a page of its own
constexpr int kMost = kLanes;    // queries that are taken together
constexpr float kNone = -3e38f;  // the greatest score before there is one: finite, so that no infinity is taken from another

// A query: where it comes from and goes to, the keys [first, last) that it sees, and its head's sink.
struct Query {
  const float* q;
  float* y;
  int64_t first, last;
  float sink;

  // The greatest score, and the sum of e^(score - greatest), before there is a key.
  float greatest() const { return sink < kNone ? kNone : sink; }
  float total() const { return sink <= kNone ? 0 : 1; }
};

// Queries of one sequence that read one KV head.
struct Group {
  Query query[kMost];
  int count = 0;
  int64_t first = 0, last = 0;  // the keys that any of them sees
  int64_t all_first = 0, all_last = 0;  // and that all of them see
  int64_t kv_head = 0;

  void add(const Query& added) {
    if (count == 0) {
      first = all_first = added.first;
      last = all_last = added.last;
    }
    if (added.first < first) first = added.first;
    if (added.last > last) last = added.last;
    if (added.first > all_first) all_first = added.first;
    if (added.last < all_last) all_last = added.last;
    query[count++] = added;
  }
};

// Blocks of keys begin at multiples of kKeys, and the first of a group's at a multiple of 16, whatever its queries see. Keys
// that a query does not see add zeros to its sums, which changes none.
inline int64_t first_key(const Group& group) { return group.first / kLanes * kLanes; }
inline int64_t keys_of_block(const Group& group, int64_t first) {
  const int64_t end = (first / kKeys + 1) * kKeys;
  return (end < group.last ? end : group.last) - first;
}

// Keys or values of one KV head at positions that follow each other in a page, in any format.
template <class S, Cached format>
struct Rows {
  const uint8_t* data;
  int64_t head_dim, row_bytes;

  const uint8_t* at(int64_t row) const { return data + row * row_bytes; }

  // Numbers [i, i + n) of a row; i is a multiple of 16, and n is 16, or less where the row ends.
  static typename S::F load_run(const uint8_t* row, int64_t i, int64_t n) {
    if constexpr (format == Cached::q8_0) {  // in blocks of 32: a scale (f16), and int8
      const uint8_t* block = row + i / kBlock * block_bytes(Format::q8_0);
      return S::mul(S::load_i8(block + 2 + i % kBlock), S::set_f16(block));
    } else if constexpr (format == Cached::f16) {
      return n == kLanes ? S::load_f16(row + i * 2) : S::load_f16_some(row + i * 2, n);
    } else {
      const float* p = reinterpret_cast<const float*>(row) + i;
      return n == kLanes ? S::load(p) : S::load_some(p, n);
    }
  }
};

// The keys and values of a block, in as many parts as it has pages.
template <class S, Cached format>
struct Block {
  int64_t first, keys;
  int parts = 0;
  struct Part {
    Rows<S, format> k, v;
    int64_t keys;
  } part[kParts];

  Block(const Attention& a, const int32_t* table, const Group& group, int64_t from) : first(from), keys(keys_of_block(group, from)) {
    const int64_t row_bytes = cached_bytes(format, a.kv.head_dim), head = group.kv_head * a.kv.head_stride;
    for (int64_t at = first; at < first + keys; ++parts) {
      const int64_t page = at / a.kv.page, in_page = at % a.kv.page, left = first + keys - at;
      const int64_t offset = table[page] * a.kv.page_stride + head + in_page * row_bytes;
      auto& p = part[parts];
      p.k = {static_cast<const uint8_t*>(a.k) + offset, a.kv.head_dim, row_bytes};
      p.v = {static_cast<const uint8_t*>(a.v) + offset, a.kv.head_dim, row_bytes};
      p.keys = left < a.kv.page - in_page ? left : a.kv.page - in_page;
      at += p.keys;
    }
  }

  // All keys, or values, as f32, [keys, head_dim]; in `scratch` unless they are that already.
  template <Rows<S, format> Part::*which>
  const float* widened(float* scratch) const {
    if (format == Cached::f32 && parts == 1) return reinterpret_cast<const float*>((part[0].*which).data);
    float* out = scratch;
    for (int p = 0; p < parts; ++p) {
      const Rows<S, format>& rows = part[p].*which;
      if constexpr (format == Cached::q8_0) {
        for (int64_t row = 0; row < part[p].keys; ++row, out += rows.head_dim)
          each_run(rows.head_dim, [&](int64_t i, int64_t n) { store_run<S>(out + i, rows.load_run(rows.at(row), i, n), n); });
      } else {
        const int64_t size = part[p].keys * rows.head_dim;
        each_run(size, [&](int64_t i, int64_t n) { S::store(out + i, rows.load_run(rows.data, i, n)); });
        out += size;
      }
    }
    return scratch;
  }
};

}  // namespace
}  // namespace tpimpi

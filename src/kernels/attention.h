// Grouped-query attention for one level: softmax(q k) v, a block of keys at a time (Milakov and Gimelshein 2018; Dao 2022).
//
// Queries that read the same KV head are taken together, so that keys and values are read from memory once for them. Two
// ways: for few queries (decoding) the 16 lanes run along head_dim; for many (prefill) each lane is a query, and elements of
// keys and values are broadcast to them. The second does 16 lanes' work for any number of queries, and needs no sums across
// lanes. Both add the same numbers in the same order (that of S::sums4, in blocks of keys that begin at fixed positions), so a
// query's result does not depend on those that are computed beside it.
#pragma once

#include "attention_few.h"
#include "attention_many.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

// From so many queries on, the second way is faster.
template <class S>
constexpr int kMany = S::queries > 1 ? 12 : 8;

template <class S>
int64_t attention_scratch(const Attention& a) {
  const int64_t head_dim = a.kv.head_dim, many = (2 * head_dim + kKeys) * kLanes + kKeys * head_dim + kLanes;
  const int64_t few = 2 * kMost * filled_up(head_dim) + S::queries * kScores;
  return (many > few ? many : few) + kLanes;  // and room to begin at a line
}

template <class S, Cached format>
void attention_of(const Attention& a, const Span& span, int64_t first, int64_t last, float* scratch) {
  const int64_t head_dim = a.kv.head_dim, filled = filled_up(head_dim), n = span.last - span.first;
  while (reinterpret_cast<uintptr_t>(scratch) % kLine) ++scratch;
  const ManyScratch many = {scratch, scratch + head_dim * kLanes, scratch + 2 * head_dim * kLanes,
                            scratch + (2 * head_dim + kKeys) * kLanes};
  const FewScratch few = {scratch, scratch + kMost * filled, scratch + 2 * kMost * filled};
  const int32_t* table = a.rows.table(span.first);
  for (int64_t item = first; item < last;) {
    Group group;
    group.kv_head = a.q_to_kv[item / n];
    for (; item < last && group.count < kMost && a.q_to_kv[item / n] == group.kv_head; ++item) {
      const int64_t head = item / n, row = span.first + item % n, end = a.rows.position[row] + 1;
      const int64_t at = (row * a.heads + head) * head_dim;
      group.add({a.q + at, a.y + at, a.window && end > a.window ? end - a.window : 0, end, a.sinks ? a.sinks[head] : kNone});
    }
    if (group.count < kMany<S>)
      attend_few<S, format>(a, table, group, few);
    else
      attend_many<S, format>(a, table, group, many);
  }
}

template <class S>
void attention(const Attention& a, const Span& span, int64_t first, int64_t last, float* scratch) {
  switch (a.kv.format) {
    case Cached::f32: return attention_of<S, Cached::f32>(a, span, first, last, scratch);
    case Cached::f16: return attention_of<S, Cached::f16>(a, span, first, last, scratch);
    case Cached::q8_0: return attention_of<S, Cached::q8_0>(a, span, first, last, scratch);
  }
}

}  // namespace
}  // namespace tpimpi

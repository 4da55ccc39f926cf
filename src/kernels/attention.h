// Grouped-query attention for one level: softmax(q k) v, a block of keys at a time (Milakov and Gimelshein 2018; Dao 2022).
//
// Queries that read the same KV head are taken together, so that keys and values are read from memory once for them. Two
// ways: for few queries (decoding) the 16 lanes run along head_dim; for many (prefill) each lane is a query, and elements of
// keys and values are broadcast to them. The second does 16 lanes' work for any number of queries, and needs no sums across
// lanes. Both add the same numbers in the same order (that of S::sums4, in blocks of keys that begin at fixed positions), so a
// query's result does not depend on those that are computed beside it.
#pragma once

#include <cmath>
#include <cstring>

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

// Many queries: lane t of everything is query t.

struct ManyScratch {
  float *q, *sums;  // [head_dim][16] each
  float* scores;    // [kKeys][16]
  float* rows;      // [kKeys][head_dim], and room for 16 more
};

// scores [keys][16] of R keys, head_dim apart: every 16th element makes one of 16 sums, which are added as S::sums4 adds lanes.
template <class S, int R>
inline void many_scores(const float* q, const float* k, int64_t head_dim, float* scores) {
  using F = typename S::F;
  const auto lane = [&](int first, F* sum) {
    for (int r = 0; r < R; ++r) sum[r] = S::zero();
    for (int64_t i = first; i < head_dim; i += kLanes) {
      const auto v = S::load(q + i * kLanes);
      for (int r = 0; r < R; ++r) sum[r] = S::fma(v, S::set(k[r * head_dim + i]), sum[r]);
    }
  };
  const auto add = [](F* sum, const F* more) {
    for (int r = 0; r < R; ++r) sum[r] = S::add(sum[r], more[r]);
  };
  const auto quarter = [&](int first, F* sum) {
    F half[R], other[R];
    lane(first, sum);
    lane(first + 8, other);
    add(sum, other);
    lane(first + 4, half);
    lane(first + 12, other);
    add(half, other);
    add(sum, half);
  };
  F sum[R], last[R], other[R];
  quarter(0, sum);
  quarter(1, other);
  add(sum, other);
  quarter(2, last);
  quarter(3, other);
  add(last, other);
  add(sum, last);
  for (int r = 0; r < R; ++r) S::store(scores + r * kLanes, sum[r]);
}

// The sum of weights [keys][16] of each query, each 16th key's first.
template <class S>
inline typename S::F many_total(const float* weights, int64_t keys) {
  typename S::F sum[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    sum[lane] = S::zero();
    for (int64_t key = lane; key < keys; key += kLanes) sum[lane] = S::add(sum[lane], S::load(weights + key * kLanes));
  }
  for (int lane = 0; lane < 8; ++lane) sum[lane] = S::add(sum[lane], sum[lane + 8]);
  for (int lane = 0; lane < 4; ++lane) sum[lane] = S::add(sum[lane], sum[lane + 4]);
  return S::add(S::add(sum[0], sum[1]), S::add(sum[2], sum[3]));
}

// sums [R][16] = themselves times `rescale` + weights [keys][16] times R columns of v, whose rows are head_dim apart.
template <class S, int R>
inline void many_sums(const float* weights, const float* v, int64_t keys, int64_t head_dim, typename S::F rescale, float* sums) {
  typename S::F sum[R];
  for (int r = 0; r < R; ++r) sum[r] = S::mul(S::load(sums + r * kLanes), rescale);
  for (int64_t key = 0; key < keys; ++key) {
    const auto w = S::load(weights + key * kLanes);
    for (int r = 0; r < R; ++r) sum[r] = S::fma(w, S::set(v[key * head_dim + r]), sum[r]);
  }
  for (int r = 0; r < R; ++r) S::store(sums + r * kLanes, sum[r]);
}

template <class S, Cached format>
void attend_many(const Attention& a, const int32_t* table, const Group& group, const ManyScratch& scratch) {
  using F = typename S::F;
  using Of = Block<S, format>;
  constexpr int R = S::parts;
  const int64_t head_dim = a.kv.head_dim;
  for (int64_t i = 0; i < head_dim; ++i)
    for (int t = 0; t < kLanes; ++t)
      scratch.q[i * kLanes + t] = t < group.count ? group.query[t].q[i] * a.scale : 0;
  std::memset(scratch.sums, 0, size_t(head_dim) * kLanes * sizeof(float));

  float greatests[kLanes] = {}, totals[kLanes] = {};
  for (int t = 0; t < group.count; ++t) {
    greatests[t] = group.query[t].greatest();
    totals[t] = group.query[t].total();
  }
  F greatest = S::load(greatests), total = S::load(totals);
  for (int64_t first = first_key(group), keys; first < group.last; first += keys) {
    const Of of(a, table, group, first);
    keys = of.keys;
    const float* block = of.template widened<&Of::Part::k>(scratch.rows);
    int64_t key = 0;
    for (; key + R <= keys; key += R)
      many_scores<S, R>(scratch.q, block + key * head_dim, head_dim, scratch.scores + key * kLanes);
    for (; key < keys; ++key)
      many_scores<S, 1>(scratch.q, block + key * head_dim, head_dim, scratch.scores + key * kLanes);
    if (a.softcap > 0)
      for (float* score = scratch.scores; score < scratch.scores + keys * kLanes; score += kLanes)
        S::store(score, capped<S>(S::load(score), a.softcap));
    if (first < group.all_first || first + keys > group.all_last)
      for (int t = 0; t < group.count; ++t)
        for (key = 0; key < keys; ++key)
          if (first + key < group.query[t].first || first + key >= group.query[t].last)
            scratch.scores[key * kLanes + t] = -INFINITY;

    F greater = greatest;
    for (key = 0; key < keys; ++key) greater = S::max(greater, S::load(scratch.scores + key * kLanes));
    const F rescale = exponential<S>(S::sub(greatest, greater));
    greatest = greater;
    for (key = 0; key < keys; ++key)
      S::store(scratch.scores + key * kLanes, exponential<S>(S::sub(S::load(scratch.scores + key * kLanes), greatest)));
    total = S::add(S::mul(total, rescale), many_total<S>(scratch.scores, keys));

    block = of.template widened<&Of::Part::v>(scratch.rows);
    int64_t i = 0;
    for (; i + R <= head_dim; i += R)
      many_sums<S, R>(scratch.scores, block + i, keys, head_dim, rescale, scratch.sums + i * kLanes);
    for (; i < head_dim; ++i)
      many_sums<S, 1>(scratch.scores, block + i, keys, head_dim, rescale, scratch.sums + i * kLanes);
  }

  S::store(totals, total);
  for (int t = 0; t < group.count; ++t)
    for (int64_t i = 0; i < head_dim; ++i) group.query[t].y[i] = scratch.sums[i * kLanes + t] / totals[t];
}

// Few queries: lanes run along head_dim, which is filled up to whole runs of 16.

constexpr int kScores = kKeys + 4;

struct FewScratch {
  float *q, *sums;  // [kMost][filled] each; filled is head_dim up to a multiple of 16
  float* scores;    // [S::queries][kScores]
};

// Of `Q` queries, q [Q][filled], the scores [Q][kScores] of N keys (N is 4 or 1; 4 are written).
template <class S, Cached format, int Q, int N>
inline void few_scores(const Rows<S, format>& k, int64_t row, const float* q, int64_t filled, float* scores) {
  typename S::F sum[Q][4];
  for (int t = 0; t < Q; ++t)
    for (int r = 0; r < 4; ++r) sum[t][r] = S::zero();
  auto add = [&](int r, int64_t i, int64_t lanes) {
    const auto key = k.load_run(k.at(row + r), i, lanes);
    for (int t = 0; t < Q; ++t) sum[t][r] = S::fma(key, S::load(q + t * filled + i), sum[t][r]);
  };
  if constexpr (Q == 1) {  // row after row, as the hardware fetches memory best
    for (int r = 0; r < N; ++r) each_run(k.head_dim, [&](int64_t i, int64_t lanes) { add(r, i, lanes); });
  } else {  // the rows side by side, so that each part of q is loaded once for them
    each_run(k.head_dim, [&](int64_t i, int64_t lanes) {
      for (int r = 0; r < N; ++r) add(r, i, lanes);
    });
  }
  for (int t = 0; t < Q; ++t) S::sums4(sum[t], scores + t * kScores);
}

// sums [Q][filled] from column i, C runs of 16 columns = themselves times rescale [Q] + weights [Q][kScores] times the block's
// values. Where C is 1, the run may have fewer lanes.
template <class S, Cached format, int Q, int C>
inline void few_sums(const Block<S, format>& block, int64_t i, int64_t lanes, const float* weights, const float* rescale,
                     int64_t filled, float* sums) {
  typename S::F sum[Q][C];
  for (int t = 0; t < Q; ++t)
    for (int c = 0; c < C; ++c) sum[t][c] = S::mul(S::load(sums + t * filled + i + c * kLanes), S::set(rescale[t]));
  for (int p = 0; p < block.parts; ++p) {
    const auto& v = block.part[p].v;
    const uint8_t* row = v.data;
    for (int64_t key = 0; key < block.part[p].keys; ++key, ++weights, row += v.row_bytes) {
      // Part of a row after part of a row is no pattern that the hardware fetches ahead: fetch the others with the first.
      if (i == 0)
        for (const uint8_t *other = row + cached_bytes(format, C * kLanes), *end = row + v.row_bytes; other < end; other += kLine)
          S::prefetch(other);
      for (int c = 0; c < C; ++c) {
        const auto value = v.load_run(row, i + c * kLanes, C > 1 ? kLanes : lanes);
        for (int t = 0; t < Q; ++t) sum[t][c] = S::fma(S::set(weights[t * kScores]), value, sum[t][c]);
      }
    }
  }
  for (int t = 0; t < Q; ++t)
    for (int c = 0; c < C; ++c) S::store(sums + t * filled + i + c * kLanes, sum[t][c]);
}

// Queries [t, t + Q) of a group and a block of keys; `greatest` and `total` [kMost] go from block to block.
template <class S, Cached format, int Q>
void few_block(const Block<S, format>& block, const Group& group, int t, int64_t filled, float softcap, const FewScratch& scratch,
               float* greatest, float* total) {
  const float* q = scratch.q + t * filled;
  const int64_t first = block.first, keys = block.keys, head_dim = block.part[0].k.head_dim;
  int64_t key = 0;
  for (int p = 0; p < block.parts; key += block.part[p++].keys) {
    float* scores = scratch.scores + key;
    int64_t row = 0;
    for (; row + 4 <= block.part[p].keys; row += 4) few_scores<S, format, Q, 4>(block.part[p].k, row, q, filled, scores + row);
    for (; row < block.part[p].keys; ++row) few_scores<S, format, Q, 1>(block.part[p].k, row, q, filled, scores + row);
  }

  float rescale[Q];
  for (int r = 0; r < Q; ++r) {
    float* scores = scratch.scores + r * kScores;
    const Query& query = group.query[t + r];
    if (softcap > 0)
      each_run(keys, [&](int64_t i, int64_t n) { store_run<S>(scores + i, capped<S>(load_run<S>(scores + i, n), softcap), n); });
    // Keys that are not there, or not seen; all up to whole runs of 16.
    const int64_t seen = query.first > first ? query.first - first : 0;
    const int64_t end = query.last - first < keys ? query.last - first : keys;
    for (key = 0; key < seen && key < keys; ++key) scores[key] = -INFINITY;
    for (key = end > 0 ? end : 0; key < keys || key % kLanes; ++key) scores[key] = -INFINITY;

    auto greater = S::set(greatest[t + r]);
    for (key = 0; key < keys; key += kLanes) greater = S::max(greater, S::load(scores + key));
    float lanes[kLanes], most = kNone;
    S::store(lanes, greater);
    for (float lane : lanes) most = lane > most || lane != lane ? lane : most;
    const auto now = S::set(most);
    S::store(lanes, exponential<S>(S::sub(S::set(greatest[t + r]), now)));
    rescale[r] = lanes[0];
    greatest[t + r] = most;
    typename S::F sum[4] = {S::zero(), S::zero(), S::zero(), S::zero()};
    for (key = 0; key < keys; key += kLanes) {
      const auto weight = exponential<S>(S::sub(S::load(scores + key), now));
      S::store(scores + key, weight);
      sum[0] = S::add(sum[0], weight);
    }
    float sums[4];
    S::sums4(sum, sums);
    total[t + r] = total[t + r] * rescale[r] + sums[0];
  }

  constexpr int C = S::together / Q >= 8 ? 8 : 4;
  float* sums = scratch.sums + t * filled;
  int64_t i = 0;
  for (; i + C * kLanes <= head_dim; i += C * kLanes)
    few_sums<S, format, Q, C>(block, i, kLanes, scratch.scores, rescale, filled, sums);
  if (C > 4 && i + 4 * kLanes <= head_dim) {
    few_sums<S, format, Q, 4>(block, i, kLanes, scratch.scores, rescale, filled, sums);
    i += 4 * kLanes;
  }
  for (; i + kLanes <= head_dim; i += kLanes) few_sums<S, format, Q, 1>(block, i, kLanes, scratch.scores, rescale, filled, sums);
  if (i < head_dim) few_sums<S, format, Q, 1>(block, i, head_dim - i, scratch.scores, rescale, filled, sums);
}

constexpr int64_t filled_up(int64_t size) { return divided_up(size, kLanes) * kLanes; }

template <class S, Cached format>
void attend_few(const Attention& a, const int32_t* table, const Group& group, const FewScratch& scratch) {
  using Few = void (*)(const Block<S, format>&, const Group&, int, int64_t, float, const FewScratch&, float*, float*);
  const int64_t head_dim = a.kv.head_dim, filled = filled_up(head_dim);
  float greatest[kMost], total[kMost];
  for (int t = 0; t < group.count; ++t) {
    for (int64_t i = 0; i < filled; ++i) {
      scratch.q[t * filled + i] = i < head_dim ? group.query[t].q[i] * a.scale : 0;
      scratch.sums[t * filled + i] = 0;
    }
    greatest[t] = group.query[t].greatest();
    total[t] = group.query[t].total();
  }
  static constexpr Few few[] = {few_block<S, format, 1>, few_block<S, format, S::queries >= 2 ? 2 : 1>,
                                few_block<S, format, S::queries >= 3 ? 3 : 1>, few_block<S, format, S::queries >= 4 ? 4 : 1>};
  for (int64_t first = first_key(group), keys; first < group.last; first += keys) {
    const Block<S, format> block(a, table, group, first);
    keys = block.keys;
    for (int t = 0, n; t < group.count; t += n) {
      n = group.count - t < S::queries ? group.count - t : S::queries;
      few[n - 1](block, group, t, filled, a.softcap, scratch, greatest, total);
    }
  }
  for (int t = 0; t < group.count; ++t)
    for (int64_t i = 0; i < head_dim; ++i) group.query[t].y[i] = scratch.sums[t * filled + i] / total[t];
}

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

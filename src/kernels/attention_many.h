// Attention of many queries (prefill): lane t of everything is query t.
#pragma once

#include <cmath>
#include <cstring>

#include "attention_block.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

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

}  // namespace
}  // namespace tpimpi

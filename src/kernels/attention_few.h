// Attention of few queries (decoding): lanes run along head_dim, which is filled up to whole runs of 16.
#pragma once

#include <cmath>

#include "attention_block.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

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

}  // namespace
}  // namespace tpimpi

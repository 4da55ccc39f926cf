// The experts of a block at once: each stage is one job of the threads over all experts, not one for each matrix.
#include <algorithm>
#include <cstring>
#include <utility>

#include "session.h"

namespace tpimpi {
namespace {

// What lies between the stages of a run of experts has about so many bytes at most, unless one expert has more.
constexpr int64_t kRunBytes = 4 << 20;
constexpr int64_t kPrepareCost = 8;  // operations for a number

bool has_columns(const Expert& e) { return e.gate.rows > 0; }

// Whether two experts multiply the same vectors, in the same form.
bool same_input(const Expert& a, const Expert& b) {
  return a.gate.format == b.gate.format && a.up.format == b.up.format && a.count == b.count &&
         std::memcmp(a.rows, b.rows, size_t(a.count) * sizeof(int32_t)) == 0;
}

// One expert of a run, and where its numbers begin in the run's memory, in bytes.
struct Place {
  const Expert* expert;
  int64_t numbers = 0;           // its vectors of x; later gate and then up [count, columns], of which the activation replaces gate
  int64_t gate_x = 0, up_x = 0;  // x as `prepare` makes it
  int64_t gated = 0;             // the activation, as `prepare` makes it
  bool prepares = false;         // whether x is not there from the expert before
};

}  // namespace

void Session::experts(const std::vector<Expert>& experts, const Activation& activation, int64_t hidden, const float* x, float* out) {
  std::vector<Place> run;
  std::vector<Stretch> stretches;
  for (size_t next = 0; next < experts.size();) {
    run.clear();
    int64_t bytes = 0, most = 0;
    const auto room = [&](int64_t size) { return std::exchange(bytes, bytes + divided_up(size, kLine) * kLine); };
    while (next < experts.size() && (run.empty() || bytes < kRunBytes)) {
      const Expert& e = experts[next++];
      if (e.count == 0) continue;
      Place place{&e};
      if (has_columns(e)) {
        const auto prepared = [&](const Matrix& w) { return room(level_.prepared_words(w.format, w.columns) * 4 * e.count); };
        const Place* before = run.empty() || !has_columns(*run.back().expert) ? nullptr : &run.back();
        place.numbers = room(e.count * std::max(hidden, 2 * e.gate.rows) * 4);
        place.prepares = !before || !same_input(*before->expert, e);
        place.gate_x = place.prepares ? prepared(e.gate) : before->gate_x;
        place.up_x = !place.prepares ? before->up_x : e.up.format == e.gate.format ? place.gate_x : prepared(e.up);
        place.gated = prepared(e.down);
      }
      run.push_back(place);
      most = std::max(most, e.count);
    }
    const int64_t results = room(most * hidden * 4);
    uint8_t* const memory = scratch(bytes);
    const auto numbers = [&](const Place& place) { return reinterpret_cast<float*>(memory + place.numbers); };
    const auto stage = [&](int64_t each, auto stretch, auto work) {
      stretches.clear();
      for (size_t i = 0; i < run.size() * size_t(each); ++i) stretches.push_back(stretch(run[i / size_t(each)]));
      deal_stretches(stretches, work);
    };

    stage(1, [&](const Place& p) { return Stretch{p.prepares, p.expert->count * hidden * kPrepareCost}; },
          [&](int, size_t i, int64_t, int64_t) {
            const Expert& e = *run[i].expert;
            float* const own = numbers(run[i]);
            for (int64_t k = 0; k < e.count; ++k) std::memcpy(own + k * hidden, x + e.rows[k] * hidden, size_t(hidden) * 4);
            level_.prepare(e.gate.format, hidden, e.count, own, memory + run[i].gate_x);
            if (run[i].up_x != run[i].gate_x) level_.prepare(e.up.format, hidden, e.count, own, memory + run[i].up_x);
          });

    stage(2, [&](const Place& p) {
            return Stretch{divided_up(p.expert->gate.rows, kPanelRows), kPanelRows * hidden * p.expert->count};
          },
          [&](int, size_t i, int64_t first, int64_t last) {
            const Place& place = run[i / 2];
            const Expert& e = *place.expert;
            float* const gate = numbers(place);
            if (i % 2 == 0)
              level_.multiply(e.gate, first, last, e.count, memory + place.gate_x, e.gate_bias, gate);
            else
              level_.multiply(e.up, first, last, e.count, memory + place.up_x, e.up_bias, gate + e.count * e.gate.rows);
          });

    stage(1, [&](const Place& p) { return Stretch{has_columns(*p.expert), p.expert->count * p.expert->gate.rows * 2 * kPrepareCost}; },
          [&](int, size_t i, int64_t, int64_t) {
            const Expert& e = *run[i].expert;
            const int64_t size = e.count * e.gate.rows;
            float *const gate = numbers(run[i]), *const up = gate + size;
            switch (activation.kind) {
              case Activation::Kind::silu: level_.swiglu(size, gate, up, gate); break;
              case Activation::Kind::gelu_tanh: level_.geglu(size, gate, up, gate); break;
              case Activation::Kind::clamped_silu: level_.clamped_swiglu(size, activation.limit, gate, up, gate); break;
            }
            level_.prepare(e.down.format, e.gate.rows, e.count, gate, memory + run[i].gated);
          });

    // A thread has the same rows of all experts, and adds them in their order.
    int64_t work = 0;
    for (const Place& place : run) work += hidden * (place.expert->gate.rows + 1) * place.expert->count;
    const int64_t panels = divided_up(hidden, kPanelRows);
    deal(parts(panels, work), panels, [&](int, int64_t first, int64_t last) {
      const int64_t begin = first * kPanelRows, end = std::min(last * kPanelRows, hidden);
      float* const result = reinterpret_cast<float*>(memory + results);
      for (const Place& place : run) {
        const Expert& e = *place.expert;
        if (has_columns(e))
          level_.multiply(e.down, first, last, e.count, memory + place.gated, e.down_bias, result);
        else if (!e.down_bias)
          continue;
        for (int64_t k = 0; k < e.count; ++k) {
          const float* const from = has_columns(e) ? result + k * hidden : e.down_bias;
          float* const to = out + e.rows[k] * hidden;
          for (int64_t i = begin; i < end; ++i) to[i] += e.weights[k] * from[i];
        }
      }
    });
  }
}

}  // namespace tpimpi

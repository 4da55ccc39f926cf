// The table of one level, made from its SIMD layer.
//
// A level's table is the only thing that its object file shows to the linker, and is a constant: nothing of a level runs
// before it is chosen.
#pragma once

#include "attention.h"
#include "kernels.h"
#include "layer.h"
#include "limits.h"
#include "linear.h"
#include "quantize_256.h"
#include "router_logits.h"
#include "store.h"

namespace tpimpi {
namespace {  // each level is compiled with flags of its own: nothing of it may be shared with another

template <class S>
constexpr Level level_of() {
  return {.name = S::name,
          .prepared_words = prepared_words<S>,
          .prepare = prepare<S>,
          .multiply = multiply<S>,
          .rms_norm = rms_norm<S>,
          .fixed_rms_norm = fixed_rms_norm,
          .router_logits = router_logits,
          .rope = rope<S>,
          .swiglu = swiglu<S>,
          .geglu = geglu<S>,
          .clamped_swiglu = clamped_swiglu<S>,
          .attention = attention<S>,
          .attention_scratch = attention_scratch<S>,
          .store = store,
          .quantize = quantize_blocks,
          .read = read,
          .multiply_round = multiply_round<S>};
}

}  // namespace

// Those that are built for this processor's architecture.
extern const Level kAvx512Bf16, kAvx512, kAvxVnni, kAvx2, kNeonDot, kNeon, kPortable;

}  // namespace tpimpi

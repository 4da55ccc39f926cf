// Flags: -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vnni -mavx512bf16 -mavx2 -mfma -mf16c -mtune=znver3 -ffp-contract=off
#include "simd_avx512.h"

#include "level.h"

namespace tpimpi {

constinit const Level kAvx512Bf16 = level_of<Avx512>();

}  // namespace tpimpi

// Flags: -mavxvnni -mavx2 -mfma -mf16c -mtune=znver3 -ffp-contract=off
#include "simd_avx2.h"

#include "level.h"

namespace tpimpi {

constinit const Level kAvxVnni = level_of<Avx2>();

}  // namespace tpimpi

// Flags: -ffp-contract=off (AArch64 has NEON)
#include "simd_neon.h"

#include "level.h"

namespace tpimpi {

constinit const Level kNeon = level_of<Neon>();

}  // namespace tpimpi

// Flags: -march=armv8.2-a+dotprod -ffp-contract=off
#include "simd_neon.h"

#include "level.h"

namespace tpimpi {

constinit const Level kNeonDot = level_of<Neon>();

}  // namespace tpimpi

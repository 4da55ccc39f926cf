// Flags: -ffp-contract=off
#include "simd_portable.h"

#include "level.h"

namespace tpimpi {

constinit const Level kPortable = level_of<Portable>();

}  // namespace tpimpi

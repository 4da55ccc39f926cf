// The choice of a level by what this processor can do.
#include <cstddef>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#if defined(__aarch64__) && defined(__linux__)
#include <asm/hwcap.h>
#include <sys/auxv.h>
#endif

namespace tpimpi {

extern const Level kAvx512Bf16, kAvx512, kAvxVnni, kAvx2, kNeonDot, kNeon, kPortable;

namespace {

struct Found {
  const Level* levels[5];
  int count = 0;

  Found() {
#if defined(__x86_64__)
    __builtin_cpu_init();
    unsigned a, b, c = 0, d;
    const bool f16c = __get_cpuid(1, &a, &b, &c, &d) && c & bit_F16C;  // clang's __builtin_cpu_supports does not know it
    const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && f16c;
    [[maybe_unused]] const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                        __builtin_cpu_supports("avx512vnni");
#if defined(TPIMPI_HAS_avx512bf16)
    if (avx512 && __builtin_cpu_supports("avx512bf16")) add(kAvx512Bf16);
#endif
#if defined(TPIMPI_HAS_avx512)
    if (avx512) add(kAvx512);
#endif
#if defined(TPIMPI_HAS_avxvnni)
    constexpr unsigned kAvxVnniBit = 1 << 4;  // of eax, leaf 7, subleaf 1; not every compiler knows its name
    if (avx2 && __get_cpuid_count(7, 1, &a, &b, &c, &d) && a & kAvxVnniBit) add(kAvxVnni);
#endif
#if defined(TPIMPI_HAS_avx2)
    if (avx2) add(kAvx2);
#endif
#elif defined(__aarch64__)
#if defined(__APPLE__)
    add(kNeonDot);
#elif defined(__linux__)
    if (getauxval(AT_HWCAP) & HWCAP_ASIMDDP) add(kNeonDot);
#endif
    add(kNeon);
#endif
    add(kPortable);
  }

  void add(const Level& level) { levels[count++] = &level; }
};

}  // namespace

const Level* const* levels(int* count) {
  static const Found found;
  *count = found.count;
  return found.levels;
}

}  // namespace tpimpi

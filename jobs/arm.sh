#!/usr/bin/env bash
# Compiles the kernels for 64-bit Arm (in build/arm) and runs their tests in an emulator. Where the cross compiler or the emulator is
# not there and cannot be installed, it says so in a line that begins "arm: not run", and succeeds.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup test

missing() {
  command -v aarch64-linux-gnu-g++ >/dev/null || echo g++-aarch64-linux-gnu
  command -v qemu-aarch64 >/dev/null || echo qemu-user
}

if [ "$(uname -m)" = aarch64 ]; then
  echo "arm: not run: this machine is an Arm, so jobs/test.sh tests these kernels" >&2
  exit 0
fi
mapfile -t packages < <(missing)
if [ "${#packages[@]}" != 0 ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "arm: installing ${packages[*]}" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${packages[@]}"; } >&2 || true
  mapfile -t packages < <(missing)
fi
if [ "${#packages[@]}" != 0 ]; then
  echo "arm: not run: to test the Arm kernels, install (Debian's names) ${packages[*]}" >&2
  exit 0
fi

folder="$root/build/arm"
# Linked statically, so that the emulator needs no Arm libraries.
mkdir -p build
cmake -S . -B "$folder" -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
  -DCMAKE_CXX_COMPILER=aarch64-linux-gnu-g++ -DCMAKE_EXE_LINKER_FLAGS=-static -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
  -DTPIMPI_EXTENSION=OFF -DTPIMPI_CASES=ON -DTPIMPI_REQUIRED=ON >"$folder.log" || {
  cat "$folder.log" >&2
  exit 1
}
part "arm: building" cmake --build "$folder"
TPIMPI_CASES="qemu-aarch64 '$folder/cases'" part "arm: tests" python -m pytest -p no:cacheprovider tests/compute/test_kernels.py

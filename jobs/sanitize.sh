#!/usr/bin/env bash
# Runs the tests of the kernels, alone and from Python, over a build with the address and undefined-behaviour sanitizers of g++
# (in build/sanitize), and fails where one reports an error.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup test

folder="$root/build/sanitize"
compiler="${CXX:-g++}"
# At -O1 a report names the line where the error is. Warnings, which nobody sees when pip builds, count as errors here.
mkdir -p build
levels="$(python -c 'import tpimpi._native; print(";".join(tpimpi._native.levels()).replace("-", ""))')" # those that can run here
cmake -S . -B "$folder" -G Ninja -DCMAKE_CXX_COMPILER="$compiler" -DCMAKE_BUILD_TYPE=Sanitize -DCMAKE_CXX_FLAGS_SANITIZE=-O1 \
  -DTPIMPI_LEVELS="$levels" -DTPIMPI_SANITIZE=ON -DTPIMPI_CASES=ON -DTPIMPI_REQUIRED=ON -DCMAKE_COMPILE_WARNING_AS_ERROR=ON \
  -DPython_EXECUTABLE="$(command -v python)" -Dnanobind_DIR="$(python -m nanobind --cmake_dir)" >"$folder.log" || {
  cat "$folder.log" >&2
  exit 1
}
part "sanitize: building" cmake --build "$folder"

# An environment that has the packages of .venv, but this build of tpimpi: the modules of src and the sanitized extension.
rm -rf "$folder/venv"
python -m venv --without-pip "$folder/venv"
packages() { "$1" -c 'import sysconfig; print(sysconfig.get_path("platlib"))'; }
python="$folder/venv/bin/python"
site="$(packages "$python")"
packages python >"$site/checkout.pth"
cmake --install "$folder" --prefix "$site" >"$folder.log"
ln -s "$root"/src/tpimpi/* "$site/tpimpi/"

# Python itself is not sanitized, so the sanitizer's library has to be there before it, and leaks of Python's are no matter.
sanitizer="$("$compiler" -print-file-name=libasan.so) $("$compiler" -print-file-name=libstdc++.so)"
run=(env LD_PRELOAD="$sanitizer" PYTHONMALLOC=malloc TPIMPI_CASES="'$folder/cases'"
  ASAN_OPTIONS=detect_leaks=0:detect_stack_use_after_return=1 UBSAN_OPTIONS=print_stacktrace=1 "$python")
"${run[@]}" -c "import sys, tpimpi._native as built; sys.exit(not built.__file__.startswith(sys.argv[1]))" "$folder" || {
  echo "sanitize: the sanitized extension cannot be imported; see $folder" >&2
  exit 1
}
# Pytest would else swallow the report of a process that ends. Two at a time, as in jobs/test.sh.
part "sanitize: tests" "${run[@]}" -m pytest -n 2 --capture=sys -p no:cacheprovider tests/compute/test_kernels.py tests/compute/test_native.py \
  tests/compute/test_native_hostile.py tests/star/test_ciphers.py

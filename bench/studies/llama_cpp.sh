#!/usr/bin/env bash
# Builds llama.cpp's llama-bench and llama-quantize from the source package of llama-cpp-python, into DIR/llama.cpp/bin:
#   bash bench/studies/llama_cpp.sh DIR
# Needs g++; takes about ten minutes on two cores. The version is fixed, so that figures can be compared.
set -euo pipefail
version=0.3.36
out="$(mkdir -p "${1:?give a folder to build in}" && cd "$1" && pwd)"
sdist="$out/llama_cpp_python-$version.tar.gz"
[ -f "$sdist" ] || python3 -m pip download --quiet --no-deps --no-binary :all: -d "$out" "llama-cpp-python==$version"
mkdir -p "$out/source"
tar -xzf "$sdist" --strip-components 1 -C "$out/source"
cmake=cmake
command -v cmake >/dev/null || { python3 -m venv "$out/venv" && "$out/venv/bin/pip" install --quiet cmake && cmake="$out/venv/bin/cmake"; }
"$cmake" -S "$out/source/vendor/llama.cpp" -B "$out/llama.cpp" -DCMAKE_BUILD_TYPE=Release -DGGML_NATIVE=ON \
  -DLLAMA_CURL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=OFF
"$cmake" --build "$out/llama.cpp" --parallel "$(nproc)" --target llama-bench llama-quantize

#!/usr/bin/env bash
# Builds llama.cpp's llama-bench, llama-batched-bench, llama-server, llama-perplexity, llama-quantize and ggml-rpc-server from the
# source package of llama-cpp-python, into DIR/llama.cpp/bin:
#   bash bench/studies/llama_cpp.sh DIR [native|avx2|avx512]
# native (the default) is for this processor; the others are for any that has these instructions, and use no AMX.
# Needs g++; takes about ten minutes on two cores. The version is fixed, so that figures can be compared.
set -euo pipefail
version=0.3.36
out="$(mkdir -p "${1:?give a folder to build in}" && cd "$1" && pwd)"
avx2=(-DGGML_NATIVE=OFF -DGGML_AVX2=ON -DGGML_FMA=ON -DGGML_F16C=ON -DGGML_BMI2=ON)
case "${2:-native}" in
  native) level=(-DGGML_NATIVE=ON) ;;
  avx2) level=("${avx2[@]}") ;;
  avx512) level=("${avx2[@]}" -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON -DGGML_AMX_TILE=OFF) ;;
  *) echo "llama_cpp.sh: no level $2; give native, avx2 or avx512" >&2 && exit 2 ;;
esac
sdist="$out/llama_cpp_python-$version.tar.gz"
[ -f "$sdist" ] || python3 -m pip download --quiet --no-deps --no-binary llama-cpp-python -d "$out" "llama-cpp-python==$version"
mkdir -p "$out/source"
tar -xzf "$sdist" --strip-components 1 -C "$out/source"
cmake=cmake
command -v cmake >/dev/null || { python3 -m venv "$out/venv" && "$out/venv/bin/pip" install --quiet cmake && cmake="$out/venv/bin/cmake"; }
"$cmake" -S "$out/source/vendor/llama.cpp" -B "$out/llama.cpp" -DCMAKE_BUILD_TYPE=Release "${level[@]}" -DGGML_RPC=ON \
  -DLLAMA_CURL=OFF -DLLAMA_OPENSSL=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF -DLLAMA_BUILD_SERVER=ON
"$cmake" --build "$out/llama.cpp" --parallel "$(nproc)" --target \
  llama-bench llama-batched-bench llama-server llama-perplexity llama-quantize ggml-rpc-server

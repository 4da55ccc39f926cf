#!/usr/bin/env bash
# Puts the text that docs/measurements.md measures perplexity on into a folder (default: text), as alice29.txt, and says where it is.
#
# It is Lewis Carroll's Alice's Adventures in Wonderland (public domain), as the sources of PyPI's package brotli carry it.
set -euo pipefail

version=1.2.1
archive_sha256=02b2f7b5a83485efe448a44ddf7983def05c3bb1dcf917d4f7154070260e13de
text_sha256=7467306ee0feed4971260f3c87421154a05be571d944e9cb021a5713700c38f0

folder="${1:-text}"
text="$folder/alice29.txt"

matches() { # matches FILE SHA256
  [ -f "$1" ] && echo "$2  $1" | sha256sum --check --status
}

if ! matches "$text" "$text_sha256"; then
  mkdir -p "$folder"
  loaded="$(mktemp -d)"
  trap 'rm -rf "$loaded"' EXIT
  python3 -m pip download --quiet --disable-pip-version-check --no-deps --no-binary brotli --dest "$loaded" "brotli==$version"
  archive="$loaded/brotli-$version.tar.gz"
  matches "$archive" "$archive_sha256" || {
    echo "text: brotli-$version.tar.gz from PyPI has not the sha256 $archive_sha256; do not use it" >&2
    exit 1
  }
  tar -xzf "$archive" -C "$loaded" "brotli-$version/tests/testdata/alice29.txt"
  mv "$loaded/brotli-$version/tests/testdata/alice29.txt" "$text"
  matches "$text" "$text_sha256" || {
    echo "text: $text has not the sha256 $text_sha256; do not use it" >&2
    exit 1
  }
fi
echo "$text"

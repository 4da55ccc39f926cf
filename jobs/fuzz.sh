#!/usr/bin/env bash
# Fuzzes all that reads what others write: files of models, slices, sessions, hostfiles, notes between ranks, requests (tests/fuzz).
#
#   bash jobs/fuzz.sh                       an hour, shared among the targets
#   bash jobs/fuzz.sh --minutes 10          another time
#   bash jobs/fuzz.sh --target gguf         one target; --engine structure: without atheris
#
# It goes on with the inputs of earlier times, in build/fuzz/corpus. An input that breaks something is in build/fuzz/found, and the
# script fails: mend that, and move the input to tests/fuzz/finds/TARGET, where it is a test.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup test
if ! python -c 'import atheris' 2>/dev/null; then # it has wheels for some systems and Pythons only
  python -m pip install --quiet --disable-pip-version-check --only-binary :all: --constraint constraints.txt atheris 2>/dev/null ||
    echo "fuzz: atheris cannot be installed here; inputs are changed by structure alone, not by coverage" >&2
fi
exec nice -n 19 python -m tests.fuzz "$@"

#!/usr/bin/env bash
# Sets up and runs the checks and the tests (about 40 minutes on two cores): once under Open MPI, then what needs MPI again under MPICH.
# Arguments go to pytest, which is then all that is run: bash jobs/test.sh tests/star/test_star.py -k hub
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup test
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
# Some tests need programs of the system, and are skipped without: the job for Slurm, and doctor over a real sshd. On a machine of the
# CI they are installed for that, elsewhere that is the owner's choice.
missing=()
command -v slurmctld >/dev/null || missing+=(slurm-wlm munge)
command -v sshd >/dev/null || missing+=(openssh-server)
if [ -n "${CI:-}" ] && [ "${#missing[@]}" -gt 0 ]; then
  echo "test: installing ${missing[*]}" >&2
  { [ "$(id -u)" = 0 ] && apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >&2 ||
    echo "test: could not install ${missing[*]} (apt-get as root); the tests that need them are skipped" >&2
fi
ruff check .
ruff format --check .
part mypy mypy
part lint-imports lint-imports
part "tests under Open MPI" python -m pytest --durations=15 --mpi openmpi
part "tests under MPICH" python -m pytest --durations=15 --mpi mpich -m mpi

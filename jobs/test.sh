#!/usr/bin/env bash
# Sets up and runs the checks and the tests (about 40 minutes on two cores): once under Open MPI, then what needs MPI again under MPICH.
# Arguments go to pytest, which is then all that is run: bash jobs/test.sh tests/test_star.py -k hub
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup test
if [ $# -gt 0 ]; then
  exec python -m pytest "$@"
fi
# The job for Slurm is tested where Slurm is: on a machine of the CI it is installed for that, elsewhere that is the owner's choice.
if [ -n "${CI:-}" ] && [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null && ! command -v slurmctld >/dev/null; then
  echo "test: installing slurm-wlm munge" >&2
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends slurm-wlm munge; } >&2 || true
fi
ruff check .
ruff format --check .
part mypy mypy
part lint-imports lint-imports
part "tests under Open MPI" python -m pytest --durations=15 --mpi openmpi
part "tests under MPICH" python -m pytest --durations=15 --mpi mpich -m mpi

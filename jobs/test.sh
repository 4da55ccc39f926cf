#!/usr/bin/env bash
# Sets up and runs the checks and the tests:
#
#   bash jobs/test.sh          the short suite: every module and every kind of run, under Open MPI; some minutes
#   bash jobs/test.sh --all    everything, under Open MPI and MPICH; half an hour on two cores
#   bash jobs/test.sh --rest   what --all has beyond the short suite
#
# Other arguments go to pytest, which is then all that is run: bash jobs/test.sh tests/star/test_star.py -k hub
set -euo pipefail
. "$(dirname "$0")/setup.sh"
unset PYTHONDONTWRITEBYTECODE # the tests start some thousand processes, and each would compile all modules
setup test
suite=short
case "${1:-}" in
  "") ;;
  --all | --rest) suite="${1#--}" ;;
  *) exec python -m pytest "$@" ;;
esac
# Some tests need programs of the system, and are skipped without: the job for Slurm, doctor over a real sshd, the chat page in a
# browser, and a program between two devices. On a machine of the CI they are installed for that, elsewhere that is the owner's choice.
missing=()
command -v slurmctld >/dev/null || missing+=(slurm-wlm munge)
command -v sshd >/dev/null || missing+=(openssh-server)
command -v chromium >/dev/null || missing+=(chromium)
command -v nft >/dev/null || missing+=(nftables)
if [ -n "${CI:-}" ] && [ "${#missing[@]}" -gt 0 ]; then
  echo "test: installing ${missing[*]}" >&2
  { [ "$(id -u)" = 0 ] && apt-get update -qq &&
    DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends "${missing[@]}"; } >&2 ||
    echo "test: could not install ${missing[*]} (apt-get as root); the tests that need them are skipped" >&2
fi
if [ "$suite" != rest ]; then
  ruff check .
  ruff format --check .
  part mypy mypy
  part lint-imports lint-imports
fi

# tests NAME WHICH OPTION...: two at a time, then one after another those that measure time or set up devices.
tests() {
  local name="$1" which="$2"
  shift 2
  part "tests $name, two at a time" python -m pytest --durations=15 -n 2 --dist loadfile -m "not alone and ($which)" "$@"
  part "tests $name, alone" python -m pytest --durations=15 -m "alone and ($which)" "$@"
}
case "$suite" in
  short) tests "of the short suite" "not slow" --hypothesis-profile quick ;;
  rest) tests "beyond the short suite" "slow or drawn" --hypothesis-profile thorough ;;
  all) tests "of the whole suite" "slow or not slow" --hypothesis-profile thorough ;;
esac
# What takes long, or is marked any_mpi, is the same under both: model, disks, memory. Of starting, ending and talking the short suite
# has every kind.
[ "$suite" = short ] || tests "under MPICH" "mpi and not slow and not any_mpi" --mpi mpich --hypothesis-profile quick

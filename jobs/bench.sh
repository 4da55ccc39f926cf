#!/usr/bin/env bash
# Runs the experiments (bench/experiments) on this machine, and makes tables and pictures of what they measured; as root, on
# Linux, while nothing else runs:
#
#   bash jobs/bench.sh --quick             every table in small: 13.5 minutes on two cores, once the environments are there
#   bash jobs/bench.sh                     everything: hours, and 45 GB of disk
#   bash jobs/bench.sh devices memory      some of them; python -m bench.experiments list says which there are
#   bash jobs/bench.sh --smallest          a few layers, some minutes, nothing worth reading: to see that all of it works
#
# Results go to $OUT (measurements): results.jsonl, and page.md with its pictures. What is there already, of this machine and commit,
# is not measured again (--again does). The arguments are those of python -m bench.experiments run.
set -euo pipefail
out="$(realpath -m "${OUT:-measurements}")"
case " $* " in *" --results"*)
    echo "bench: results go to OUT=${OUT:-measurements}; give that instead of --results" >&2
    exit 2
    ;;
esac
. "$(dirname "$0")/setup.sh"
setup run
python -c 'import matplotlib' 2>/dev/null || pip_install matplotlib
# Told to end, this script lets the measurement end first, which cleans up after itself.
python -m bench.experiments run "$@" --results "$out/results.jsonl" &
pid=$!
trap 'kill -TERM "$pid"' TERM HUP INT
code=0
wait "$pid" || code=$?
while kill -0 "$pid" 2>/dev/null; do wait "$pid" || code=$?; done # a signal ends the first wait
if [ "$code" -gt 1 ]; then exit "$code"; fi
python -m bench.experiments page --results "$out/results.jsonl" --page "$out/page.md"
echo "bench: see $out/page.md" >&2
exit "$code"

#!/usr/bin/env bash
# From a fresh checkout to a real model that answers through four ranks on this machine.
set -euo pipefail
. "$(dirname "$0")/setup.sh"
setup run
set -x
mpirun -np 4 --hostfile hostfiles/local.txt python -m tpimpi --prompt "Why is the sky blue?" --max-tokens 80

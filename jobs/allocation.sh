# Sourced by the jobs for Slurm and PBS, in the root of the checkout: what a job does on the machines that it was given.
#
#   enter               goes into the environment, and decides where slices are kept
#   by_mpirun N FILE    says how mpirun starts N ranks on the hosts of a file
#   choose WAY...       takes the first of these launchers whose ranks find each other (each is one word here, "mpirun -n 4" say)
#   experiment          runs the experiments with the launcher $LAUNCH, in which {ranks} stands for their number
#   serve               has the ranks serve, with the keys of $KEYS, and says how to reach them
#   answer_and_measure  lets the ranks answer the prompt, then, if they did, measures; results go to the folder $OUT
#
# What the user may set is at the head of those files. $RANKS is the number of ranks, $MACHINES (where it is set) that of the hosts
# that they must be on; the array each_machine starts a program once on every machine.

. jobs/setup.sh
umask 077 # the prompt and the answer are nobody else's

enter() {
  if [ -z "${VIRTUAL_ENV:-}" ]; then # else the job was given from inside one
    if ! [ -x .venv/bin/python ]; then
      echo "job: there is no .venv in $PWD; make it first, where there is a network: bash jobs/quickstart.sh" >&2
      exit 1
    fi
    # shellcheck disable=SC1091
    . .venv/bin/activate
  fi
  python="$(command -v python)"
  # Links between machines are sealed. Those of a cluster share the home folder, and so one key, which is made once.
  if [ "${SLURM_NNODES:-2}" -gt 1 ] &&
    ! "$python" -c 'from tpimpi.system.link_keys import key_file; raise SystemExit(not key_file().exists())'; then
    # Where that fails, the run says what it lacks, if it does.
    "$python" -m tpimpi doctor --make-keys >&2 || echo "job: no keys for sealed links were made" >&2
  fi
  # On the machine's own disk, since every rank reads its slice from here. Where the site removes $TMPDIR with the job, the
  # slices go with it; else they serve the next job.
  export TPIMPI_CACHE="${TPIMPI_CACHE:-${TMPDIR:-/tmp}/tpimpi-$(id -un)}"
  # One rank computes with all the cores that the scheduler gives it: Open MPI (5, 4) else binds it to one.
  export PRTE_MCA_hwloc_default_binding_policy=none OMPI_MCA_hwloc_base_binding_policy=none
}

# Not every launcher hands on the environment to other machines, so what matters is in the command.
ranks() {
  "${launch[@]}" env TPIMPI_CACHE="$TPIMPI_CACHE" TPIMPI_MODEL="${MODEL:-}" "$python" "$@" </dev/null
}

# Open MPI starts as many ranks on the first host as it has cores, if it is not told to go round the hosts; MPICH goes round, and has
# no such option.
by_mpirun() {
  local by_node=""
  case "$(mpirun --version 2>/dev/null || true)" in *"Open MPI"*) by_node="--map-by node " ;; esac
  echo "mpirun -n $1 $by_node--hostfile $2"
}

choose() {
  local way ways=("$@") check
  check="import platform; from mpi4py import MPI; world = MPI.COMM_WORLD; hosts = set(world.allgather(platform.node())); "
  check+="raise SystemExit(world.size != $RANKS or len(hosts) != ${MACHINES:-len(hosts)})"
  if [ -n "${LAUNCH:-}" ]; then
    read -ra launch <<<"$LAUNCH"
    return
  fi
  for way in "${ways[@]}"; do
    read -ra launch <<<"$way"
    # A launcher of another MPI starts ranks that know nothing of each other, or none; one that knows of no other machine starts all
    # ranks on this one.
    if command -v "${launch[0]}" >/dev/null &&
      timeout --kill-after=10 120 "${launch[@]}" "$python" -c "$check" </dev/null >/dev/null 2>&1; then
      echo "job: ranks are started with: $way" >&2
      return
    fi
  done
  echo "job: none of these starts $RANKS ranks that find each other${MACHINES:+ on $MACHINES machines}:" \
    "$(printf '%s; ' "${ways[@]}")give one that does as LAUNCH" >&2
  exit 1
}

# A job that was interrupted and begins again in the same folder goes on in mid-answer.
answer() {
  if ! [ -e "$OUT/prompt.txt" ]; then
    if [ -n "${PROMPT:-}" ]; then cat "$PROMPT"; else echo "Why is the sky blue?"; fi >"$OUT/prompt.new" || return
    mv "$OUT/prompt.new" "$OUT/prompt.txt"
  fi
  local options=()
  read -ra options <<<"${OPTIONS:-}"
  ranks -m tpimpi --prompt-file "$OUT/prompt.txt" --session "$OUT/session" "${options[@]}" >"$OUT/answer.partial" || return
  mv "$OUT/answer.partial" "$OUT/answer.txt"
}

# In a launcher's step rank 0 alone would measure, so what tells of one is taken out of the environment.
alone='unset OMPI_COMM_WORLD_RANK PMIX_RANK PMI_RANK PALS_RANKID SLURM_PROCID
"${@:2}" >"$1.${SLURMD_NODENAME:-$(hostname -s)}.txt"'

each_machine_measures() { # each_machine_measures BENCHMARK: into a file for each machine
  "${each_machine[@]}" env TPIMPI_CACHE="$TPIMPI_CACHE" bash -c "$alone" alone "$OUT/$1" \
    "$python" -m tpimpi bench "$1" </dev/null
}

answer_and_measure() {
  local name failed=0
  mkdir -p "$OUT"
  if ! [ -e "$OUT/answer.txt" ] && ! part "answer" answer; then
    echo "job: the ranks did not answer, so nothing is measured; give the same OUT again to go on" >&2
    return 1
  fi
  for name in ${BENCHMARKS-kernels disk allreduce}; do
    case "$name" in
      allreduce) part "bench $name" ranks -m tpimpi bench allreduce >"$OUT/$name.txt" || failed=1 ;;
      *) part "bench $name" each_machine_measures "$name" || failed=1 ;;
    esac
  done
  return "$failed"
}

serve() {
  local options=() port="${PORT:-8080}" keys="${KEYS:-$HOME/.config/tpimpi/keys}" node="${SLURMD_NODENAME:-$(hostname)}"
  read -ra options <<<"${OPTIONS:-}"
  if ! [ -e "$keys" ]; then
    mkdir -p "$(dirname "$keys")"
    "$python" -c 'import secrets; print(secrets.token_hex(24))' >"$keys"
  fi
  cat >&2 <<END
job: the server will listen on 127.0.0.1:$port of $node. From your own machine:
job:   ssh -N -L $port:127.0.0.1:$port -J ${LOGIN:-${SLURM_SUBMIT_HOST:-LOGIN_NODE}} $node
job: then open http://127.0.0.1:$port with a key of $keys
END
  ranks -m tpimpi serve --port "$port" --api-key-file "$keys" --quiet "${options[@]}"
}

experiment() {
  local names=() code=0
  read -ra names <<<"${EXPERIMENTS:-}"
  mkdir -p "$OUT"
  part "experiments" "$python" -m bench.experiments run "${names[@]}" --launch "$LAUNCH" --ranks "$RANKS" \
    --work "$(realpath -m "${WORK:-tpimpi-bench-work}")" --results "$OUT/results.jsonl" || code=$?
  if [ "$code" -gt 1 ]; then return "$code"; fi # 1: some rows failed, the others are worth a page
  "$python" -m bench.experiments page --results "$OUT/results.jsonl" --page "$OUT/page.md" || code=$?
  return "$code"
}

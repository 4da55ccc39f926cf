"""Commands with a time limit, and mpirun of Open MPI or MPICH."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent


PROGRAMS = Path(__file__).resolve().parent / "programs"


# Open MPI may end its banner without a line end, so that ours follows on the same line.
OUR_LINE = re.compile(r"^[\s\0]*((?:r\d+ \S+|tpimpi): .*)")


# Long enough for a machine that is busy with something else; no test waits for it to pass.
TIMEOUT = 240.0


@dataclass(frozen=True)
class Result:
    """A finished command."""

    code: int
    out: str
    err: str

    @property
    def our_lines(self) -> list[str]:
        """The lines on stderr that are tpimpi's own messages, not the launcher's."""
        return [match[1] for line in self.err.splitlines() if (match := OUR_LINE.match(line))]


def run_command(
    command: Sequence[str],
    *,
    env: Mapping[str, str],
    stdin: str | None = None,
    cwd: Path | None = None,
    timeout: float = TIMEOUT,
) -> Result:
    """Run a command in a process group of its own, which is killed whole if it takes longer than `timeout` seconds."""
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        cwd=cwd,
        stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(stdin, timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} took over {timeout:.0f} s\nstdout: {out}\nstderr: {err}")
    return Result(code_asked_for(process.returncode, err), out, err)


# What MPICH says on stderr when a rank has asked for the end of the job, with the exit code that it asked for.
ASKED_TO_END = re.compile(r"Abort\((\d+)\) on node .*application called MPI_Abort\(")


def code_asked_for(code: int, said: str) -> int:
    """The launcher's exit code; where MPICH's says only that it killed the other ranks, the one that MPI_Abort was given.

    MPICH's launcher (5.0, hydra's proxy) counts the ranks that it kills as ended in order, unless it sees one of them gone
    while another, on the same busy host, still has its streams open; its exit code is then 9.
    """
    asked = ASKED_TO_END.search(said)
    return int(asked[1]) if code == signal.SIGKILL and asked else code


LAUNCHER_FAILED = "The PMIx server's listener thread failed to start"


@dataclass(frozen=True)
class Launcher:
    """mpirun of one MPI, with what it needs on a machine with fewer cores than ranks."""

    mpi: str
    program: str
    env: dict[str, str]
    hostfile: Path

    def command(self, ranks: int, arguments: Sequence[str]) -> list[str]:
        return [self.program, "-np", str(ranks), "--hostfile", str(self.hostfile), sys.executable, *arguments]

    def __call__(
        self,
        ranks: int,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run `python ARGUMENTS` on so many ranks."""
        command = self.command(ranks, arguments)

        def run() -> Result:
            return run_command(command, env={**self.env, **(env or {})}, stdin=stdin, cwd=cwd, timeout=timeout)

        result = run()
        # Open MPI's launcher fails so now and then, on a machine with much to do, before it has started a rank.
        return run() if not result.out and LAUNCHER_FAILED in result.err else result


def launcher(mpi: str) -> Launcher:
    env = {"OMP_NUM_THREADS": "1", "PRTE_MCA_hwloc_default_binding_policy": "none"}
    if mpi == "openmpi":
        names = ("OMPI_ALLOW_RUN_AS_ROOT", "PRTE_ALLOW_RUN_AS_ROOT")
        if os.geteuid() == 0:
            env |= {name: "1" for base in names for name in (base, f"{base}_CONFIRM")}
        program = shutil.which("mpirun")
    else:
        prefix = Path(sys.prefix) / "mpich"
        env |= {"MPI4PY_MPIABI": "mpich", "LD_LIBRARY_PATH": str(prefix / "lib")}
        program = shutil.which("mpirun", path=str(prefix / "bin"))
    if program is None:
        pytest.fail(f"no mpirun of {mpi}; set up with: bash jobs/test.sh")
    return Launcher(mpi, program, env, ROOT / "hostfiles" / "local.txt")

"""The watch, under real MPI: who is gone is named, who is only slow is not, and nothing outlives the run."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import psutil
import pytest

from tests.support.launch import PROGRAMS, Launcher
from tpimpi.star.heartbeat import end_without_mpi
from tpimpi.system.launcher import Rank

WATCHED = str(PROGRAMS / "watched.py")


def _left() -> list[str]:
    commands = [process.info["cmdline"] or [] for process in psutil.process_iter(["cmdline"])]
    return [" ".join(command) for command in commands if WATCHED in command]


def test_a_rank_that_hangs_is_named_and_leaves_nothing(mpirun: Launcher) -> None:
    result = mpirun(3, WATCHED, "stop", timeout=60)
    assert result.code != 0
    assert re.search(r"^\0?r2 \S+: no sign of life for [23] s, says r0 \S+: ", result.err, re.MULTILINE), result.err
    assert "all well" not in result.out
    assert _left() == []


def test_the_step_of_a_batch_job_is_not_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """All that a job of Slurm does is below slurmstepd: ended are mpirun and what is below it, or this process."""

    class Process:
        def __init__(self, pid: int = 1, name: str = "python") -> None:
            self.pid, self._name = pid, name

        def name(self) -> str:
            return self._name

        def parents(self) -> list[Process]:
            return above

        def children(self, recursive: bool) -> list[Process]:
            return []

    above: list[Process] = []
    ended: list[str] = []
    monkeypatch.setattr(psutil, "Process", Process)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **_: ended.append(command[-1]))
    for rank, parents, pid in (
        (0, [Process(2, "prted"), Process(3, "mpirun"), Process(4, "slurmstepd")], "3"),
        (0, [Process(4, "slurmstepd")], "1"),
        (1, [Process(4, "slurmstepd")], "1"),
    ):
        above[:] = parents
        end_without_mpi(Rank(rank, 2, "here"))
        assert ended[-1] == pid


def test_a_rank_that_is_slow_is_not_gone(mpirun: Launcher) -> None:
    result = mpirun(3, WATCHED, "slow", timeout=60)
    assert result.code == 0, result.err
    assert re.search(r"r0 \S+: waiting for r2 \S+ for \d s: slow, not gone", result.err), result.err
    assert re.search(r"r0 \S+: r2 \S+ goes on", result.err), result.err
    assert "no sign of life" not in result.err
    assert "all well" in result.out


@pytest.mark.slow
def test_a_rank_that_has_taken_its_leave_is_not_missed(mpirun: Launcher) -> None:
    result = mpirun(3, WATCHED, "leave", timeout=60)
    assert result.code == 0, result.err
    assert "no sign of life" not in result.err
    assert "all well" in result.out


@pytest.mark.parametrize("dead", ["dead-hub", "dead-rank"])
@pytest.mark.slow
def test_a_rank_that_dies_while_a_note_is_waited_for_is_no_error_of_ours(mpirun: Launcher, dead: str) -> None:
    result = mpirun(3, WATCHED, dead, timeout=60)
    assert result.code != 0
    assert "Traceback" not in result.err, result.err
    assert _left() == []


@pytest.mark.slow
def test_a_start_that_takes_long_is_explained(mpirun: Launcher) -> None:
    result = mpirun(2, WATCHED, "late", timeout=60)
    assert result.code == 0, result.err
    # Only Open MPI's start waits for all ranks.
    if mpirun.mpi == "openmpi":
        assert "MPI has not started the other ranks" in result.err
        assert "doctor --hostfile" in result.err


@pytest.mark.slow
def test_a_start_that_takes_for_ever_ends(mpirun: Launcher) -> None:
    if mpirun.mpi != "openmpi":
        pytest.skip("only Open MPI's start waits for all ranks")
    result = mpirun(2, WATCHED, "never", timeout=60)
    assert result.code not in (0, None)
    assert "MPI has not started for 1 s; the run ends here" in result.err


@pytest.mark.slow
def test_where_mpi_leaves_no_thread_for_the_watch_rank_0_says_so(
    mpirun: Launcher, cache: dict[str, str], tiny: Path, tmp_path: Path
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import tpimpi.star.start as s\ns._has_thread_multiple = lambda: False\n"
    )
    command = ("-m", "tpimpi", "--model", str(tiny), "--prompt", "x", "--max-tokens", "1", "--timeout", "77")
    line = "a rank that hangs is noticed only after 77 s (--timeout)"
    with_watch = mpirun(2, *command, env=cache)
    assert with_watch.code == 0 and line not in with_watch.err
    env = {**cache, "PYTHONPATH": str(tmp_path)}
    without = mpirun(2, *command, env=env)
    assert without.code == 0 and without.err.count(line) == 1, without.err
    assert line not in mpirun(2, *command, "--quiet", env=env).err
    assert "note: this MPI has no MPI_THREAD_MULTIPLE, so" in mpirun(2, "-m", "tpimpi", "doctor", env=env).out

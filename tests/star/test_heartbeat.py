"""The watch, under real MPI: who is gone is named, who is only slow is not, and nothing outlives the run."""

from __future__ import annotations

import re
from pathlib import Path

import psutil
import pytest

from tests.support.launch import PROGRAMS, Launcher

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

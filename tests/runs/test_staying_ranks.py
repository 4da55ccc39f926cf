"""Ranks that stay up (tests/support/ranks.py): what a program gives is what it gives in a launch of its own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.support.launch import Launcher
from tests.support.ranks import Ranks

PROGRAM = """
import os, sys, time
from tpimpi.star import connect
star = connect()
print(os.getpid(), sys.argv[1:], os.environ.get("GIVEN"), repr(sys.stdin.read()), flush=True)
print(f"r{star.rank.index} here: some line", file=sys.stderr, flush=True)
if "refuse" in sys.argv:
    star.close(failed=True)  # which leaves a process that ends the launch in ten seconds, if MPI has not by then
    sys.exit(2)
if "fail" in sys.argv and star.rank.index == 1:
    sys.exit(3)
if "hang" in sys.argv and star.rank.index == 1:
    time.sleep(100)
star.close()
"""


@pytest.fixture
def ranks(mpirun: Launcher) -> Iterator[Ranks]:
    made = Ranks(mpirun)
    yield made
    made.close()


@pytest.fixture
def program(tmp_path: Path) -> str:
    path = tmp_path / "program.py"
    path.write_text(PROGRAM)
    return str(path)


def test_programs_share_a_launch_and_nothing_else(ranks: Ranks, program: str) -> None:
    first = ranks(2, program, "one", env={"GIVEN": "x"}, stdin="typed\n")
    again = ranks(2, program, "two")
    assert (first.code, again.code) == (0, 0), first.err + again.err
    lines, others = first.out.splitlines(), again.out.splitlines()
    assert lines[0].endswith(r" ['one'] x 'typed\n'") and lines[1].endswith(" ['one'] x ''")
    assert [line.partition(" ")[2] for line in others] == ["['two'] None ''"] * 2
    assert [line.split()[0] for line in lines] == [line.split()[0] for line in others], "other processes"
    assert first.our_lines == ["r0 here: some line", "r1 here: some line"]


def test_what_a_refused_program_left_behind_does_not_end_the_next(ranks: Ranks, program: str) -> None:
    refused = ranks(2, program, "refuse")
    assert refused.code == 2, refused.err
    pids = [int(line.split()[0]) for line in refused.out.splitlines()]
    left = [child.cmdline() for pid in pids for child in psutil.Process(pid).children() if child.status() != "zombie"]
    assert left == []


@pytest.mark.slow
def test_after_a_failure_the_next_program_has_ranks_of_its_own(ranks: Ranks, program: str) -> None:
    failed = ranks(2, program, "fail")
    assert failed.code == 3, failed.err
    after = ranks(2, program)
    assert after.code == 0, after.err
    assert {line.split()[0] for line in failed.out.splitlines()}.isdisjoint(
        line.split()[0] for line in after.out.splitlines()
    )


@pytest.mark.slow
def test_a_program_that_hangs_fails_its_test_alone(ranks: Ranks, program: str) -> None:
    with pytest.raises(pytest.fail.Exception, match="took over 3 s"):
        ranks(2, program, "hang", timeout=3)
    assert ranks(2, program).code == 0

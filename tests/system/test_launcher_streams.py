"""stdout and stderr of rank 0 through a launcher, where both go to one place."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS, Launcher, run_command
from tests.support.programs.streams import LINES

PROGRAM = str(PROGRAMS / "streams.py")


@pytest.mark.slow_but("file")
@pytest.mark.parametrize(
    "places", [">{0} 2>&1", ">>{0} 2>&1", "2>&1 | cat >{0}"], ids=["file", "end of a file", "pipe"]
)
def test_lines_come_in_the_order_in_which_they_were_written(mpirun: Launcher, tmp_path: Path, places: str) -> None:
    out = tmp_path / "out.txt"
    command = f"{shlex.join(mpirun.command(1, [PROGRAM]))} {places.format(shlex.quote(str(out)))}"
    result = run_command(["bash", "-c", command], env=mpirun.env, timeout=60)
    assert result.code == 0, result.err
    expected = [f"{stream} {number}" for number in range(LINES) for stream in ("out", "err")]
    assert [line for line in out.read_text().splitlines() if line] == expected


def test_outputs_that_go_to_two_places_stay_apart(mpirun: Launcher) -> None:
    result = run_command(mpirun.command(1, [PROGRAM]), env=mpirun.env, timeout=60)
    assert result.code == 0, result.err
    assert result.out.split() == [word for number in range(LINES) for word in ("out", str(number))]
    assert [line for line in result.err.splitlines() if line.startswith(("out", "err"))] == [
        f"err {number}" for number in range(LINES)
    ]

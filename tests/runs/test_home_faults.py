"""What a user sees when something breaks in a home cluster: each kind of trouble once, over the emulated home, by real MPI.

bench/home_faults.py tries each many times, and says what is well.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from tests.support.launch import ROOT, Launcher

sys.path.insert(0, str(ROOT / "bench"))
import home_faults
from home import Home, HomeError

SILENCE = 3.0  # shorter than usual, so that the tests are


@pytest.fixture(scope="module")
def home(mpirun: Launcher) -> Iterator[tuple[Home, str]]:
    made = home_faults.home_with_slices(mpirun.mpi)
    try:
        pair = made.__enter__()
    except HomeError as error:
        pytest.skip(f"no emulated home here: {error}")
    yield pair
    made.__exit__(None, None, None)


@pytest.mark.parametrize("kind", home_faults.KINDS)
@pytest.mark.slow_but("kill-decode")
def test_trouble_is_named_and_nothing_is_left(home: tuple[Home, str], mpirun: Launcher, kind: str) -> None:
    place, whole = home
    random.seed(kind)
    rank = random.randrange(1 if kind in home_faults.NOT_RANK_0 else 0, home_faults.RANKS)
    outcome = home_faults.try_once(kind, place, mpirun.mpi, rank, SILENCE, whole)
    assert not outcome.wrong, (outcome.wrong, outcome.line, outcome.left)


@pytest.mark.slow
def test_a_rank_that_is_silent_for_less_is_not_gone(home: tuple[Home, str], mpirun: Launcher) -> None:
    """Stopped for less than the silence that is allowed: nobody is named, and the answer is whole."""
    place, whole = home
    case = home_faults.KillDecode(place, mpirun.mpi, 20)
    case.options = ("--max-tokens", "200", "--ignore-eos", "--raw", "--quiet")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = place.mpirun(case.command(), ranks=home_faults.RANKS, mpi=mpirun.mpi, **pipes)
    screen = home_faults.Screen(process)
    case.reach(screen)
    pid = home_faults.rank_process(place, 2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(pid, signal.SIGCONT)
    assert screen.ended(60)
    screen.join()
    assert process.returncode == 0
    assert screen.text.strip("\n") == whole
    assert not [line for _, line in screen.lines if "no sign of life" in line]

"""What a user sees when something breaks in a home cluster: each kind of trouble once, over the emulated home, by real MPI.

bench/home/faults tries each many times, and says what is well.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections.abc import Iterator

import pytest

from bench.home import Home, HomeError
from bench.home.faults import cases, rounds, screen
from tests.support.launch import Launcher

pytestmark = pytest.mark.alone  # it sets up machines, or runs what does

SILENCE = 3.0  # shorter than usual, so that the tests are
TOKENS = 70  # of the undisturbed answer: some four times what is printed before something breaks


@pytest.fixture(scope="module")
def home(mpirun: Launcher) -> Iterator[tuple[Home, str]]:
    made = rounds.home_with_slices(mpirun.mpi, TOKENS)
    try:
        pair = made.__enter__()
    except HomeError as error:
        pytest.skip(f"no emulated home here: {error}")
    yield pair
    made.__exit__(None, None, None)


@pytest.mark.parametrize("kind", cases.KINDS)
@pytest.mark.slow
def test_trouble_is_named_and_nothing_is_left(home: tuple[Home, str], mpirun: Launcher, kind: str) -> None:
    place, whole = home
    random.seed(kind)
    rank = random.randrange(1 if kind in cases.NOT_RANK_0 else 0, cases.RANKS)
    outcome = rounds.try_once(kind, place, mpirun.mpi, rank, SILENCE, whole)
    assert not outcome.wrong, (outcome.wrong, outcome.line, outcome.left)


@pytest.mark.slow
def test_a_rank_that_is_silent_for_less_is_not_gone(home: tuple[Home, str], mpirun: Launcher) -> None:
    """Stopped for less than the silence that is allowed: nobody is named, and the answer is whole."""
    place, whole = home
    case = cases.KillDecode(place, mpirun.mpi, 20)
    case.options = ("--max-tokens", str(TOKENS), "--ignore-eos", "--raw", "--quiet")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = place.mpirun(case.command(), ranks=cases.RANKS, mpi=mpirun.mpi, **pipes)
    shown = screen.Screen(process)
    case.reach(shown)
    pid = screen.rank_process(place, 2)
    os.kill(pid, signal.SIGSTOP)
    time.sleep(4)
    os.kill(pid, signal.SIGCONT)
    assert shown.ended(60)
    shown.join()
    assert process.returncode == 0
    assert shown.text.strip("\n") == whole
    assert not [line for _, line in shown.lines if "no sign of life" in line]

"""The star under a real MPI, from 1 to 7 ranks; what it does when a rank fails or hangs, in launches of their own."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest

from tests.support.launch import PROGRAMS, Launcher
from tests.support.ranks import Ranks
from tpimpi.star import Star

FAULTS = str(PROGRAMS / "star_faults.py")


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 7])
@pytest.mark.slow_but("1", "3")
def test_sums_like_the_library_with_the_same_bits_everywhere(on_ranks: Ranks, ranks: int) -> None:
    result = on_ranks(ranks, str(PROGRAMS / "star.py"))
    assert result.code == 0, result.err
    assert "all well" in result.out


def test_a_single_rank_needs_no_mpi(tpimpi) -> None:
    import numpy as np

    star, values = Star(None), np.arange(3, dtype=np.float32)
    star.allreduce(values)
    star.broadcast(values)
    assert values.tolist() == [0, 1, 2]
    assert star.gather_notes(b"x") == [b"x"]


def test_a_rank_that_hangs_is_named_and_the_job_ends(mpirun: Launcher) -> None:
    began = time.monotonic()
    result = mpirun(3, FAULTS, "hang", timeout=60)
    assert result.code != 0
    assert len(result.our_lines) == 1, result.err
    assert re.search(r"nothing came from r2( \S+)? for 1 s", result.our_lines[0])
    assert "--timeout" in result.our_lines[0]
    assert time.monotonic() - began < 60


def test_a_message_of_the_wrong_size_is_an_error_not_an_answer(mpirun: Launcher) -> None:
    result = mpirun(2, FAULTS, "short", timeout=60)
    assert result.code == 1
    assert re.search(r"r1( \S+)? sent 12 bytes where 24 were due", result.err)


@pytest.mark.parametrize(("kind", "sender"), [("partial", 1), ("sum", 0), ("hidden", 0), ("control", 0), ("note", 1)])
@pytest.mark.slow_but("partial-1")
def test_a_damaged_message_is_an_error_not_an_answer(mpirun: Launcher, kind: str, sender: int) -> None:
    result = mpirun(2, FAULTS, f"damaged {kind}", timeout=60)
    assert result.code == 1
    assert re.search(rf"a message of r{sender}( \S+)? was damaged on its way", result.err)


@pytest.mark.parametrize("call", ["Isend", "Irecv", "Improbe"])
@pytest.mark.slow_but("Isend")
def test_whatever_call_of_mpi_fails_the_rank_is_named(mpirun: Launcher, call: str) -> None:
    program = f"""
import numpy as np
from mpi4py import MPI
from tpimpi.errors import LostError
from tpimpi.star.channel import NOTE, Channel

class Broken:
    rank, size = 0, 2
    def {call}(self, *args, **kwargs):
        raise MPI.Exception(MPI.ERR_OTHER)

channel = Channel(Broken())
channel.name = lambda peer: f"r{{peer}} pi"
calls = {{
    "Isend": lambda: channel.send(np.zeros(1), 1, NOTE),
    "Irecv": lambda: channel.receive(np.zeros(1), 1, NOTE),
    "Improbe": lambda: channel.take(1, NOTE, None),
}}
try:
    calls[{call!r}]()
except LostError as error:
    print(error)
"""
    result = mpirun(1, "-c", program, timeout=60)
    assert result.code == 0, result.err
    assert result.out.startswith("lost the connection to r1 pi (")


def test_a_control_header_that_makes_no_sense_is_refused(mpirun: Launcher) -> None:
    result = mpirun(2, FAULTS, "header", timeout=60)
    assert result.code == 1
    assert "makes no sense" in result.err


def test_mpirun_of_another_mpi_is_noticed(tpimpi, mpirun: Launcher, tmp_path: Path) -> None:
    """Each process then sees a world of its own; without this check four hubs would each answer."""
    variable = "PMI_SIZE" if mpirun.mpi == "openmpi" else "OMPI_COMM_WORLD_SIZE"
    rank = "PMI_RANK" if mpirun.mpi == "openmpi" else "OMPI_COMM_WORLD_RANK"
    library = {} if mpirun.mpi == "openmpi" else {k: mpirun.env[k] for k in ("MPI4PY_MPIABI", "LD_LIBRARY_PATH")}
    result = tpimpi("--prompt", "x", env={variable: "4", rank: "0", **library, "MPI4PY_RC_THREADS": "1"}, timeout=60)
    assert result.code == 2
    assert len(result.our_lines) == 1, result.err
    assert "mpirun started 4 ranks, but this process sees 1" in result.our_lines[0]


def test_srun_that_does_not_speak_with_the_mpi_library_is_noticed(tpimpi) -> None:
    result = tpimpi("--prompt", "x", env={"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"}, timeout=60)
    assert result.code == 2
    assert len(result.our_lines) == 1, result.err
    assert "srun started 2 ranks, but this process sees 1" in result.our_lines[0]
    assert "srun --mpi=pmix" in result.our_lines[0]

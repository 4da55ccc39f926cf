"""The star: all that goes between the ranks, as point-to-point messages with rank 0, the hub, in the middle.

An allreduce is two link latencies, whatever the number of ranks: every rank sends its partial to the hub, the hub adds them
in rank order and sends its own bytes back, so that every rank holds the same bits. (A ring takes 2(n - 1) latencies; at
home it is latency that costs: arXiv 2410.00531, section 3.3.)

Nothing here blocks inside MPI: an operation is started, then tested between sleeps that are short against the time that
has passed, until it is done or its deadline has passed. So a rank can notice that another is gone, and leaves the core
to its own reader, or to another rank, while it waits.

What is on the wire, by tag: CONTROL (hub to all: int64 [4]: magic, operation, positions, start), HIDDEN (hub to all: f32
[positions, hidden]), PARTIAL (to the hub) and SUM (from it), f32 [positions, hidden], NOTE (settings, status and
measurements as JSON), and CLOCK (both ways: float64 [1], the sender's clock in seconds; only where a run is traced). Prompt,
token ids and text are in none of them.

mpi4py is imported only by `connect` in a launched run; without mpirun a star of one rank needs no MPI.
"""

from __future__ import annotations

import ctypes
import math
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn

import numpy as np
import numpy.typing as npt

from tpimpi.errors import InputError, StarError
from tpimpi.formats import F32

if TYPE_CHECKING:
    from mpi4py import MPI

ALLREDUCES = ("star", "library")
CONTROL, HIDDEN, PARTIAL, SUM, NOTE, CLOCK = range(1, 7)
BEGIN, FORWARD, FINISH = 1, 2, 3  # operations of a control header; BEGIN's positions are the context
MAGIC = 0x7470696D7069  # "tpimpi"

DEFAULT_TIMEOUT = 600.0  # seconds a rank waits for another's message in mid-run
CLOCK_ROUNDS = 16  # round trips to each rank, to compare clocks
LONGEST_SLEEP = 0.001  # seconds between two tests while others compute
LONGEST_IDLE_SLEEP = 0.02  # seconds between two tests while a user types or a model is sliced

# Variables by which the launchers tell a process its rank, and how many there are.
_RANK_VARIABLES = ("OMPI_COMM_WORLD_RANK", "PMIX_RANK", "PMI_RANK", "PALS_RANKID")
_SIZE_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PALS_SIZE")
# srun without a plugin for MPI sets these alone; they also stand in an interactive allocation, where there is one task.
_SLURM_RANK, _SLURM_SIZE = "SLURM_PROCID", "SLURM_STEP_NUM_TASKS"


@dataclass(frozen=True)
class Rank:
    """Which rank this process is, of how many, and on which host."""

    index: int
    size: int
    host: str

    @property
    def is_hub(self) -> bool:
        return self.index == 0

    def __str__(self) -> str:
        return f"r{self.index} {self.host}"


def _number(variable: str) -> int | None:
    value = os.environ.get(variable, "")
    return int(value) if value.isascii() and value.isdecimal() and len(value) < 10 else None


def _launched_size() -> int:
    """How many ranks the launcher says it started; 1 where it does not say."""
    return max((size for name in (*_SIZE_VARIABLES, _SLURM_SIZE) if (size := _number(name)) is not None), default=1)


def launched_rank() -> int | None:
    """The rank that an MPI launcher gave this process, or None where there is no launcher. Does not start MPI."""
    for name in _RANK_VARIABLES:
        if (rank := _number(name)) is not None:
            return rank
    return _number(_SLURM_RANK) if (_number(_SLURM_SIZE) or 1) > 1 else None


def connect() -> Star:
    """Join the run: MPI's world where a launcher started this process, else a star of one rank.

    Raises InputError where the launcher and the MPI library are of two different kinds.
    """
    if launched_rank() is None:
        return Star(None)
    import mpi4py

    mpi4py.rc.thread_level = "funneled"  # only the main thread talks
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    wanted = _launched_size()
    if wanted != world.size:
        library = MPI.Get_library_version().split(",")[0].split("\n")[0].strip()
        raise InputError(
            f"mpirun started {wanted} ranks, but this process sees {world.size}: mpirun and the MPI library ({library}) "
            "are of two kinds; use the mpirun of that library, or set MPI4PY_MPIABI=mpich (or openmpi) to change the library"
        )
    return Star(world.Clone())  # a communicator of our own, so that no other library's messages meet ours


class Allreduce:
    """A sum under way: made by `Star.start`, ended by `wait`."""

    def __init__(self, wait: Callable[[float | None], None]) -> None:
        self.wait = wait


class Star:
    """One rank's end of the star. `comm` is an MPI communicator, or None for a run of a single rank."""

    def __init__(
        self, comm: MPI.Intracomm | None, *, timeout: float = DEFAULT_TIMEOUT, allreduce: str = "star"
    ) -> None:
        self._comm = comm
        self.rank = Rank(comm.rank, comm.size, platform.node()) if comm else Rank(0, 1, platform.node())
        self.timeout = timeout
        self.algorithm = allreduce
        self.seconds = 0.0  # spent in allreduces and broadcasts
        self._others = range(1, self.rank.size)
        self._scratch: F32 = np.empty((0, 0), np.float32)
        self._control = np.zeros(4, np.int64)
        _fine_timers()

    # Sums and hidden vectors

    def allreduce(self, array: F32) -> None:
        """Replace `array` (f32, contiguous, the same shape on every rank) by its sum over all ranks, in place."""
        self.start(array).wait(None)

    def start(self, array: F32) -> Allreduce:
        """Begin the sum of `array` over all ranks; it may not be touched until `wait(deadline)` has returned.

        `wait` takes a time.monotonic() value, or None for the run's timeout, and raises StarError when that has passed.
        """
        assert array.dtype == np.float32 and array.flags.c_contiguous
        if self._comm is None or self.rank.size == 1 or array.size == 0:
            return Allreduce(lambda deadline: None)
        began = time.monotonic()
        finish = self._start_library(array) if self.algorithm == "library" else self._start_star(array)
        self.seconds += time.monotonic() - began

        def wait(deadline: float | None) -> None:
            waiting = time.monotonic()
            finish(waiting + self.timeout if deadline is None else deadline)
            self.seconds += time.monotonic() - waiting

        return Allreduce(wait)

    def _start_star(self, array: F32) -> Callable[[float], None]:
        assert self._comm is not None
        comm, flat = self._comm, array.reshape(-1)
        if not self.rank.is_hub:
            # The sum may not be received into the array that is still being sent.
            result = self._buffers(1, flat.size)[0]
            sum_request = comm.Irecv(result, source=0, tag=SUM)
            requests = [sum_request, comm.Isend(flat, dest=0, tag=PARTIAL)]

            def finish_leaf(deadline: float) -> None:
                self._await(requests, [0, 0], deadline, [flat.nbytes, None])
                flat[:] = result

            return finish_leaf

        partials = self._buffers(self.rank.size - 1, flat.size)
        receives = [comm.Irecv(partials[rank - 1], source=rank, tag=PARTIAL) for rank in self._others]

        def finish_hub(deadline: float) -> None:
            for rank, request in zip(self._others, receives, strict=True):
                self._await([request], [rank], deadline, [flat.nbytes])
                np.add(flat, partials[rank - 1], out=flat)
            sends = [comm.Isend(flat, dest=rank, tag=SUM) for rank in self._others]
            self._await(sends, list(self._others), deadline)

        return finish_hub

    def _start_library(self, array: F32) -> Callable[[float], None]:
        assert self._comm is not None
        result = np.empty_like(array)
        request = self._comm.Iallreduce(array, result)

        def finish(deadline: float) -> None:
            self._await([request], [0], deadline)
            array[...] = result

        return finish

    def broadcast(self, array: F32) -> None:
        """Fill `array` (f32, contiguous) on every rank with the hub's."""
        began = time.monotonic()
        self._from_hub(array, HIDDEN, began + self.timeout)
        self.seconds += time.monotonic() - began

    # Control: what to do next

    def command(self, operation: int, positions: int = 0, start: int = 0) -> None:
        """Hub: tell every rank what comes next."""
        self._control[:] = MAGIC, operation, positions, start
        self._from_hub(self._control, CONTROL, time.monotonic() + self.timeout)

    def next_command(self) -> tuple[int, int, int]:
        """Other ranks: wait, however long it takes, for the hub's next (operation, positions, start)."""
        self._from_hub(self._control, CONTROL, None)
        magic, operation, positions, start = (int(value) for value in self._control)
        if magic != MAGIC or operation not in (BEGIN, FORWARD, FINISH) or positions < 0 or start < 0:
            raise StarError(
                f"rank 0 sent the control header {magic, operation, positions, start}, which makes no sense"
            )
        return operation, positions, start

    def _from_hub(
        self, array: npt.NDArray[np.float32] | npt.NDArray[np.int64], tag: int, deadline: float | None
    ) -> None:
        if self._comm is None:
            return
        if self.rank.is_hub:
            sends = [self._comm.Isend(array, dest=rank, tag=tag) for rank in self._others]
            self._await(sends, list(self._others), deadline)
        else:
            self._await([self._comm.Irecv(array, source=0, tag=tag)], [0], deadline, [array.nbytes])

    # Notes: short JSON texts before and after the computing

    def tell(self, note: bytes) -> None:
        """Hub: send `note` to every other rank."""
        if self._comm is not None:
            sends = [self._comm.Isend(np.frombuffer(note, np.uint8), dest=rank, tag=NOTE) for rank in self._others]
            self._await(sends, list(self._others), time.monotonic() + self.timeout)

    def hear(self) -> bytes:
        """Other ranks: the hub's next note, however long it takes."""
        return self._note_from(0, None)

    def collect(self, note: bytes) -> list[bytes]:
        """Every rank gives a note; the hub gets all of them in rank order, the others an empty list."""
        if self._comm is None:
            return [note]
        deadline = time.monotonic() + self.timeout
        if self.rank.is_hub:
            return [note, *(self._note_from(rank, deadline) for rank in self._others)]
        self._await([self._comm.Isend(np.frombuffer(note, np.uint8), dest=0, tag=NOTE)], [0], deadline)
        return []

    def _note_from(self, source: int, deadline: float | None) -> bytes:
        from mpi4py import MPI

        assert self._comm is not None
        status = MPI.Status()
        pause = _Pause(LONGEST_IDLE_SLEEP if deadline is None else LONGEST_SLEEP)
        while (message := self._comm.Improbe(source=source, tag=NOTE, status=status)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise self._silence([source], pause)
            pause.sleep()
        buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self._await([message.Irecv(buffer)], [source], deadline)
        return buffer.tobytes()

    # Clocks

    def clock_offsets(self, clock: Callable[[], float] = time.monotonic) -> list[float]:
        """Compare clocks; every rank calls it. The hub gets, in rank order, the seconds to add to each rank's `clock` to
        have its own (the first is 0); the others get an empty list.

        As NTP does, it takes of CLOCK_ROUNDS round trips the shortest, and the other's clock for the middle of it: wrong by
        half of that trip at most, and by what the clocks drift apart afterwards.
        """
        if self._comm is None:
            return [0.0]
        deadline = time.monotonic() + self.timeout
        if self.rank.is_hub:
            return [0.0, *(self._clock_offset(rank, clock, deadline) for rank in self._others)]
        asked, answer = np.empty(1, np.float64), np.empty(1, np.float64)
        for _ in range(CLOCK_ROUNDS):
            self._await([self._comm.Irecv(asked, source=0, tag=CLOCK)], [0], deadline, [asked.nbytes])
            answer[0] = clock()
            self._await([self._comm.Isend(answer, dest=0, tag=CLOCK)], [0], deadline)
        return []

    def _clock_offset(self, rank: int, clock: Callable[[], float], deadline: float) -> float:
        """Hub: seconds to add to the clock of `rank`."""
        assert self._comm is not None
        here, there = np.empty(1, np.float64), np.empty(1, np.float64)
        trips = []
        for _ in range(CLOCK_ROUNDS):
            reply = self._comm.Irecv(there, source=rank, tag=CLOCK)
            here[0] = began = clock()
            self._await(
                [self._comm.Isend(here, dest=rank, tag=CLOCK), reply], [rank] * 2, deadline, [None, there.nbytes]
            )
            ended = clock()
            if not math.isfinite(there[0]):
                raise StarError(f"rank {rank} says that its clock shows {there[0]} s, which makes no sense")
            trips.append((ended - began, (began + ended) / 2 - float(there[0])))
        return min(trips)[1]

    # Waiting

    def _await(
        self,
        requests: Sequence[MPI.Request],
        peers: Sequence[int],
        deadline: float | None,
        sizes: Sequence[int | None] | None = None,
    ) -> None:
        """Test until all requests are done. `sizes` are the bytes that each must have brought, None for a send."""
        from mpi4py import MPI

        pause = _Pause(LONGEST_IDLE_SLEEP if deadline is None else LONGEST_SLEEP)
        status = MPI.Status()
        try:
            for index, request in enumerate(requests):
                while not request.Test(status):
                    if deadline is not None and time.monotonic() > deadline:
                        waiting = zip(requests[index:], peers[index:], strict=True)
                        raise self._silence([peer for r, peer in waiting if not r.Test()], pause)
                    pause.sleep()
                if sizes and sizes[index] is not None and status.Get_count(MPI.BYTE) != sizes[index]:
                    found = status.Get_count(MPI.BYTE)
                    raise StarError(f"rank {peers[index]} sent {found} bytes where {sizes[index]} were due")
        except MPI.Exception as error:
            raise StarError(f"MPI failed while waiting for rank {peers[0]}: {error.Get_error_string()}") from error

    def _silence(self, late: Sequence[int], pause: _Pause) -> StarError:
        names = ", ".join(f"rank {peer}" for peer in sorted(set(late)))
        return StarError(
            f"nothing came from {names} for {pause.elapsed():.0f} s; see whether that machine is up and reachable, "
            "or allow more with --timeout"
        )

    def _buffers(self, count: int, size: int) -> F32:
        """Reused receive buffers, f32 [count, size]."""
        if self._scratch.shape[0] < count or self._scratch.shape[1] < size:
            self._scratch = np.empty((count, size), np.float32)
        if self._scratch.shape[1] == size:
            return self._scratch[:count]
        return self._scratch.reshape(-1)[: count * size].reshape(count, size)

    def abort(self, code: int) -> NoReturn:
        """End the job on every rank, now."""
        if self._comm is not None:
            self._comm.Abort(code)
        os._exit(code)


class _Pause:
    """Sleeps between tests: none at first, then about an eighth of the time waited so far, up to `longest` seconds."""

    def __init__(self, longest: float) -> None:
        self.longest = longest
        self.began = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def sleep(self) -> None:
        elapsed = self.elapsed()
        if elapsed < 200e-6:
            os.sched_yield()
        else:
            time.sleep(min(elapsed / 8, self.longest))


def _fine_timers() -> None:
    """Let this thread's sleeps end on time: Linux otherwise adds 50 us to each (prctl PR_SET_TIMERSLACK)."""
    pr_set_timerslack = 29
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(pr_set_timerslack, 1000, 0, 0, 0)

"""Messages between two ranks: started, then tested between short sleeps until they are done; never blocking inside MPI.

So a rank leaves its core to its own reader, or to another rank, while it waits, and notices when a deadline has passed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from tpimpi.errors import StarError
from tpimpi.formats import Bytes

if TYPE_CHECKING:
    from mpi4py import MPI

CONTROL, HIDDEN, PARTIAL, SUM, NOTE, CLOCK, BULK, ECHO = range(1, 9)  # tags; see the package's docstring

LONGEST_SLEEP = 0.001  # seconds between two tests while others compute
LONGEST_IDLE_SLEEP = 0.01  # seconds between two tests while a user types or a model is sliced


@dataclass
class Pending:
    """Requests that are to be done before their owner can go on: of the ranks `peers`, each to bring so many bytes (None:
    a send)."""

    requests: Sequence[MPI.Request]
    peers: Sequence[int]
    sizes: Sequence[int | None]
    done: int = 0  # so many of them, from the front, are


class Post:
    """One rank's messages, over the communicator `comm`."""

    latency: float | None = None  # seconds one way, once it was measured: sleeps are short against it

    def __init__(self, comm: MPI.Intracomm) -> None:
        self.comm = comm
        self.rank, self.size = comm.rank, comm.size
        _fine_timers()

    def send(self, array: npt.NDArray[Any], to: int, tag: int) -> Pending:
        """Begin to send a contiguous array, which may not change until that is done."""
        return Pending([self.comm.Isend(_bytes(array), dest=to, tag=tag)], [to], [None])

    def send_to(self, array: npt.NDArray[Any], ranks: Sequence[int], tag: int) -> Pending:
        """Begin to send the same array to several ranks."""
        data = _bytes(array)
        requests = [self.comm.Isend(data, dest=rank, tag=tag) for rank in ranks]
        return Pending(requests, list(ranks), [None] * len(requests))

    def receive(self, array: npt.NDArray[Any], source: int, tag: int) -> Pending:
        """Begin to receive into a contiguous array, which is to be filled exactly."""
        return Pending([self.comm.Irecv(_bytes(array), source=source, tag=tag)], [source], [array.nbytes])

    def test(self, pending: Pending) -> bool:
        """Whether all of `pending` is done. Raises StarError where a message has another size than is due."""
        from mpi4py import MPI

        status = MPI.Status()
        try:
            while pending.done < len(pending.requests):
                if not pending.requests[pending.done].Test(status):
                    return False
                size, peer = pending.sizes[pending.done], pending.peers[pending.done]
                if size is not None and (found := status.Get_count(MPI.BYTE)) != size:
                    raise StarError(f"rank {peer} sent {found} bytes where {size} were due")
                pending.done += 1
        except MPI.Exception as error:
            raise StarError(
                f"MPI failed while waiting for rank {pending.peers[pending.done]}: {error.Get_error_string()}"
            ) from error
        return True

    def wait(self, pending: Pending, deadline: float | None) -> None:
        """Wait until all of `pending` is done; however long it takes, where there is no deadline (a time.monotonic())."""
        pause = self._pause(deadline)
        while not self.test(pending):
            if deadline is not None and time.monotonic() > deadline:
                late = [
                    peer
                    for request, peer in zip(
                        pending.requests[pending.done :], pending.peers[pending.done :], strict=True
                    )
                    if not request.Test()
                ]
                raise silence(late, pause.elapsed())
            pause.sleep()

    def take(self, source: int, tag: int, deadline: float | None) -> Bytes:
        """The next message of that tag, of whatever size: uint8 [bytes]."""
        from mpi4py import MPI

        status = MPI.Status()
        pause = self._pause(deadline)
        while (message := self.comm.Improbe(source=source, tag=tag, status=status)) is None:
            if deadline is not None and time.monotonic() > deadline:
                raise silence([source], pause.elapsed())
            pause.sleep()
        buffer = np.empty(status.Get_count(MPI.BYTE), np.uint8)
        self.wait(Pending([message.Irecv(buffer)], [source], [buffer.nbytes]), deadline)
        return buffer

    def _pause(self, deadline: float | None) -> _Pause:
        return _Pause(LONGEST_IDLE_SLEEP if deadline is None else LONGEST_SLEEP)


def silence(late: Sequence[int], seconds: float) -> StarError:
    """What is said of ranks that did not answer in time."""
    names = ", ".join(f"rank {peer}" for peer in sorted(set(late)))
    return StarError(
        f"nothing came from {names} for {seconds:.0f} s; see whether that machine is up and reachable, "
        "or allow more with --timeout"
    )


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


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

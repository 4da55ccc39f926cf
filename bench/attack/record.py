"""Runs tpimpi with every message of this rank recorded as MPI gets and delivers it: what the owner of a rank can do.

    mpirun … python -m bench.attack.record FOLDER [--opened] -- OPTIONS OF TPIMPI

writes FOLDER/rank-R.messages, see `messages`. Nothing of tpimpi is touched: it finds a communicator that notes what goes
through it, in the place of MPI's. With `--opened` also what the library of ciphers has opened for this process, in
FOLDER/rank-R.opened: a rank's owner can read its process, sealed links or not.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import mpi4py

from bench.attack.messages import HEAD, RECEIVED, SENT
from tpimpi.system.launcher import launched_rank

FORWARDED = {
    "rank",
    "size",
    "Abort",
    "Get_rank",
    "Get_size",
    "Iallreduce",
    "Split_type",
}  # of a communicator; and what is below


class Log:
    """A file of messages; several threads write to it."""

    def __init__(self, path: Path) -> None:
        self._file: BinaryIO = path.open("wb", buffering=0)  # a process that ends at once leaves what there is
        self._lock = threading.Lock()

    def write(self, direction: int, communicator: int, peer: int, tag: int, data: bytes) -> None:
        with self._lock:
            self._file.write(HEAD.pack(direction, communicator, peer, tag, len(data)) + data)


class RecordedRequest:
    """A receive that is noted when it is done, before anybody has seen its bytes."""

    def __init__(self, request: Any, buffer: Any, note: Callable[[int, int, bytes], None], status: Any) -> None:
        self._request, self._buffer, self._note, self._status = request, buffer, note, status

    def Test(self, status: Any = None) -> bool:  # noqa: N802
        status = self._status() if status is None else status
        done: bool = self._request.Test(status)
        if done and self._note is not None:
            size = status.Get_count(mpi4py.MPI.BYTE)
            self._note(status.Get_source(), status.Get_tag(), bytes(memoryview(self._buffer).cast("B")[:size]))
            self._note = None  # type: ignore[assignment]
        return done


class RecordedMessage:
    """A message that was found, and is yet to be received."""

    def __init__(self, message: Any, communicator: RecordedCommunicator) -> None:
        self._message, self._communicator = message, communicator

    def Irecv(self, buffer: tuple[Any, Any]) -> RecordedRequest:  # noqa: N802
        return self._communicator.recorded(self._message.Irecv(buffer), buffer[0])


class RecordedCommunicator:
    """A communicator that notes what is sent and received, and has nothing that it would not note.

    A `buffer` comes with its datatype, which is bytes."""

    made = 0

    def __init__(self, comm: Any, log: Log) -> None:
        self._comm, self._log = comm, log
        self._number = RecordedCommunicator.made
        RecordedCommunicator.made += 1

    def __getattr__(self, name: str) -> Any:
        if name not in FORWARDED:
            raise AssertionError(f"tpimpi uses {name} of a communicator, which is not recorded")
        return getattr(self._comm, name)

    def __eq__(self, other: object) -> bool:
        return bool(self._comm == other)

    __hash__ = None  # type: ignore[assignment]

    def Clone(self) -> RecordedCommunicator:  # noqa: N802
        return RecordedCommunicator(self._comm.Clone(), self._log)

    def Split(self, color: int, key: int) -> RecordedCommunicator:  # noqa: N802
        return RecordedCommunicator(self._comm.Split(color, key), self._log)

    def Isend(self, buffer: tuple[Any, Any], dest: int, tag: int) -> Any:  # noqa: N802
        self._log.write(SENT, self._number, dest, tag, bytes(memoryview(buffer[0]).cast("B")))
        return self._comm.Isend(buffer, dest=dest, tag=tag)

    def Irecv(self, buffer: tuple[Any, Any], source: int, tag: int) -> RecordedRequest:  # noqa: N802
        return self.recorded(self._comm.Irecv(buffer, source=source, tag=tag), buffer[0])

    def Improbe(self, source: int, tag: int, status: Any) -> RecordedMessage | None:  # noqa: N802
        message = self._comm.Improbe(source=source, tag=tag, status=status)
        return None if message is None else RecordedMessage(message, self)

    def recorded(self, request: Any, buffer: Any) -> RecordedRequest:
        def note(source: int, tag: int, data: bytes) -> None:
            self._log.write(RECEIVED, self._number, source, tag, data)

        return RecordedRequest(request, buffer, note, mpi4py.MPI.Status)


class RecordedMPI:
    """mpi4py.MPI with a world that is recorded. It is imported, and MPI started, when the program first asks for something,
    and not before it has said how."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._world: RecordedCommunicator | None = None

    def __getattr__(self, name: str) -> Any:
        module = importlib.import_module("mpi4py.MPI")
        mpi4py.MPI = self  # type: ignore[assignment]  # importing has put the module there
        if name != "COMM_WORLD":
            return getattr(module, name)
        if self._world is None:
            self._world = RecordedCommunicator(module.COMM_WORLD, self._log)
        return self._world


def main() -> None:
    at = sys.argv.index("--")
    folder, *flags = sys.argv[1:at]
    rank = launched_rank()
    mpi4py.MPI = RecordedMPI(Log(Path(folder) / f"rank-{rank}.messages"))  # type: ignore[assignment]
    if flags == ["--opened"]:
        from bench.attack.opened import record_opened

        record_opened(Path(folder) / f"rank-{rank}.opened")
    from tpimpi.cli.main import main as tpimpi

    tpimpi(sys.argv[at + 1 :])


if __name__ == "__main__":
    main()

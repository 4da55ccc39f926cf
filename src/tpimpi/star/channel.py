"""Messages between two ranks: started, then tested between short sleeps until they are done; never blocking inside MPI.

So a rank leaves its core to its own reader, or to another rank, while it waits, and notices when a deadline has passed.
"""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import Bytes
from tpimpi.errors import LostError, StarError, UnsealError

if TYPE_CHECKING:
    from mpi4py import MPI

    from tpimpi.star.seal import Seal

CONTROL, HIDDEN, PARTIAL, SUM, NOTE, CLOCK, BULK, ECHO, HANDSHAKE = range(1, 10)  # tags; see the package's docstring

CHECKSUM_BYTES, SEAL_BYTES = 8, 16  # behind a message: the one, or the other
# Of one message; by those of a handshake nobody has proved yet who he is.
MAX_HANDSHAKE_BYTES, MAX_BYTES = 1 << 20, (1 << 31) - 1
POOLED_FROM_BYTES = 1 << 14  # buffers from this size on are kept for the next messages
POOLED_BYTES_PER_SIZE = 1 << 25  # the most that is kept of all buffers of one size
CHECK_HOST_HINT = "see that it is up and reachable (python -m tpimpi doctor --hostfile FILE)"
# How long a rank polls before its first sleep, where the link is fast and where it is not.
LONG_POLL_S, SHORT_POLL_S = 200e-6, 20e-6
SHORTEST_SLEEP_S = 25e-6
LONGEST_SLEEP_S = 0.001  # between two tests, while other ranks compute
LONGEST_IDLE_SLEEP_S = 0.015  # between two tests, while a user types or a model is sliced
LONGEST_REST_S, REST_PART = (
    0.05,
    240,
)  # the same after some seconds: this part of the time waited so far, at most so long


_CHECKSUM = struct.Struct("=Q")


@dataclass(slots=True)
class Frame:
    """A message that is being received: `buffer` gets its bytes, which are `data`, and what is behind them; if that is right
    they go to `target`, where there is one. `status` says how it came, `number` is the seal's."""

    buffer: Bytes
    data: Bytes
    target: Bytes | None
    status: MPI.Status
    number: int = 0


@dataclass(slots=True)
class Pending:
    """Messages that are to be done before their owner can go on: of the ranks `peers`; `frames` says where those that are
    received go (None: a send)."""

    requests: Sequence[MPI.Request]
    peers: Sequence[int]
    frames: Sequence[Frame | None]
    tag: int = 0
    done: int = 0  # so many of them, from the front, are
    lent: list[Bytes] = field(default_factory=list)  # buffers that are free again when all are
    not_before: float = 0.0  # a time.monotonic() value, before which it is no use to look
    behind: Pending | None = None  # looked at too: what comes early is opened while this one is awaited
    counted: bool = True  # False: no messages between two ranks


class BufferPool:
    """Buffers of messages for the next ones: in new memory every 4 KiB cost a page fault, a fifth of a large sum's time."""

    def __init__(self) -> None:
        self._free: dict[int, list[Bytes]] = {}  # by size, a power of two; lists, as several threads come here

    def take(self, nbytes: int) -> Bytes:
        """uint8 [nbytes], whatever is in it."""
        if nbytes < POOLED_FROM_BYTES:
            return np.empty(nbytes, np.uint8)
        size = 1 << (nbytes - 1).bit_length()
        try:
            return self._free[size].pop()[:nbytes]
        except LookupError:
            return np.empty(size, np.uint8)[:nbytes]

    def give(self, buffer: Bytes) -> None:
        """Give back, once, what `take` gave, or a part of it; nobody may use it after that."""
        whole = buffer.base
        if isinstance(whole, np.ndarray) and whole.size >= POOLED_FROM_BYTES:
            free = self._free.setdefault(whole.size, [])
            if len(free) < POOLED_BYTES_PER_SIZE // whole.size:
                free.append(whole)

    def clear(self) -> None:
        """Free all of them."""
        self._free.clear()


class Channel:
    """One rank's messages, over the communicator `comm`.

    Each message ends with a checksum of CHECKSUM_BYTES, the XXH3-64 of its other bytes with the tag as seed (BULK has none:
    tiles have checksums of their own). So a message that was damaged, cut off or meant for something else is an error. Where
    there is a `seal`, all messages are encrypted, and end with its SEAL_BYTES in place of the checksum.
    """

    seal: Seal | None = None

    latency: float | None = None  # seconds one way, once it was measured: sleeps are short against it
    name: Callable[[int], str] = staticmethod("rank {}".format)  # of a rank, for messages
    awaited: tuple[int, ...] = ()  # the ranks that are waited for right now, within a deadline
    # The ranks from which a message is to come, whether or not there is a deadline.
    awaited_messages: tuple[int, ...] = ()

    def __init__(self, comm: MPI.Intracomm) -> None:
        from mpi4py import MPI

        self.comm, self.mpi_error = comm, MPI.Exception
        self._status, self._byte = MPI.Status, MPI.BYTE
        self.rank, self.size = comm.rank, comm.size
        self.buffers = BufferPool()
        self.last_heard: dict[int, float] = {}  # when the last message of each rank came, time.monotonic()
        self.sent = [0] * comm.size  # messages to each rank that are gone
        self.received = [0] * comm.size  # messages of each rank that came
        _fine_timers()

    def send(self, array: npt.NDArray[Any], to: int, tag: int) -> Pending:
        """Begin to send a contiguous array. It is copied, but for BULK, which may not change until that is done."""
        return self.send_to(array, (to,), tag)

    def send_to(self, array: npt.NDArray[Any], ranks: Sequence[int], tag: int) -> Pending:
        """Begin to send the same array to several ranks."""
        data = _bytes(array)
        if self.seal is not None:
            return self._send_sealed(data, ranks, tag)
        frame, lent = data, []
        if tag != BULK:
            lent.append(frame := self.buffers.take(data.size + CHECKSUM_BYTES))
            frame[: data.size] = data
            _CHECKSUM.pack_into(frame, data.size, xxhash.xxh3_64_intdigest(data, tag))
        requests = [self._isend(frame, rank, tag) for rank in ranks]
        return Pending(requests, ranks, [None] * len(requests), tag, lent=lent)

    def _send_sealed(self, data: Bytes, ranks: Sequence[int], tag: int) -> Pending:
        assert self.seal is not None
        # Each has keys of its own. All are sealed before the first is sent: MPI's calls push the cipher's code and keys out
        # of the caches, and the other way round.
        frames = [self.buffers.take(data.size + SEAL_BYTES) for _ in ranks]
        for rank, frame in zip(ranks, frames, strict=True):
            self.seal.close(rank, tag, data, frame)
        requests = [self._isend(frame, rank, tag) for rank, frame in zip(ranks, frames, strict=True)]
        return Pending(requests, ranks, [None] * len(requests), tag, lent=frames)

    def _isend(self, frame: Bytes, rank: int, tag: int) -> MPI.Request:
        try:
            # With its datatype, which mpi4py would look for in what an array says of itself: half of the call's time.
            return self.comm.Isend((frame, self._byte), dest=rank, tag=tag)
        except self.mpi_error as error:
            raise self._lost(rank, error) from error

    def _tail(self, tag: int) -> int:
        """How many bytes a message has behind its own."""
        if self.seal is not None:
            return SEAL_BYTES
        return 0 if tag == BULK else CHECKSUM_BYTES

    def receive(self, array: npt.NDArray[Any], source: int, tag: int) -> Pending:
        """Begin to receive into a contiguous array, which is filled exactly, once all of the message is there."""
        target = _bytes(array)
        return self._receive(self._frame(target.size, tag, target), source, tag)

    def expect(self, nbytes: int, source: int, tag: int) -> tuple[Pending, Bytes]:
        """Begin to receive so many bytes: what is to be done, and where they are then: uint8 [nbytes], which whoever is done
        with them gives back to `buffers`."""
        frame = self._frame(nbytes, tag)
        return self._receive(frame, source, tag), frame.data

    def _frame(self, nbytes: int, tag: int, target: Bytes | None = None) -> Frame:
        """Room for a message of so many bytes."""
        buffer = self.buffers.take(nbytes + self._tail(tag))
        return Frame(buffer, buffer[:nbytes], target, self._status())

    def _receive(self, frame: Frame, source: int, tag: int) -> Pending:
        if self.seal is not None:
            frame.number = self.seal.expect(source, tag)
        try:
            request = self.comm.Irecv((frame.buffer, self._byte), source=source, tag=tag)
        except self.mpi_error as error:
            raise self._lost(source, error) from error
        return Pending([request], [source], [frame], tag)

    def test(self, pending: Pending) -> bool:
        """Whether all of `pending` is done. Raises StarError where a message is not what was sent, or not what is due."""
        if pending.behind is not None:
            self.test(pending.behind)
        try:
            for request in pending.requests[pending.done :]:
                frame = pending.frames[pending.done]
                if not (request.Test() if frame is None else request.Test(frame.status)):
                    return False
                peer = pending.peers[pending.done]
                if frame is None:
                    self.sent[peer] += pending.counted
                else:
                    self._arrived(frame, peer, pending.tag)
                pending.done += 1
        except self.mpi_error as error:
            raise self._lost(pending.peers[pending.done], error) from error
        while pending.lent:
            self.buffers.give(pending.lent.pop())
        return True

    def _arrived(self, frame: Frame, peer: int, tag: int) -> None:
        """A message has come. Raises StarError where it is not what was sent, or not what is due."""
        if (found := frame.status.Get_count(self._byte)) != frame.buffer.size:
            raise StarError(f"{self.name(peer)} sent {found} bytes where {frame.buffer.size} were due")
        self._open(frame, peer, tag)
        if frame.target is not None:
            self.buffers.give(frame.buffer)
        self._heard(peer)

    def _heard(self, peer: int) -> None:
        self.received[peer] += 1
        self.last_heard[peer] = time.monotonic()

    def _lost(self, peer: int, error: MPI.Exception) -> LostError:
        """What is said where MPI fails: it has no other reason, in whatever call it finds out."""
        return LostError(
            f"lost the connection to {self.name(peer)} ({error.Get_error_string()}): its process died, or the machine or "
            f"its network is gone; {CHECK_HOST_HINT}; the run ends here"
        )

    def wait(self, pending: Pending, deadline: float | None) -> None:
        """Wait until all of `pending` is done; however long it takes, where there is no deadline (a time.monotonic())."""
        if self.test(pending):
            return
        backoff = self._backoff(deadline)
        try:
            early = pending.not_before - time.monotonic()
            if deadline is not None and early > LONG_POLL_S:  # where the link is faster than that, polling is
                early = min(early, deadline - time.monotonic())
                self._say_awaited(pending, deadline)
                time.sleep(max(0.0, early))
            # Two looks each time: over TCP MPI may take a message in at one, and hand it out at the next.
            said = -1
            while not (self.test(pending) or self.test(pending)):
                if pending.done != said:
                    self._say_awaited(pending, deadline)
                    said = pending.done
                if deadline is not None and time.monotonic() > deadline:
                    left = zip(pending.requests[pending.done :], self.awaited, strict=True)
                    raise self._no_answer([peer for request, peer in left if not request.Test()], backoff.elapsed())
                backoff.sleep()
        finally:
            self.awaited = self.awaited_messages = ()

    def _say_awaited(self, pending: Pending, deadline: float | None) -> None:
        left = pending.peers[pending.done :]
        self.awaited = () if deadline is None else tuple(left)
        due = zip(left, pending.frames[pending.done :], strict=True)
        self.awaited_messages = tuple(peer for peer, frame in due if frame is not None)

    def take(self, source: int, tag: int, deadline: float | None) -> Bytes:
        """The next message of that tag, of whatever size: uint8 [bytes]."""
        status = self._status()
        backoff = self._backoff(deadline)
        self.awaited, self.awaited_messages = (source,) if deadline is not None else (), (source,)
        try:
            while (message := self.comm.Improbe(source=source, tag=tag, status=status)) is None:
                if deadline is not None and time.monotonic() > deadline:
                    raise self._no_answer([source], backoff.elapsed())
                backoff.sleep()
            size, most = status.Get_count(self._byte), MAX_HANDSHAKE_BYTES if tag == HANDSHAKE else MAX_BYTES
            if not 0 <= size <= most:  # negative where MPI cannot count so many
                raise StarError(f"{self.name(source)} sent {size} bytes where {most} at most were due")
            if size < (tail := self._tail(tag)):
                raise StarError(f"{self.name(source)} sent {size} bytes where {tail} or more were due")
            buffer = np.empty(size, np.uint8)
            frame = Frame(buffer, buffer[: size - tail], None, status)
            if self.seal is not None:
                frame.number = self.seal.expect(source, tag)
            pending = Pending([message.Irecv((buffer, self._byte))], [source], [frame], tag)
        except self.mpi_error as error:
            raise self._lost(source, error) from error
        finally:
            self.awaited = self.awaited_messages = ()
        self.wait(pending, deadline)
        return frame.data

    def _no_answer(self, late: Sequence[int], seconds: float) -> StarError:
        """What is said of ranks that did not answer in time."""
        names = ", ".join(self.name(peer) for peer in sorted(set(late)))
        return StarError(
            f"nothing came from {names} for {seconds:.0f} s; see whether that machine is up and reachable, "
            "or allow more with --timeout"
        )

    def _open(self, frame: Frame, source: int, tag: int) -> None:
        """Put a message's bytes where they go, if what is behind them is right. Raises StarError."""
        data = frame.data
        if self.seal is not None:
            try:
                self.seal.open(source, tag, frame.number, frame.buffer, data if frame.target is None else frame.target)
            except UnsealError:
                raise StarError(
                    f"a message from {self.name(source)} is not the one that it sealed for this rank ({frame.buffer.size} "
                    f"bytes, tag {tag}, number {frame.number}): it was changed, repeated, left out or exchanged on its way; "
                    "something on the network does that"
                ) from None
            return
        if tag != BULK and _CHECKSUM.unpack_from(frame.buffer, data.size)[0] != xxhash.xxh3_64_intdigest(data, tag):
            raise StarError(
                f"a message of {self.name(source)} was damaged on its way ({frame.buffer.size} bytes, tag {tag}); check the "
                "network, and that every host has the same tpimpi"
            )
        if frame.target is not None:
            frame.target[:] = data

    def _backoff(self, deadline: float | None) -> _Backoff:
        if deadline is None:
            return _Backoff(self.latency, LONGEST_IDLE_SLEEP_S, LONGEST_REST_S)
        return _Backoff(self.latency, LONGEST_SLEEP_S)


def _bytes(array: npt.NDArray[Any]) -> Bytes:
    assert array.flags.c_contiguous
    return array.reshape(-1).view(np.uint8)


class _Backoff:
    """Polls first, as long as the fastest link takes, then sleeps in steps that are short against the link's latency, or the
    time waited so far, up to `longest` seconds, and after a long time up to `rest`.

    Over a link of milliseconds polling would only take the core from this rank's reader, and from its processor share.
    """

    def __init__(self, latency: float | None, longest: float, rest: float = 0.0) -> None:
        """`latency`: seconds one way, None where it was not measured."""
        self._longest, self._rest = longest, rest
        self._polls = SHORT_POLL_S if latency is not None and latency > LONG_POLL_S else LONG_POLL_S
        self._step = SHORTEST_SLEEP_S if latency is None else max(SHORTEST_SLEEP_S, latency / 8)
        self.began = time.monotonic()

    def elapsed(self) -> float:
        return time.monotonic() - self.began

    def sleep(self) -> None:
        elapsed = self.elapsed()
        if elapsed < self._polls:
            os.sched_yield()
        else:
            longest = max(self._longest, min(self._rest, elapsed / REST_PART))
            time.sleep(min(max(self._step, elapsed / 24), longest))


def _fine_timers() -> None:
    """Let this thread's sleeps end on time: Linux otherwise adds 50 us to each (prctl PR_SET_TIMERSLACK)."""
    pr_set_timerslack = 29
    if platform.system() == "Linux":
        ctypes.CDLL(None).prctl(pr_set_timerslack, 1000, 0, 0, 0)

"""One rank's end of the star."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import numpy.typing as npt

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.errors import StarError
from tpimpi.star.allreduce import ALGORITHMS, IN_RANK_ORDER, Allreduce, Background, parse_rule
from tpimpi.star.channel import BULK, CONTROL, ECHO, HIDDEN, NOTE, Channel, Pending
from tpimpi.star.clocks import answer_with_clock, clock_offset
from tpimpi.star.codec import Wire, wire_of
from tpimpi.star.heartbeat import Heartbeat, end_without_mpi
from tpimpi.star.pieces import PartialWatch, PieceChannel, even_bounds
from tpimpi.star.tuning import ANSWER_TIMEOUT_S, LinkMeasurement, Links
from tpimpi.system.launcher import Rank

if TYPE_CHECKING:
    from mpi4py import MPI

Words = npt.NDArray[np.int64]

ALLREDUCES = ("auto", *ALGORITHMS)

DEFAULT_TIMEOUT_S = 600.0  # a rank waits so long for another's message in mid-run
PADDED_ROWS = 32
ABORT_GRACE_S = 10.0  # time that MPI gets to end the job after an error


def _take_back(array: F32, flat: F32) -> None:
    """Put what came into `flat` into the array that it stands for, where that is another one."""
    if flat.size != array.size:
        array.reshape(-1)[:] = flat[: array.size]


class Star:
    """One rank's end of the star. `comm` is an MPI communicator, or None for a run of a single rank."""

    heartbeat: Heartbeat | None = None

    def __init__(
        self, comm: MPI.Intracomm | None, *, timeout: float = DEFAULT_TIMEOUT_S, allreduce: str = "star"
    ) -> None:
        self._channel = Channel(comm) if comm else None
        self._smaller = 0  # stars made of this one
        self._comm = comm
        self.rank = Rank(comm.rank, comm.size, platform.node()) if comm else Rank(0, 1, platform.node())
        self.timeout = timeout
        self.algorithm = allreduce
        self.wire = Wire()
        self.threads = False  # MPI was started for several
        self._background = Background()
        self._turn = 0  # sums begun
        self._row_multiple = 1
        self.seconds = 0.0  # spent in allreduces and broadcasts
        self._others = range(1, self.rank.size)

    @property
    def algorithm(self) -> str:
        """How sums are made: an algorithm, or a rule (see `allreduce.parse_rule`)."""
        return self._algorithm

    @algorithm.setter
    def algorithm(self, rule: str) -> None:
        self._algorithm, self._rule = rule, parse_rule(rule)

    def configure(self, *, timeout: float, allreduce: str, wire: str) -> None:
        """How long a rank waits for another's message, in seconds; the rule by which sums are made; one of WIRES.

        Every rank calls it with the same values. Raises InputError for a rule that makes no sense.
        """
        self.timeout, self.algorithm, self.wire = timeout, allreduce, wire_of(wire)

    # Sums and hidden vectors

    def allreduce(self, array: F32) -> None:
        """Replace `array` (f32, contiguous, the same shape on every rank) by its sum over all ranks, in place."""
        self.start(array).wait()

    def start(
        self, array: F32, *, background: bool = False, exact: bool = False, watch: PartialWatch | None = None
    ) -> Allreduce:
        """Begin the sum of `array` over all ranks; it may not be touched until the sum's `wait` has returned.

        It goes on while one waits for it or polls it, and with `background` also while this rank computes. An `exact` sum
        travels in f32, whatever the wire is. `watch` sees the partials that come to this rank.

        Several may be under way; every rank starts them in the same order, and ends them in that order.
        """
        assert array.dtype == np.float32 and array.flags.c_contiguous
        if self._channel is None or self.rank.size == 1 or array.size == 0:
            return Allreduce(None, iter(()), 0, self._spent)
        began = time.monotonic()
        flat = self._padded(array)
        pieces = self._piece_channel(self.wire_of_sum(exact=exact), watch)
        steps = ALGORITHMS[self._algorithm_for(flat.size)](pieces, flat)
        allreduce = Allreduce(self._channel, steps, self.timeout, self._spent, lambda: _take_back(array, flat))
        if background and self.threads:
            self._background.add(allreduce)
        self._spent(time.monotonic() - began)
        return allreduce

    def wire_of_sum(self, *, exact: bool) -> Wire:
        """How a sum's numbers travel."""
        return Wire() if exact else self.wire

    def _algorithm_for(self, count: int) -> str:
        return next(name for most, name in self._rule if count <= most)

    def parts_of_sum(self, rows: int, width: int) -> list[int] | None:
        """Where in a sum of [rows, width] the part begins that each rank adds for the hub, and where the last one ends: of
        its own part, the first, the hub gets every rank's partial. None where partials are not added in rank order."""
        count = (rows + -rows % self._row_multiple) * width
        algorithm = self._algorithm_for(count)
        if algorithm not in IN_RANK_ORDER:
            return None
        return even_bounds(count, self.rank.size) if algorithm == "mesh" else [0] + [count] * self.rank.size

    def _piece_channel(self, wire: Wire, watch: PartialWatch | None = None) -> PieceChannel:
        """The messages of the next sum."""
        assert self._channel is not None
        self._turn += 1
        return PieceChannel(self._channel, wire, self._turn - 1, watch)

    def _spent(self, seconds: float) -> None:
        self.seconds += seconds

    def broadcast(self, array: F32, *, exact: bool = False) -> None:
        """Fill `array` (f32, contiguous) on every rank with the hub's, as the wire has it, or in f32 where it is to be
        `exact`: the same bits everywhere."""
        if self._channel is None or self.rank.size == 1:
            return
        began = time.monotonic()
        deadline, flat = began + self.timeout, self._padded(array)
        pieces = PieceChannel(self._channel, Wire() if exact else self.wire)
        cut = pieces.cut(0, flat.size)
        if self.rank.is_hub:
            for piece in cut:
                pieces.publish(flat[piece], self._others, HIDDEN)
            self._channel.wait(pieces.sent(), deadline)
        else:
            for piece, arrival in [(piece, pieces.expect(piece, 0, HIDDEN)) for piece in cut]:
                self._channel.wait(arrival.pending, deadline)
                arrival.put(flat[piece])
        _take_back(array, flat)
        self.seconds += time.monotonic() - began

    def pad_rows(self, pad: bool) -> None:
        """From now on, with `pad`, arrays of rows are padded with zeros to a multiple of PADDED_ROWS rows on sealed links,
        so that who counts bytes on the network does not see how many there are. Every rank calls it alike."""
        self._row_multiple = PADDED_ROWS if pad and self.sealed else 1

    def _padded(self, array: F32) -> F32:
        """An array as it travels: flat, itself where there is nothing to pad."""
        flat, more = array.reshape(-1), -array.shape[0] % self._row_multiple
        return np.pad(flat, (0, more * (flat.size // array.shape[0]))) if more else flat

    # Control: a few whole numbers from the hub; what they mean is the engine's

    def send_words(self, words: Words) -> None:
        """Hub: send `words` (int64 [n]) to every other rank."""
        if self._channel is not None:
            self._channel.wait(self._channel.send_to(words, self._others, CONTROL), time.monotonic() + self.timeout)

    def receive_words(self) -> Words:
        """Other ranks: the hub's next words (int64 [n]), however many there are, and however long they take to come."""
        assert self._channel is not None
        data = self._channel.take(0, CONTROL, None)
        if data.size % 8:
            raise StarError(f"{self.rank_name(0)} sent {data.size} bytes, which are no whole numbers of 8")
        return data.view(np.int64)

    # Notes: short JSON texts before and after the computing

    def broadcast_note(self, note: bytes) -> None:
        """Hub: send `note` to every other rank."""
        if self._channel is not None:
            sends = self._channel.send_to(np.frombuffer(note, np.uint8), self._others, NOTE)
            self._channel.wait(sends, time.monotonic() + self.timeout)

    def receive_note(self) -> bytes:
        """Other ranks: the hub's next note, however long it takes."""
        assert self._channel is not None
        return self._channel.take(0, NOTE, None).tobytes()

    def gather_notes(self, note: bytes) -> list[bytes]:
        """Every rank gives a note; the hub gets all of them in rank order, the others an empty list."""
        if self._channel is None:
            return [note]
        deadline = time.monotonic() + self.timeout
        if self.rank.is_hub:
            return [note, *(self._channel.take(rank, NOTE, deadline).tobytes() for rank in self._others)]
        self._channel.wait(self._channel.send(np.frombuffer(note, np.uint8), 0, NOTE), deadline)
        return []

    # Bulk: tiles on their way to the rank that needs them

    def start_bulk(self, data: Bytes, rank: int) -> Pending:
        """Begin to send bytes (uint8 [n], untouched until they are gone) to a rank; `finish_bulk` is to follow."""
        assert self._channel is not None
        return self._channel.send(data, rank, BULK)

    def finish_bulk(self, pending: Pending) -> None:
        """Wait until what `start_bulk` began is gone."""
        assert self._channel is not None
        self._channel.wait(pending, time.monotonic() + self.timeout)

    def take_bulk(self, source: int) -> Bytes:
        """The next bytes that a rank sends with `start_bulk`, in the order in which it does: uint8 [n]."""
        assert self._channel is not None
        return self._channel.take(source, BULK, time.monotonic() + self.timeout)

    # Links

    def measure_links(self, largest: int = 0) -> Links:
        """Measure the links to rank 0; every rank calls it, and the hub alone says what is to be measured, and gets it.

        Latency always, in a tenth of a second or a few round trips; and where there are to be sums, of `largest` numbers at
        most, how long they take, over the wire that is set, for `tuning.choose`. Afterwards every rank's waiting suits the
        latency.
        """
        if self._channel is None or self.rank.size == 1:
            return Links([])

        def add(name: str, count: int) -> None:
            steps = ALGORITHMS[name](self._piece_channel(self.wire), np.zeros(count, np.float32))
            Allreduce(self._channel, steps, ANSWER_TIMEOUT_S, lambda seconds: None).wait()

        measuring = LinkMeasurement(self._channel, add)
        if self.rank.is_hub:
            return measuring.lead(largest)
        measuring.follow()
        return Links([])

    @property
    def latency(self) -> float | None:
        """Seconds one way, of the slowest link; None where none was measured."""
        return None if self._channel is None else self._channel.latency

    def ping(self, rank: int, values: F32) -> float:
        """Every rank calls it: seconds in which `values` (f32, flat, as long on every rank) go from the hub to `rank`, all
        of them, and then back, cut and packed as sums are; 0 on other ranks than the hub."""
        assert self._channel is not None
        pieces, deadline = PieceChannel(self._channel, self.wire), time.monotonic() + self.timeout
        if self.rank.index not in (0, rank):
            return 0.0
        other = rank if self.rank.is_hub else 0
        arrivals = [pieces.expect(piece, other, ECHO) for piece in pieces.cut(0, values.size)]
        began = time.monotonic()
        for hub in (True, False):
            if self.rank.is_hub == hub:
                for piece in pieces.cut(0, values.size):
                    pieces.publish(values[piece], [other], ECHO)
                self._channel.wait(pieces.sent(), deadline)
            else:
                for arrival in arrivals:
                    self._channel.wait(arrival.pending, deadline)
                    self._channel.buffers.give(arrival.data)
        return time.monotonic() - began if self.rank.is_hub else 0.0

    @property
    def library(self) -> str:
        """The MPI library, and its version."""
        if self._comm is None:
            return "no MPI"
        from mpi4py import MPI

        name, version = MPI.get_vendor()
        return f"{name} {'.'.join(map(str, version))}"

    # Clocks

    def clock_offsets(self, clock: Callable[[], float] = time.monotonic) -> list[float]:
        """Compare clocks; every rank calls it. The hub gets, in rank order, the seconds to add to each rank's `clock` to
        have its own (the first is 0); the others get an empty list. See `clocks`."""
        if self._channel is None:
            return [0.0]
        deadline = time.monotonic() + self.timeout
        if self.rank.is_hub:
            return [0.0, *(clock_offset(self._channel, rank, clock, deadline) for rank in self._others)]
        answer_with_clock(self._channel, clock, deadline)
        return []

    def free_buffers(self) -> None:
        """Give back the memory that is kept for messages to come."""
        if self._channel is not None:
            self._channel.buffers.clear()

    # A smaller star

    def first(self, ranks: int) -> Star | None:
        """A star of the first so many ranks, over a communicator of its own; None on the others. Every rank calls it."""
        if self._comm is None or self._channel is None:
            return Star(None)
        from mpi4py import MPI

        self._smaller += 1  # on every rank: the name of the new communicator
        comm: Any = self._comm.Split(0 if self.rank.index < ranks else MPI.UNDEFINED, self.rank.index)
        if comm == MPI.COMM_NULL:
            return None
        few = Star(comm, timeout=self.timeout, allreduce=self.algorithm)
        few.rank = replace(few.rank, host=self.rank.host)
        few.wire, few.threads = self.wire, self.threads
        if few._channel is not None:
            few._channel.latency = self._channel.latency
            if self._channel.seal is not None:
                few._channel.seal = self._channel.seal.derive(f"first {self._smaller}")
        return few

    @property
    def sealed(self) -> str | None:
        """The cipher by which all messages between ranks are sealed; None where they are not."""
        seal = None if self._channel is None else self._channel.seal
        return None if seal is None else seal.cipher

    @property
    def proved_hosts(self) -> tuple[str, ...]:
        """What the ranks are called by the keys that they have proved to have (see `secure`), in rank order; none where
        links are not sealed."""
        seal = None if self._channel is None else self._channel.seal
        return () if seal is None else seal.hosts

    def rank_name(self, rank: int) -> str:
        """How messages name a rank: "r2 home-pi", or "rank 2" where its host is not known."""
        return f"rank {rank}" if self._channel is None else self._channel.name(rank)

    def set_rank_names(self, name: Callable[[int], str]) -> None:
        """Ranks are named so in messages."""
        if self._channel is not None:
            self._channel.name = name

    @property
    def has_heartbeat(self) -> bool:
        """Whether it is noticed soon that another rank hangs, or that there is none."""
        return self.heartbeat is not None or self.rank.size == 1

    def allow_silence(self, seconds: float) -> None:
        """Hub: a rank that gives no sign of life for so long is gone, on every rank."""
        if self.heartbeat is not None:
            self.heartbeat.allow_silence(seconds)

    def tell_end(self, tell: Callable[[str], None]) -> None:
        """Where the heartbeat ends the run, `tell` is called with the reason before that, in its thread."""
        if self.heartbeat is not None:
            self.heartbeat.at_end = tell

    def set_hosts(self, hosts: Sequence[str]) -> None:
        """Hub: the hosts of all ranks, by which messages name them."""
        if self.heartbeat is not None:
            self.heartbeat.set_hosts(hosts)

    def close(self, *, failed: bool = False) -> None:
        """Leave in order: the others are told that this rank ends.

        Where the run has `failed`, the launcher ends ranks while others are still leaving MPI, which then may wait for
        them for ever: it gets ABORT_GRACE_S seconds for that.
        """
        if failed and self.rank.size > 1:
            end_without_mpi(self.rank, ABORT_GRACE_S)
        if self.heartbeat is not None:
            self.heartbeat.close()

    def abort(self, code: int) -> NoReturn:
        """End the job on every rank, now."""
        if self.rank.size > 1:
            end_without_mpi(self.rank, ABORT_GRACE_S)
        if self._comm is not None:
            self._comm.Abort(code)
        os._exit(code)

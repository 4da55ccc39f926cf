"""An array cut into pieces that go out one after the other, each packed as the wire says.

Pieces let a large sum flow: while a hub adds one, it receives the next and sends the one before. Few large ones cost the
processor least. They stay just below the size from which an MPI library asks the other side before it sends (rendezvous:
two hops more; Open MPI over TCP from 64 KiB on, unless it is told EAGER_BYTES). Where hops are short, as in shared memory,
the largest of those were the fastest; over links of milliseconds smaller ones, as they say below.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from tpimpi.compute.arrays import F32, Bytes
from tpimpi.compute.formats.blocks_of_32 import BLOCK_WEIGHTS
from tpimpi.compute.formats.packed import row_bytes
from tpimpi.star.channel import PARTIAL, Channel, Pending
from tpimpi.star.codec import Wire

EAGER_BYTES = 1 << 18  # Open MPI is told to send messages up to this size at once; its own header included
# The most numbers of one message of a sum through one hub, and of a sum where every rank has a part. Multiples of 32, a
# block of q8_0.
PIECE_NUMBERS, PIECE_OF_PART_NUMBERS = 32_512, 43_776
# A sum through one hub, and a part, is cut into at least so many pieces, unless they would be smaller than the third.
MIN_PIECES, MIN_PIECES_OF_PART, MIN_PIECE_NUMBERS = 8, 2, 16_256
# Where the measured latency is below SHORT_HOP_S, pieces are not smaller than this.
LARGE_PIECE_NUMBERS, SHORT_HOP_S = 65_024, 100e-6

TURNS = 1024  # sums in a row that have different tags
TAGS_PER_TURN = 16  # MPI allows tags up to 32767 at least


@dataclass
class PartialWatch:
    """Keeps a run of the numbers of every partial of a sum that comes to this rank, as they came: [run] by rank."""

    run: slice
    partials: dict[int, F32] = field(default_factory=dict)

    def see(self, rank: int, piece: slice, values: F32) -> None:
        """The numbers of `piece` of a rank's partial are these, [piece]."""
        first, last = max(self.run.start, piece.start), min(self.run.stop, piece.stop)
        if first < last:
            missing = np.full(self.run.stop - self.run.start, np.nan, np.float32)
            kept = self.partials.setdefault(rank, missing)
            kept[first - self.run.start : last - self.run.start] = values[first - piece.start : last - piece.start]


@dataclass(slots=True)
class IncomingPiece:
    """A piece of `source`'s numbers that is being received: bytes `data`, once `pending` is done."""

    pending: Pending
    data: Bytes
    piece: slice
    source: int
    pieces: PieceChannel
    watch: PartialWatch | None = None

    def put(self, into: F32) -> None:
        """The numbers, [piece]; their bytes are gone then."""
        into[:] = self._values()
        self.pieces.channel.buffers.give(self.data)

    def add(self, to: F32) -> None:
        """Add them, [piece]; their bytes are gone then."""
        to += self._values()
        self.pieces.channel.buffers.give(self.data)

    def _values(self) -> F32:
        values = self.pieces.wire.unpack(self.data, self.piece.stop - self.piece.start)
        if self.watch is not None:
            self.watch.see(self.source, self.piece, values)
        return values


class PieceChannel:
    """The messages of one sum, or of a hidden vector; several may be under way, each with a `turn` of its own."""

    def __init__(self, channel: Channel, wire: Wire, turn: int = 0, watch: PartialWatch | None = None) -> None:
        """`watch` sees the partials that come."""
        self.channel, self.wire, self._watch = channel, wire, watch
        self.rank, self.size = channel.rank, channel.size
        # The hub told all ranks the same latency, so all cut alike.
        short = channel.latency is not None and channel.latency < SHORT_HOP_S
        self._least = LARGE_PIECE_NUMBERS if short else MIN_PIECE_NUMBERS
        self._shift = TAGS_PER_TURN * (turn % TURNS)
        self._sends: list[Pending] = []

    def cut(self, first: int, last: int) -> Sequence[slice]:
        """The numbers from `first` to `last`, in pieces of about the same size: for a sum that flows through one hub."""
        return self._cut_evenly(first, last, MIN_PIECES, PIECE_NUMBERS)

    def _cut_evenly(self, first: int, last: int, pieces: int, most: int) -> Sequence[slice]:
        return _cut(first, last, max(self._least, min(most, (last - first) // pieces)))

    def parts(self, count: int) -> list[Sequence[slice]]:
        """The pieces of each rank's part of `count` numbers."""
        cuts = itertools.pairwise(even_bounds(count, self.size))
        return [self._cut_evenly(first, last, MIN_PIECES_OF_PART, PIECE_OF_PART_NUMBERS) for first, last in cuts]

    def expect(self, piece: slice, source: int, tag: int) -> IncomingPiece:
        """Begin to receive the numbers of `piece`."""
        count = piece.stop - piece.start
        pending, data = self.channel.expect(_wire_bytes(self.wire.format, count), source, tag + self._shift)
        return IncomingPiece(pending, data, piece, source, self, self._watch if tag == PARTIAL else None)

    def send(self, values: F32, to: int, tag: int) -> Pending:
        """Begin to send numbers."""
        return self.channel.send(self.wire.pack(values), to, tag + self._shift)

    def forward(self, data: Bytes, ranks: Sequence[int], tag: int) -> None:
        """Begin to send packed numbers."""
        if ranks:
            self._sends.append(self.channel.send_to(data, ranks, tag + self._shift))

    def publish(self, values: F32, ranks: Sequence[int], tag: int) -> None:
        """Begin to send the final numbers of a piece. What the receivers make of them is put into `values`, so that all
        have the same bits."""
        data = self.wire.pack(values)
        if self.wire.format != "f32":
            values[:] = self.wire.unpack(data, values.size)
        self.forward(data, ranks, tag)

    def sent(self) -> Pending:
        """All that `forward` and `publish` began."""
        sends, self._sends = self._sends, []
        return Pending(
            [request for pending in sends for request in pending.requests],
            [peer for pending in sends for peer in pending.peers],
            [None for pending in sends for _ in pending.requests],
            lent=[buffer for pending in sends for buffer in pending.lent],
        )


# Sums of a few lengths come again with every token.
_wire_bytes = functools.lru_cache(maxsize=256)(row_bytes)


@functools.lru_cache(maxsize=256)
def _cut(first: int, last: int, most: int) -> tuple[slice, ...]:
    """The numbers from `first` to `last` in pieces of `most` at most, about the same size."""
    cuts = even_bounds(last - first, -(-(last - first) // most))
    return tuple(slice(first + start, first + stop) for start, stop in itertools.pairwise(cuts))


def even_bounds(count: int, parts: int) -> list[int]:
    """Where the parts of `count` numbers begin and end, as equal as whole blocks of 32 allow."""
    blocks = -(-count // BLOCK_WEIGHTS)
    return [min(count, blocks * part // parts * BLOCK_WEIGHTS) for part in range(parts + 1)] if parts else [0]

"""Numbers on the wire: f32 as they are, or packed as bf16 or q8_0, and cut into pieces that go out one after the other.

Pieces let a large sum flow: while a hub adds one, it receives the next and sends the one before. Few large ones cost the
processor least. They stay just below the size from which an MPI library asks the other side before it sends (rendezvous:
two hops more; Open MPI over TCP from 64 KiB on, unless it is told EAGER). Where hops are short, as in shared memory, the
largest of those were the fastest; over links of milliseconds smaller ones, as they say below.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.compute.backends import load_quantizer
from tpimpi.compute.formats.packed import BLOCK_WEIGHTS, F32, Bytes, decode, encode, row_bytes
from tpimpi.compute.formats.quantize import Quantizer, quantize
from tpimpi.errors import StarError
from tpimpi.star.channel import Pending, Post

WIRES = ("f32", "bf16", "q8_0")
EAGER = 1 << 18  # bytes, with the library's own, up to which Open MPI is to send at once
# Numbers of a message, at most, of a sum through one hub, and where everyone has a part; multiples of 32, a block of q8_0.
PIECE, PIECE_OF_PART = 32_512, 43_776
# As many pieces at least make a sum through one hub, and a part; unless they were of less numbers than the last.
FLOWING, FLOWING_PART, LEAST_PIECE = 8, 2, 16_256
LARGE_PIECE, SHORT_HOP = 65_024, 100e-6  # numbers where the measured latency is less, in seconds

TURNS = 1024  # sums that are told apart by their tags
TAGS = 16  # tags that a turn has to itself; MPI allows 32767 at least


@dataclass(frozen=True)
class Wire:
    """How numbers travel: `format` is one of WIRES."""

    format: str = "f32"
    quantizer: Quantizer = quantize

    def pack(self, values: F32) -> Bytes:
        """Numbers [n] as bytes [row_bytes]. f32 is not copied. StarError for numbers that the format does not have."""
        if self.format == "f32":
            return values.view(np.uint8)
        try:
            return encode(values.reshape(1, -1), self.format, self.quantizer).reshape(-1)
        except ValueError as error:
            raise StarError(f"a partial {error}, which --wire {self.format} cannot carry; use --wire f32") from error

    def unpack(self, data: Bytes, count: int) -> F32:
        """What `pack` made of `count` numbers: [count]. f32 is not copied."""
        if self.format == "f32":
            return data.view(np.float32)
        return decode(data.reshape(1, -1), self.format, count).reshape(-1)


@dataclass(frozen=True)
class Coming:
    """A piece that is being received: bytes `data`, once `pending` is done."""

    pending: Pending
    data: Bytes
    count: int
    mail: Mail

    def put(self, into: F32) -> None:
        """The numbers, [count]; their bytes are gone then."""
        into[:] = self._values()
        self.mail.post.spares.give(self.data)

    def add(self, to: F32) -> None:
        """Add them, [count]; their bytes are gone then."""
        to += self._values()
        self.mail.post.spares.give(self.data)

    def _values(self) -> F32:
        return self.mail.wire.unpack(self.data, self.count)


class Mail:
    """The messages of one sum, or of a hidden vector; several may be under way, each with a `turn` of its own."""

    def __init__(self, post: Post, wire: Wire, turn: int = 0) -> None:
        self.post, self.wire = post, wire
        self.rank, self.size = post.rank, post.size
        # The hub told all ranks the same latency, so all cut alike.
        short = post.latency is not None and post.latency < SHORT_HOP
        self._least = LARGE_PIECE if short else LEAST_PIECE
        self._shift = TAGS * (turn % TURNS)
        self._sends: list[Pending] = []

    def pieces(self, first: int, last: int) -> list[slice]:
        """The numbers from `first` to `last`, in pieces of about the same size: for a sum that flows through one hub."""
        return self._cut(first, last, FLOWING, PIECE)

    def _cut(self, first: int, last: int, pieces: int, most: int) -> list[slice]:
        most = max(self._least, min(most, (last - first) // pieces))
        cuts = bounds(last - first, -(-(last - first) // most))
        return [slice(first + start, first + stop) for start, stop in itertools.pairwise(cuts)]

    def parts(self, count: int) -> list[list[slice]]:
        """The pieces of each rank's part of `count` numbers."""
        cuts = itertools.pairwise(bounds(count, self.size))
        return [self._cut(first, last, FLOWING_PART, PIECE_OF_PART) for first, last in cuts]

    def expect(self, piece: slice, source: int, tag: int) -> Coming:
        """Begin to receive the numbers of `piece`."""
        count = piece.stop - piece.start
        pending, data = self.post.expect(row_bytes(self.wire.format, count), source, tag + self._shift)
        return Coming(pending, data, count, self)

    def send(self, values: F32, to: int, tag: int) -> Pending:
        """Begin to send numbers."""
        return self.post.send(self.wire.pack(values), to, tag + self._shift)

    def forward(self, data: Bytes, ranks: Sequence[int], tag: int) -> None:
        """Begin to send packed numbers."""
        if ranks:
            self._sends.append(self.post.send_to(data, ranks, tag + self._shift))

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


def bounds(count: int, parts: int) -> list[int]:
    """Where the parts of `count` numbers begin and end, as equal as whole blocks of 32 allow."""
    blocks = -(-count // BLOCK_WEIGHTS)
    return [min(count, blocks * part // parts * BLOCK_WEIGHTS) for part in range(parts + 1)] if parts else [0]


def wire_of(fmt: str) -> Wire:
    """The wire that `--wire` names."""
    return Wire(fmt, load_quantizer(1)) if fmt == "q8_0" else Wire(fmt)

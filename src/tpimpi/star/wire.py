"""Numbers on the wire: f32 as they are, or packed as bf16 or q8_0, and cut into pieces that go out one after the other.

A piece is at most PIECE numbers. So a message stays just below the size from which an MPI library asks the other side
before it sends (rendezvous: two hops more; Open MPI over TCP from 64 KiB on), and a large sum flows: while the hub adds one
piece, it receives the next and sends the one before. Where hops are short, as in shared memory, larger ones were faster.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tpimpi.errors import StarError
from tpimpi.formats import BLOCK_WEIGHTS, F32, Bytes, decode, encode, row_bytes
from tpimpi.quantize import Quantizer, quantize
from tpimpi.star.post import Pending, Post

WIRES = ("f32", "bf16", "q8_0")
PIECE = 16_256  # numbers of a message, at most; a multiple of 32, which is a block of q8_0
LARGE_PIECE, SHORT_HOP = 65_536, 100e-6  # numbers where the measured latency is less, in seconds

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
    wire: Wire

    def values(self) -> F32:
        """The numbers: [count]."""
        return self.wire.unpack(self.data, self.count)


class Mail:
    """The messages of one sum, or of a hidden vector; several may be under way, each with a `turn` of its own."""

    def __init__(self, post: Post, wire: Wire, turn: int = 0) -> None:
        self.post, self.wire = post, wire
        self.rank, self.size = post.rank, post.size
        # The hub told all ranks the same latency, so all cut alike.
        self._piece = LARGE_PIECE if post.latency is not None and post.latency < SHORT_HOP else PIECE
        self._shift = TAGS * (turn % TURNS)
        self._sends: list[Pending] = []

    def pieces(self, first: int, last: int) -> list[slice]:
        """The numbers from `first` to `last`, in pieces of about the same size."""
        cuts = bounds(last - first, -(-(last - first) // self._piece))
        return [slice(first + start, first + stop) for start, stop in itertools.pairwise(cuts)]

    def parts(self, count: int) -> list[list[slice]]:
        """The pieces of each rank's part of `count` numbers."""
        return [self.pieces(first, last) for first, last in itertools.pairwise(bounds(count, self.size))]

    def expect(self, piece: slice, source: int, tag: int) -> Coming:
        """Begin to receive the numbers of `piece`."""
        count = piece.stop - piece.start
        pending, data = self.post.expect(row_bytes(self.wire.format, count), source, tag + self._shift)
        return Coming(pending, data, count, self.wire)

    def send(self, values: F32, to: int, tag: int) -> Pending:
        """Begin to send numbers, which may not change until that is done (f32 is not copied)."""
        return self.post.send(self.wire.pack(values), to, tag + self._shift)

    def forward(self, data: Bytes, ranks: Sequence[int], tag: int) -> None:
        """Begin to send packed numbers; they may not change until what `sent` returns is done."""
        if ranks:
            self._sends.append(self.post.send_to(data, ranks, tag + self._shift))

    def publish(self, values: F32, ranks: Sequence[int], tag: int) -> None:
        """Begin to send the final numbers of a piece. What the receivers make of them is put into `values`, so that all
        have the same bits; they may not change until what `sent` returns is done."""
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
        )


def bounds(count: int, parts: int) -> list[int]:
    """Where the parts of `count` numbers begin and end, as equal as whole blocks of 32 allow."""
    blocks = -(-count // BLOCK_WEIGHTS)
    return [min(count, blocks * part // parts * BLOCK_WEIGHTS) for part in range(parts + 1)] if parts else [0]

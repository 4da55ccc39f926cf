"""Open MPI's frames over TCP, as far as a program between two devices has to know them.

As Open MPI 5.0 has them, on little-endian hosts of one kind (checked with 5.0.11). A connection (BTL tcp) begins with 24
bytes each way: the process's name, 8 bytes, and MAGIC with zeros behind, 16 bytes. Then there are only frames, each with a
header of 8 bytes: tag u8, type u8, count u16, and u32, the number of bytes that follow. (Of type 2, the rest of a large
message, there follow `count` times an address and a length, u64, and then the bytes of all lengths.) Of type 1 those begin
with a header of the layer above (PML ob1), of which the first byte is the kind:

    MATCH       kind u8, flags u8, communicator u16, source i32, tag i32, sequence u16: 14 bytes, and the message
    RENDEZVOUS  the same, 2 bytes of nothing, length u64, request u64: 32 bytes, and the beginning of the message
    FRAGMENT    kind u8, flags u8, 6 bytes of nothing, offset u64, two requests u64: 32 bytes, and a later part of it
    EXTENDED    32 bytes, with a longer name of the communicator; then nothing, or MATCH or RENDEZVOUS: what is sent before
                the receiver has said its own number of it
    others      acknowledgements, without a message

`sequence` counts the messages of a rank to another over a communicator. Tags of the library's own messages are negative.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

MAGIC = b"OPAL-TCP-BTL"
HANDSHAKE_BYTES = 24
FRAME_HEADER = struct.Struct("<BBHI")
MESSAGE_TYPE, PUT_TYPE = 1, 2
_PLACE = struct.Struct("<QQ")
_MATCH_HEADER = struct.Struct("<BBHiiH")
_SEQUENCE_AT = 12  # in it
MATCH, RENDEZVOUS, FRAGMENT, EXTENDED = 65, 66, 70, 74
_RENDEZVOUS_BYTES = _FRAGMENT_BYTES = _EXTENDED_BYTES = 32
FIRST_OF_OURS = 3  # before it are COMM_WORLD, COMM_SELF and COMM_NULL


@dataclass
class Frame:
    """One frame. Of a message's first part also whose it is; `at` is where the message's own bytes begin in `data`."""

    header_bytes: ClassVar[int] = FRAME_HEADER.size

    data: bytearray
    at: int = 0
    match_at: int | None = None
    communicator: int = 0
    tag: int = 0
    whole: bool = False  # whether all of the message is in this frame

    @property
    def payload(self) -> bytes:
        """The message's own bytes."""
        return bytes(self.data[self.at :])

    @property
    def ours(self) -> bool:
        """Whether it is a whole message of tpimpi."""
        return self.whole and self.communicator >= FIRST_OF_OURS and self.tag > 0

    def replace(self, payload: bytes) -> None:
        """Put other bytes there, of any number; the headers fit them."""
        self.data[self.at :] = payload
        tag, kind, count, _ = FRAME_HEADER.unpack_from(self.data)
        FRAME_HEADER.pack_into(self.data, 0, tag, kind, count, len(self.data) - FRAME_HEADER.size)

    def count_down(self, less: int) -> None:
        """Say that it is an earlier message, by so many."""
        assert self.match_at is not None
        at = self.match_at + _SEQUENCE_AT
        (sequence,) = struct.unpack_from("<H", self.data, at)
        struct.pack_into("<H", self.data, at, (sequence - less) & 0xFFFF)


def parse(data: bytearray) -> Frame:
    """What a frame is."""
    frame = Frame(data, len(data))
    if len(data) <= FRAME_HEADER.size or data[1] != MESSAGE_TYPE:
        return frame
    at = FRAME_HEADER.size
    if data[at] == FRAGMENT:
        frame.at = min(len(data), at + _FRAGMENT_BYTES)
    if data[at] == EXTENDED:
        at += _EXTENDED_BYTES
    if len(data) >= at + _MATCH_HEADER.size and data[at] in (MATCH, RENDEZVOUS):
        kind, _, frame.communicator, _, frame.tag, _ = _MATCH_HEADER.unpack_from(data, at)
        frame.match_at, frame.whole = at, kind == MATCH
        frame.at = at + (_MATCH_HEADER.size if kind == MATCH else _RENDEZVOUS_BYTES)
    return frame


class Splitter:
    """Cuts what comes over one direction of a connection into frames. What is no connection of Open MPI's messages, as the
    launcher's, passes as it is: `plain`."""

    def __init__(self) -> None:
        self._held = bytearray()
        self._begun = False
        self.plain = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole now; the handshake, and what passes as it is, as one without a message."""
        self._held += data
        if not self._begun:
            self.plain = MAGIC not in self._held[:HANDSHAKE_BYTES]  # which one call of send has sent
            if not self.plain and len(self._held) < HANDSHAKE_BYTES:
                return
            self._begun = True
            if not self.plain:
                yield self._take(HANDSHAKE_BYTES)
        if self.plain:
            yield Frame(self._take(len(self._held)).data)
            return
        while len(self._held) >= FRAME_HEADER.size:
            size = self._frame_bytes()
            if len(self._held) < size:
                return
            yield parse(self._take(size).data)

    def _frame_bytes(self) -> int:
        """Of the frame that is being held, or of so much of it that more can be said."""
        _, kind, count, follow = FRAME_HEADER.unpack_from(self._held)
        size: int = FRAME_HEADER.size + follow
        if kind == PUT_TYPE:
            size = FRAME_HEADER.size + count * _PLACE.size
            if len(self._held) >= size:
                size += sum(length for _, length in _PLACE.iter_unpack(self._held[FRAME_HEADER.size : size]))
        return size

    def _take(self, nbytes: int) -> Frame:
        taken = self._held[:nbytes]
        del self._held[:nbytes]
        return Frame(taken, len(taken))


def splitters() -> tuple[Splitter, Splitter]:
    """Of a connection: of the direction that connects, and of the other."""
    return Splitter(), Splitter()

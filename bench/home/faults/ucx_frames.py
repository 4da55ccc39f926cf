"""MPICH's frames over TCP, as far as a program between two devices has to know them: those of UCX, over which it talks.

As UCX has them, on little-endian hosts of one kind (checked with MPICH 5.0.2). Who connects (UCT tcp) begins with MAGIC, 8
bytes; then both sides send frames alone, each with a header of 5 bytes: what it is u8, and u32, the number of bytes that
follow. (Of PUT there follow an address and a length, u64, a number u32, and then so many bytes more.) A message (UCP, tag
matching):

    EAGER_ONLY      the tag u64, and the whole message
    EAGER_FIRST     the tag u64, length u64, number u64, and the beginning of a larger message
    EAGER_MIDDLE    number u64, offset u64, and a later part of it
    others          connections, large messages (rendezvous), acknowledgements

In the tag (MPICH) are the context of the communicator, u16, the sender's rank, u16, and the tag itself, u32; contexts of
collectives are odd. Messages are not counted: TCP has them in order.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from bench.home.faults.frames import Frame

MAGIC = (0xCAFEBABE12345678).to_bytes(8, "little")
FRAME_HEADER = struct.Struct("<BI")
_TAG = struct.Struct("<Q")
_PUT_HEADER = struct.Struct("<QQI")
EAGER_ONLY, EAGER_FIRST, EAGER_MIDDLE, PUT = 2, 3, 4, 33
_HEADER_BYTES = {EAGER_ONLY: 8, EAGER_FIRST: 24, EAGER_MIDDLE: 16}
FIRST_OF_OURS = 8  # before it are COMM_WORLD, COMM_SELF and the library's own
# By which UCX sends our messages whole, as Open MPI is told to.
VARIABLES = {"UCX_TCP_TX_SEG_SIZE": "512k", "UCX_TCP_RX_SEG_SIZE": "512k", "UCX_RNDV_THRESH": "inf"}


class UcxFrame(Frame):
    """One frame of UCX."""

    header_bytes = FRAME_HEADER.size

    @property
    def ours(self) -> bool:
        return self.whole and self.communicator >= FIRST_OF_OURS and self.communicator % 2 == 0

    def replace(self, payload: bytes) -> None:
        self.data[self.at :] = payload
        kind, _ = FRAME_HEADER.unpack_from(self.data)
        FRAME_HEADER.pack_into(self.data, 0, kind, len(self.data) - FRAME_HEADER.size)


def parse(data: bytearray) -> UcxFrame:
    """What a frame is."""
    frame = UcxFrame(data, len(data))
    kind, size = FRAME_HEADER.unpack_from(data)
    if size < _HEADER_BYTES.get(kind, size + 1):
        return frame
    frame.at = FRAME_HEADER.size + _HEADER_BYTES[kind]
    if kind != EAGER_MIDDLE:
        (tag,) = _TAG.unpack_from(data, FRAME_HEADER.size)
        frame.communicator, frame.tag, frame.whole = tag >> 48, tag & 0xFFFFFFFF, kind == EAGER_ONLY
    return frame


class UcxSplitter:
    """Cuts what comes over one direction of a connection into frames; see frames.Splitter. What connects has MAGIC first,
    the other direction is of the same kind."""

    def __init__(self, connecting: UcxSplitter | None = None) -> None:
        """`connecting` is the splitter of the direction that connects, where this is the other."""
        self._held = bytearray()
        self._connecting, self._begun = connecting, False
        self.plain = False

    def feed(self, data: bytes) -> Iterator[Frame]:
        """The frames that are whole now; MAGIC, and what passes as it is, as one without a message."""
        self._held += data
        if not self._begun and self._connecting is not None:
            self._begun, self.plain = True, self._connecting.plain or not self._connecting._begun
        if not self._begun:
            self.plain = not MAGIC.startswith(self._held[: len(MAGIC)])
            if not self.plain and len(self._held) < len(MAGIC):
                return
            self._begun = True
            if not self.plain:
                yield self._take(len(MAGIC))
        if self.plain:
            yield UcxFrame(self._take(len(self._held)).data)
            return
        while (size := self._frame_bytes()) is not None and len(self._held) >= size:
            yield parse(self._take(size).data)

    def _frame_bytes(self) -> int | None:
        """Of the frame that is being held; None where too little of it is there."""
        if len(self._held) < FRAME_HEADER.size:
            return None
        kind, size = FRAME_HEADER.unpack_from(self._held)
        if kind != PUT:
            return FRAME_HEADER.size + int(size)
        if len(self._held) < FRAME_HEADER.size + _PUT_HEADER.size:
            return None
        return FRAME_HEADER.size + int(size) + int(_PUT_HEADER.unpack_from(self._held, FRAME_HEADER.size)[1])

    def _take(self, nbytes: int) -> UcxFrame:
        taken = self._held[:nbytes]
        del self._held[:nbytes]
        return UcxFrame(taken, len(taken))


def splitters() -> tuple[UcxSplitter, UcxSplitter]:
    """Of a connection: of the direction that connects, and of the other."""
    connecting = UcxSplitter()
    return connecting, UcxSplitter(connecting)

"""Tiles on their way to another rank: what BULK messages of the star hold.

A message is frames, one after another: a header of three u64, little-endian (a record's index, a kind, and how
many bytes follow), then so many bytes, filled up to a multiple of 8. The kinds are DATA (the next bytes of the tile's
parts, which come in their order, none across the border of two), CHECKSUM (the tile is whole: XXH3-64 of its bytes,
which the receiver compares with that of what it wrote), END (there is nothing more), and FAILED (rank 0 could not go
on; the other ranks are told to stop in a note). A message of no bytes says that more will come, however long it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from tpimpi.compute.arrays import Array, Bytes
from tpimpi.errors import StarError
from tpimpi.weights.slices.header import Header

MESSAGE_BYTES = 2 << 20  # bytes of a message, at most
DATA, CHECKSUM, END, FAILED = range(4)
_HEAD = np.dtype("<u8")
_HEAD_BYTES = 3 * _HEAD.itemsize


class StreamWriter:
    """A TileWriter for the tiles of another rank: packs what is written into messages; `send` gets (rank, message)."""

    def __init__(self, rank: int, header: Header, missing: list[int]) -> None:
        self.rank, self.header, self.missing = rank, header, missing
        self.send: Callable[[int, Bytes], None] = lambda rank, message: None
        self._message = np.empty(MESSAGE_BYTES, np.uint8)
        self._size = 0
        self._sums: dict[int, Any] = {}
        self._left = {index: sum(part.nbytes for part in header.records[index].parts) for index in missing}

    def write(self, index: int, name: str, values: Array) -> None:
        """Send the next piece of part `name` of record `index`."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        digest = self._sums.setdefault(index, xxhash.xxh3_64())
        digest.update(data)
        self._left[index] -= data.nbytes
        for first in range(0, data.nbytes, MESSAGE_BYTES // 2):
            self._frame(index, DATA, data[first : first + MESSAGE_BYTES // 2])
        if not self._left[index]:
            self._frame(index, CHECKSUM, np.array([self._sums.pop(index).intdigest()], _HEAD).view(np.uint8))

    def end(self, kind: int) -> None:
        """Send what is left, and END or FAILED."""
        self._frame(0, kind, np.empty(0, np.uint8))
        self._full()

    def _frame(self, index: int, kind: int, data: Bytes) -> None:
        size = _HEAD_BYTES + _padded(data.nbytes)
        if self._size + size > MESSAGE_BYTES:
            self._full()
        message = self._message[self._size : self._size + size]
        message[:_HEAD_BYTES].view(_HEAD)[:] = index, kind, data.nbytes
        message[_HEAD_BYTES : _HEAD_BYTES + data.nbytes] = data
        message[_HEAD_BYTES + data.nbytes :] = 0
        self._size += size

    def _full(self) -> None:
        message, self._message = self._message[: self._size], np.empty(MESSAGE_BYTES, np.uint8)
        self._size = 0
        self.send(self.rank, message)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def frames(message: Bytes) -> Iterator[tuple[int, int, Bytes]]:
    """What a message holds: (index, kind, data), in order. Raises StarError where it is cut short."""
    at = 0
    while at < message.nbytes:
        head = message[at : at + _HEAD_BYTES]
        if head.nbytes < _HEAD_BYTES:
            raise StarError(f"rank 0 sent a message of {message.nbytes} bytes that is cut short at {at}")
        index, kind, nbytes = (int(value) for value in head.view(_HEAD))
        at += _HEAD_BYTES
        if _padded(nbytes) > message.nbytes - at:
            raise StarError(
                f"rank 0 sent a frame of {nbytes} bytes where {message.nbytes - at} are left of its message"
            )
        yield index, kind, message[at : at + nbytes]
        at += _padded(nbytes)


def checksum_in(data: Bytes) -> int:
    """The checksum that a CHECKSUM frame holds. Raises StarError where it holds something else."""
    if data.nbytes != _HEAD.itemsize:
        raise StarError(f"rank 0 sent a checksum of {data.nbytes} bytes, must be {_HEAD.itemsize}")
    return int(data.view(_HEAD)[0])

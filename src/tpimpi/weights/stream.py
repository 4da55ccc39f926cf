"""Tiles on their way to another rank, in parcels: what BULK messages of the star hold.

A parcel is a message of frames, one after another: a header of three u64, little-endian (a record's index, a kind, and how
many bytes follow), then so many bytes, filled up to a multiple of 8. The kinds are PIECE (the next bytes of the tile's
parts, which come in their order, none across the border of two), SUM (the tile is whole: XXH3-64 of its bytes, which the
receiver compares with that of what it wrote), END (there is nothing more), and FAILED (rank 0 could not go on; the other
ranks are told to stop in a note). A parcel of no bytes says that more will come, however long it takes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import xxhash

from tpimpi.compute.formats.packed import Array, Bytes
from tpimpi.errors import StarError
from tpimpi.weights.slices.header import Header

PARCEL = 2 << 20  # bytes of a message, at most
PIECE, SUM, END, FAILED = range(4)
_HEAD = np.dtype("<u8")
_HEAD_BYTES = 3 * _HEAD.itemsize


class Packer:
    """A Sink for the tiles of another rank: what is written is packed into parcels; `ready` gets (rank, parcel)."""

    def __init__(self, rank: int, header: Header, missing: list[int]) -> None:
        self.rank, self.header, self.missing = rank, header, missing
        self.ready: Callable[[int, Bytes], None] = lambda rank, parcel: None
        self._parcel = np.empty(PARCEL, np.uint8)
        self._size = 0
        self._sums: dict[int, Any] = {}
        self._left = {index: sum(part.nbytes for part in header.records[index].parts) for index in missing}

    def write(self, index: int, name: str, values: Array) -> None:
        """Send the next piece of part `name` of record `index`."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        digest = self._sums.setdefault(index, xxhash.xxh3_64())
        digest.update(data)
        self._left[index] -= data.nbytes
        for first in range(0, data.nbytes, PARCEL // 2):
            self._frame(index, PIECE, data[first : first + PARCEL // 2])
        if not self._left[index]:
            self._frame(index, SUM, np.array([self._sums.pop(index).intdigest()], _HEAD).view(np.uint8))

    def end(self, kind: int) -> None:
        """Send what is left, and END or FAILED."""
        self._frame(0, kind, np.empty(0, np.uint8))
        self._full()

    def _frame(self, index: int, kind: int, data: Bytes) -> None:
        size = _HEAD_BYTES + _padded(data.nbytes)
        if self._size + size > PARCEL:
            self._full()
        parcel = self._parcel[self._size : self._size + size]
        parcel[:_HEAD_BYTES].view(_HEAD)[:] = index, kind, data.nbytes
        parcel[_HEAD_BYTES : _HEAD_BYTES + data.nbytes] = data
        parcel[_HEAD_BYTES + data.nbytes :] = 0
        self._size += size

    def _full(self) -> None:
        parcel, self._parcel = self._parcel[: self._size], np.empty(PARCEL, np.uint8)
        self._size = 0
        self.ready(self.rank, parcel)


def _padded(nbytes: int) -> int:
    return -(-nbytes // 8) * 8


def frames(parcel: Bytes) -> Iterator[tuple[int, int, Bytes]]:
    """What a parcel holds: (index, kind, data), in order. Raises StarError where it is cut short."""
    at = 0
    while at < parcel.nbytes:
        head = parcel[at : at + _HEAD_BYTES]
        if head.nbytes < _HEAD_BYTES:
            raise StarError(f"rank 0 sent a parcel of {parcel.nbytes} bytes that is cut short at {at}")
        index, kind, nbytes = (int(value) for value in head.view(_HEAD))
        at += _HEAD_BYTES
        if _padded(nbytes) > parcel.nbytes - at:
            raise StarError(f"rank 0 sent a frame of {nbytes} bytes where {parcel.nbytes - at} are left of its parcel")
        yield index, kind, parcel[at : at + nbytes]
        at += _padded(nbytes)


def the_sum(data: Bytes) -> int:
    """The checksum that a SUM frame holds. Raises StarError where it holds something else."""
    if data.nbytes != _HEAD.itemsize:
        raise StarError(f"rank 0 sent a checksum of {data.nbytes} bytes, must be {_HEAD.itemsize}")
    return int(data.view(_HEAD)[0])

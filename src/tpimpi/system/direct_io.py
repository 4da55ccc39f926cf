"""Reading a slice file's tiles: in pieces, several at a time, past the page cache where the file system allows that.

A tile that is read once a token only drives other things out of the page cache, and what it takes there counts against a
memory limit. So files are opened with O_DIRECT: the disk writes straight into the buffer, whose address, length and place
in the file are multiples of 4096, as slices/writer lays tiles out. Where that is not to be had (tmpfs, some network file
systems, an extent that another tool has moved) reads are buffered, and the page cache is told at once that it can let go.
"""

from __future__ import annotations

import errno
import itertools
import os
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from tpimpi.system.buffers import PAGE_BYTES, Bytes, aligned_buffer

READ_BYTES = 2 << 20  # bytes of one read: a few in flight keep a disk busy, and a tile is spread over them
DEPTHS = (4, 8)  # reads in flight that are tried; with fewer the disk idles while their threads wait for a busy core
TRIAL_BUFFER_BYTES = max(DEPTHS) * READ_BYTES  # bytes of the buffer that a Trial can use
_TRIAL_S = 0.06  # of each depth
_GOOD_RATE = 0.9  # of the best rate: the fewest reads in flight that give it are used


class Extent(NamedTuple):
    """Bytes of a file that belong to [start, stop) of a buffer."""

    offset: int
    start: int
    stop: int


def open_direct(path: Path) -> tuple[int, bool]:
    """A descriptor for reading, and whether reads go past the page cache (O_DIRECT). Raises OSError."""
    flag = getattr(os, "O_DIRECT", 0)
    if flag:
        try:
            descriptor = os.open(path, os.O_RDONLY | flag)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise
        else:
            if _reads_directly(descriptor):
                return descriptor, True
            os.close(descriptor)
    return os.open(path, os.O_RDONLY), False


def _reads_directly(descriptor: int) -> bool:
    """Whether reads of a file that was opened with O_DIRECT work too: some file systems only refuse these."""
    try:
        os.preadv(descriptor, [aligned_buffer(PAGE_BYTES)], 0)
    except OSError as error:
        if error.errno in (errno.EINVAL, errno.ENOTSUP):
            return False
        raise
    return True


def pieces(extents: Iterable[Extent]) -> Iterator[Extent]:
    """The extents, cut into reads of at most READ_BYTES bytes."""
    for extent in extents:
        for start in range(extent.start, extent.stop, READ_BYTES):
            yield Extent(extent.offset + start - extent.start, start, min(start + READ_BYTES, extent.stop))


class Descriptor:
    """A file that pieces are read from; may be used by several threads."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._plain = os.open(path, os.O_RDONLY)
        try:
            self._direct, self.direct = open_direct(path)
        except BaseException:
            os.close(self._plain)
            raise

    def stat(self) -> os.stat_result:
        return os.fstat(self._plain)

    def read(self, piece: Extent, buffer: Bytes) -> None:
        """Fill buffer[piece.start : piece.stop]; bytes up to the next multiple of 4096 may be written over.

        Raises OSError, and EOFError where the file ends before.
        """
        wanted = piece.stop - piece.start
        if self.direct and piece.offset % PAGE_BYTES == 0 and piece.start % PAGE_BYTES == 0:
            padded = min(piece.start + -(-wanted // PAGE_BYTES) * PAGE_BYTES, len(buffer))
            if padded % PAGE_BYTES == 0:
                self._fill(self._direct, buffer[piece.start : padded], piece.offset, wanted)
                return
        self._fill(self._plain, buffer[piece.start : piece.stop], piece.offset, wanted)
        self.forget(piece.offset, wanted)

    def read_plain(self, buffer: Bytes, offset: int) -> None:
        """Fill a buffer of any length from any place, through the page cache. Raises OSError, EOFError."""
        self._fill(self._plain, buffer, offset, len(buffer))

    def _fill(self, descriptor: int, target: Bytes, offset: int, wanted: int) -> None:
        done = 0
        while done < wanted:
            got = os.preadv(descriptor, [target[done:]], offset + done)
            if got == 0:
                raise EOFError(f"it ends at byte {offset + done}")
            done += got
            if done < wanted and descriptor != self._plain and done % PAGE_BYTES:
                descriptor, target = self._plain, target[:wanted]  # the end of the file, which another program moved

    def forget(self, offset: int = 0, nbytes: int = 0) -> None:
        """Have the page cache let go of these bytes (of all, where nbytes is 0), which it would otherwise keep for us."""
        if hasattr(os, "posix_fadvise"):
            first = offset // PAGE_BYTES * PAGE_BYTES
            last = -(-(offset + nbytes) // PAGE_BYTES) * PAGE_BYTES if nbytes else 0
            os.posix_fadvise(self._plain, first, last - first if last else 0, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._plain)
        os.close(self._direct)


class Trial:
    """Reads pieces of some extents for a while, to find what the disk gives; what it reads is forgotten.

    `places` in the file are gone through in turn, from a random one on: a disk's own cache might have what the last run
    tried.
    """

    def __init__(self, file: Descriptor, extents: Iterable[Extent]) -> None:
        cut = list(pieces(extents))
        largest = max((piece.stop - piece.start for piece in cut), default=0)
        self._file = file
        self._places = [(p.offset, p.stop - p.start) for p in cut if p.stop - p.start >= largest // 2]
        first = int.from_bytes(os.urandom(8), "little")  # of the module random ranks have no other use
        self._turn = itertools.count(first % max(1, len(self._places)))

    def depth(self, buffer: Bytes) -> int:
        """The fewest of DEPTHS reads in flight that give nearly the best rate: those for which `buffer` (READ_BYTES bytes
        each) has room are tried for a moment. Raises what Descriptor.read raises."""
        rates = {depth: self.rate(buffer, depth, _TRIAL_S) for depth in DEPTHS if depth * READ_BYTES <= len(buffer)}
        best = max(rates.values(), default=0.0)
        return next((depth for depth, rate in rates.items() if rate >= _GOOD_RATE * best), DEPTHS[0])

    def rate(self, buffer: Bytes, depth: int, seconds: float) -> float:
        """Bytes a second with `depth` reads in flight (fewer, if `buffer` has no room for them), over about `seconds`.

        Raises what Descriptor.read raises.
        """
        if not self._places:
            return 0.0
        depth = min(depth, len(buffer) // READ_BYTES)
        began = time.monotonic()
        done = [0] * depth
        errors: list[BaseException] = []

        def work(slot: int) -> None:
            try:
                while not errors and (not done[slot] or time.monotonic() < began + seconds):
                    offset, nbytes = self._places[next(self._turn) % len(self._places)]
                    self._file.read(Extent(offset, slot * READ_BYTES, slot * READ_BYTES + nbytes), buffer)
                    done[slot] += nbytes
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=work, args=(slot,), name=f"tpimpi-disk-{slot}") for slot in range(depth)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        if errors:
            raise errors[0]
        return sum(done) / (time.monotonic() - began)

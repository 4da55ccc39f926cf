"""Writing a slice file, in as many goes as it takes; its format is specified in the package.

Until it is whole, a slice has the name `.rank-R-of-N.h5.partial` beside its own, and is locked (flock) by the process that
writes it. A tile's checksum is written when the tile is; 0 stands where there is none yet, and so do the checksums of the
embedding's rows; the header's, when the skeleton is there. So a process that dies at any moment leaves a file that says what
it is and which tiles it has; the next one reads these again, compares, and goes on.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import Array, Bytes
from tpimpi.compute.formats.packed import row_bytes
from tpimpi.errors import InputError
from tpimpi.system.disk import storage_error
from tpimpi.system.files import forget_unfinished, note_unfinished, try_lock
from tpimpi.weights.locations import elsewhere
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import ALIGNMENT_BYTES
from tpimpi.weights.slices.partition import Span
from tpimpi.weights.slices.skeleton import read_skeleton, write_skeleton

if TYPE_CHECKING:
    from concurrent import futures

_SYNC_BYTES = 64 << 20  # bytes that a thread has put on the disk while the next ones are written
_READ_BYTES = 2 << 20  # bytes read at a time, of what is there already


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error, elsewhere(path)) from error


def partial_path(path: Path) -> Path:
    """Where the slice `path` is written until it is whole."""
    return path.with_name(f".{path.name}.partial")


def _open_partial(path: Path) -> int:
    """Open a partial slice, or make it. Never through a link, nor what is no file of ours: raises InputError."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISREG(path.lstat().st_mode):
            raise InputError(f"{path} is no file, but in the way of a slice; remove it")
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)


def remove_leftovers(folder: Path) -> None:
    """Delete the partial slices in a folder that nobody is writing. What cannot be deleted is in nobody's way."""
    for path in folder.glob(".rank-*.partial"):
        with contextlib.suppress(OSError):
            descriptor = os.open(path, os.O_RDWR)
            try:
                if try_lock(descriptor) is None:
                    path.unlink()
            finally:
                os.close(descriptor)


def _runs(there: npt.NDArray[np.bool_]) -> list[Span]:
    """Runs of what is not there."""
    edges = np.flatnonzero(np.diff(np.concatenate([[1], there.view(np.int8), [1]])))
    return [Span(int(first), int(last)) for first, last in edges.reshape(-1, 2)]


class SliceWriter:
    """Writes one slice file under a temporary name beside `path`, and renames it when it is whole (see the module).

    The file's skeleton (all names, shapes and extents) is made by HDF5 first and its space reserved, so that a full
    disk is noticed before any work is done; then each part is written straight to its place. Parts of a tile must come
    in the order of the record, and the pieces of a part from front to back, since the checksum is taken as they pass; tiles
    may come in any order. Holds no weights.

    Where an earlier process left its file, `check` is to be called before anything is written; `missing` and `missing_rows`
    then say what is still to come.

    Raises StorageError where the disk is full or cannot be written, InputError where another process is writing the file.
    """

    _offsets: dict[str, int]  # of each dataset in the file
    awaits_sums = False  # a tile is whole only when `confirm` is told the checksum that it should have
    _row_claims: Array | None = None  # checksums of the embedding's rows that were in the file when we found it

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.temporary = partial_path(path)
        self._begin()
        try:
            with _storage_errors(path):
                self._fd = self._lock()
                try:
                    resumed = os.fstat(self._fd).st_size > 0 and self._adopt()
                    if not resumed:
                        note_unfinished(
                            self.temporary
                        )  # until something is written to it: it takes its whole size at once
                        os.ftruncate(self._fd, 0)  # checksums that are not written below are zeros
                        self._offsets, header_hash = write_skeleton(self.temporary, self.header)
                except (RuntimeError, ValueError) as error:  # what HDF5 raises besides OSError
                    raise storage_error(path, error, elsewhere(path)) from error
                os.posix_fallocate(self._fd, 0, os.fstat(self._fd).st_size)
                if not resumed:
                    self._put_sum(0, header_hash)
            self._complete_empty_tiles()
        except BaseException:
            self.close()
            raise

    @classmethod
    def mending(cls, path: Path, header: Header, broken: Collection[int], broken_rows: Collection[int]) -> SliceWriter:
        """Take back a finished slice, all of whose parts are contiguous, to write some of its tiles and rows again.

        All others were just found to be good, and are not looked at again.
        """
        with _storage_errors(path):
            partial = _open_partial(partial_path(path))  # of somebody who is writing just now?
            try:
                _take_lock(partial, path)
                os.close(os.open(path, os.O_RDWR))  # or it would be found too late that we may not write to it
                path.replace(partial_path(path))
            finally:
                os.close(partial)
        writer = cls(path, header)
        for index in range(len(header.records)):
            writer.settle(index, whole=index not in broken and index in writer.claimed)
        if writer._row_claims is not None:
            writer._rows_there[:] = writer._row_claims != 0
            writer.lose_rows(broken_rows)
        return writer

    def _begin(self) -> None:
        records = self.header.records
        self._fd = -1
        self._hashes = [xxhash.xxh3_64() for _ in records]
        self._next_part = [0] * len(records)
        self._written = [0] * len(records)  # bytes of the next part
        self._there = np.zeros(len(records), bool)  # tiles that are whole
        self._claims = np.zeros(1 + len(records), "<u8")  # checksums that were in the file when we found it
        self._rows_there = np.zeros(self.header.config.vocab if self.header.rank == 0 else 0, bool)
        self._offsets = {}
        self._unsynced = 0
        self._syncing: futures.Future[None] | None = None  # of what was written before
        self._syncer: futures.ThreadPoolExecutor | None = None

    def _lock(self) -> int:
        """The temporary file, opened and locked. Another process may rename or remove it before we have the lock."""
        while True:
            descriptor = _open_partial(self.temporary)
            try:
                _take_lock(descriptor, self.path)
                with contextlib.suppress(FileNotFoundError):
                    if os.path.samestat(os.stat(self.temporary), os.fstat(descriptor)):  # noqa: PTH116
                        return descriptor
            except BaseException:
                os.close(descriptor)
                raise
            os.close(descriptor)

    def _adopt(self) -> bool:
        """Whether the file that is there was begun for this very slice; then we know where its parts lie."""
        found = read_skeleton(self.temporary, self.header, os.fstat(self._fd).st_size)
        if found is None:
            return False
        self._offsets, self._claims, self._row_claims = found.offsets, found.checksums, found.row_checksums
        return True

    # What is there already

    @property
    def claimed(self) -> list[int]:
        """Records whose tiles the file that we found says to have."""
        return [int(index) for index in np.flatnonzero(self._claims[1:])]

    @property
    def missing(self) -> list[int]:
        """Records whose tiles are not there."""
        return [int(index) for index in np.flatnonzero(~self._there)]

    @property
    def missing_rows(self) -> list[Span]:
        """Runs of rows of the embedding that are not there (rank 0)."""
        return _runs(self._rows_there)

    def check(self) -> Iterator[int]:
        """Read what the file says to have, and believe it where the checksums fit; yields the bytes read, bit by bit."""
        for index in self.claimed:
            if not self._there[index]:
                self.settle(index, whole=self._sum_of(index) == int(self._claims[1 + index]))
                yield self.header.records[index].nbytes
        if self._row_claims is not None:
            width = row_bytes(self.header.formats.embedding, self.header.config.hidden)
            step = max(1, _READ_BYTES // width)
            for first in range(0, len(self._rows_there), step):
                claims = self._row_claims[first : first + step]
                if claims.any():
                    rows = self._pread(self._offsets["embedding/weight"] + first * width, len(claims) * width)
                    sums = _row_sums(rows.reshape(-1, width))
                    self._rows_there[first : first + step] = (sums == claims) & (claims != 0)
                    yield rows.nbytes
            self.lose_rows(np.flatnonzero(~self._rows_there & (self._row_claims != 0)).tolist())

    def settle(self, index: int, *, whole: bool) -> None:
        """Whether the tile that the file has of a record is good. One that is not is to be written again."""
        if not whole and self._claims[1 + index]:
            self._put_sum(1 + index, 0)
        self._there[index] = whole

    def lose_rows(self, rows: Collection[int]) -> None:
        """These rows of the embedding are not good, and to be written again."""
        for row in rows:
            self._pwrite(memoryview(bytes(8)), self._offsets["embedding/checksums"] + row * 8)
            self._rows_there[row] = False

    def _sum_of(self, index: int) -> int:
        digest, record = xxhash.xxh3_64(), self.header.records[index]
        for part in record.parts:
            at = self._offsets[f"{record.path}/{part.name}"]
            for first in range(0, part.nbytes, _READ_BYTES):
                digest.update(self._pread(at + first, min(_READ_BYTES, part.nbytes - first)))
        return digest.intdigest()

    def _pread(self, offset: int, nbytes: int) -> Bytes:
        data, done = np.zeros(nbytes, np.uint8), 0
        with _storage_errors(self.path):
            while done < nbytes and (got := os.preadv(self._fd, [data[done:]], offset + done)):
                done += got
            os.posix_fadvise(self._fd, offset, nbytes, os.POSIX_FADV_DONTNEED)  # it is not needed again
        return data

    # Writing

    def write(self, index: int, name: str, values: Array) -> None:
        """Write part `name` of record `index`, or the next piece of it: the bytes of `values`, as the dataset has them."""
        record = self.header.records[index]
        part = record.parts[self._next_part[index]]
        assert part.name == name, f"part {name} of {record.path} written out of order, expected {part.name}"
        before = self._written[index]
        assert before + values.nbytes <= part.nbytes, (part, before, values.nbytes)
        data = memoryview(np.ascontiguousarray(values)).cast("B") if values.size else memoryview(b"")
        self._hashes[index].update(data)
        self._pwrite(data, self._offsets[f"{record.path}/{name}"] + before)
        self._written[index] = before + values.nbytes
        if self._written[index] == part.nbytes:
            self._next_part[index] += 1
            self._written[index] = 0
            if self._next_part[index] == len(record.parts) and not self.awaits_sums:
                self._complete(index)

    def confirm(self, index: int, checksum: int) -> bool:
        """All parts of a tile are written: it is whole if this is its checksum, which is returned (see `awaits_sums`)."""
        right = self._hashes[index].intdigest() == checksum
        if right:
            self._complete(index)
        return right

    def _complete(self, index: int) -> None:
        self._put_sum(1 + index, self._hashes[index].intdigest())
        self._there[index] = True
        if self.header.records[index].parts:
            forget_unfinished(self.temporary)

    def _complete_empty_tiles(self) -> None:
        """A tile without parts (a tokenizer of no files) is whole from the start."""
        for index, record in enumerate(self.header.records):
            if not record.parts:
                self._complete(index)

    def left_of(self, index: int) -> tuple[str, int]:
        """The part of a tile that is to be written next, and how many bytes of it; ("", 0) where the tile is whole."""
        record, part = self.header.records[index], self._next_part[index]
        if part == len(record.parts):
            return "", 0
        return record.parts[part].name, record.parts[part].nbytes - self._written[index]

    def write_embedding(self, first_row: int, rows: Array) -> None:
        """Write rows [first_row, first_row + len(rows)) of the embedding table, in row form: uint8 [rows, bytes a row]."""
        rows = np.ascontiguousarray(rows)
        assert rows.dtype == np.uint8 and rows.shape[1] == row_bytes(
            self.header.formats.embedding, self.header.config.hidden
        )
        self._pwrite(memoryview(rows).cast("B"), self._offsets["embedding/weight"] + first_row * rows[0].nbytes)
        hashes = memoryview(_row_sums(rows)).cast("B")
        self._pwrite(hashes, self._offsets["embedding/checksums"] + first_row * 8)
        self._rows_there[first_row : first_row + len(rows)] = True
        forget_unfinished(self.temporary)

    def _put_sum(self, slot: int, value: int) -> None:
        self._pwrite(memoryview(np.array([value], "<u8")).cast("B"), self._offsets["checksums"] + slot * 8)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        with _storage_errors(self.path):
            self._unsynced += len(data)
            while data:
                written = os.pwrite(self._fd, data, offset)
                data, offset = data[written:], offset + written
            if self._unsynced > _SYNC_BYTES:
                self._sync()

    def _sync(self) -> None:
        """Begin to have on the disk what is written so far, once what was begun before is there: disk and we work at once.

        Without it all would wait in memory, and for the disk at the end.
        """
        if self._syncer is None:
            from concurrent import futures  # which a rank whose slice is whole does without

            self._syncer = futures.ThreadPoolExecutor(1, "disk")
        self._wait()
        self._syncing, self._unsynced = self._syncer.submit(os.fdatasync, self._fd), 0

    def _wait(self) -> None:
        """Wait for the disk. Raises OSError where it failed."""
        syncing, self._syncing = self._syncing, None
        if syncing is not None:
            syncing.result()

    # The end

    def finish(self) -> None:
        """The file is whole: have it on the disk, still under its temporary name."""
        lacking = [self.header.records[index].path for index in self.missing]
        assert not lacking and not self.missing_rows, f"not written: {lacking}, rows {self.missing_rows}"
        with _storage_errors(self.path):
            self._wait()
            os.fsync(self._fd)

    def publish(self) -> None:
        """Give the finished file its name."""
        with _storage_errors(self.path):
            self.temporary.replace(self.path)
            self._close()

    def close(self) -> None:
        """Leave the file for another process to go on with, or remove it where nothing was written."""
        written = any(self._there[index] for index, record in enumerate(self.header.records) if record.parts)
        if self._fd >= 0 and not (written or self._claims.any() or self._rows_there.any()):
            self.discard()
        elif self._fd >= 0:
            self._close()

    def discard(self) -> None:
        """Remove the temporary file."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):  # what went wrong before is said instead
                self.temporary.unlink()
            self._close()

    def _close(self) -> None:
        forget_unfinished(self.temporary)  # from now on another process may write it
        with contextlib.suppress(OSError):  # of a file that is left as it is
            self._wait()
        if self._syncer is not None:
            self._syncer.shutdown()
        os.close(self._fd)
        self._fd = -1


def _take_lock(descriptor: int, path: Path) -> None:
    try:
        try_lock(descriptor)  # where there are no locks we go on without
    except BlockingIOError as error:
        raise InputError(f"another tpimpi is writing {path}; wait until it is done, or {elsewhere(path)}") from error


def _row_sums(rows: Bytes) -> Array:
    """XXH3-64 of each row: uint64 [rows]."""
    return np.array([xxhash.xxh3_64_intdigest(row) for row in rows], dtype="<u8")


def stored_bytes(header: Header) -> int:
    """Space a slice file takes on disk, to within a few pages."""
    row = row_bytes(header.formats.embedding, header.config.hidden) + 8
    table = header.config.vocab * row if header.rank == 0 else 0
    objects = sum(len(record.parts) + 2 for record in header.records if record.expert < 0)
    objects += sum(record.expert == 0 for record in header.records) * 2  # a layer's experts are one dataset
    metadata = objects * 2 * ALIGNMENT_BYTES
    return sum(record.nbytes for record in header.records) + table + metadata

"""Writing a slice file; its format is specified in slicefile."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from tpimpi.errors import StorageError
from tpimpi.formats import Array, row_bytes
from tpimpi.slicefile import error_number
from tpimpi.sliceheader import Header
from tpimpi.slicelayout import ALIGNMENT, embedding_dataset


def storage_error(path: Path, error: Exception) -> StorageError:
    """What the operating system, or HDF5, says of a full or unwritable disk, in one line with its remedy."""
    number = error_number(error)
    said = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(
            f"disk full while writing {path}: {said}; "
            "free some space there, or choose another place with --out or TPIMPI_CACHE"
        )
    if number in (errno.EMFILE, errno.ENFILE):
        return StorageError(
            f"cannot write {path}: {said}; slicing has a file open for each rank: raise the limit (ulimit -n 4096), "
            "or slice for fewer ranks"
        )
    return StorageError(f"cannot write {path}: {said}; choose another place with --out or TPIMPI_CACHE")


@contextlib.contextmanager
def _storage_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise storage_error(path, error) from error


class SliceWriter:
    """Writes one slice file under a temporary name beside `path`, and renames it when it is whole.

    The file's skeleton (all names, shapes and extents) is made by HDF5 first and its space reserved, so that a full
    disk is noticed before any work is done; then each part is written straight to its place. Parts of a tile must come
    in the order of the record, and the pieces of a part from front to back, since the checksum is taken as they pass; tiles
    may come in any order. Holds no weights.

    Raises StorageError where the disk is full or cannot be written.
    """

    def __init__(self, path: Path, header: Header) -> None:
        self.path, self.header = path, header
        self.temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
        self._hashes = [xxhash.xxh3_64() for _ in header.records]
        self._next_part = [0] * len(header.records)
        self._written = [0] * len(header.records)  # bytes of the next part
        self._fd = -1
        try:
            with _storage_errors(path):
                try:
                    self._skeleton()
                except (RuntimeError, ValueError) as error:  # what HDF5 raises besides OSError
                    raise storage_error(path, error) from error
                self._fd = os.open(self.temporary, os.O_RDWR)
                os.posix_fallocate(self._fd, 0, os.fstat(self._fd).st_size)
        except BaseException:
            self.abort()
            raise

    def _skeleton(self) -> None:
        header_json = np.frombuffer(self.header.to_json(), np.uint8)
        datasets: list[tuple[str, tuple[int, ...], np.dtype[Any]]] = [
            ("header", header_json.shape, np.dtype("u1")),
            ("checksums", (1 + len(self.header.records),), np.dtype("<u8")),
        ]
        for record in self.header.records:
            datasets += [(f"{record.path}/{part.name}", part.dataset_shape, part.dtype) for part in record.parts]
        if self.header.rank == 0:
            table, dtype = embedding_dataset(self.header.config, self.header.formats.embedding)
            datasets += [("embedding/weight", table, dtype), ("embedding/checksums", table[:1], np.dtype("<u8"))]
        create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        create.set_layout(h5py.h5d.CONTIGUOUS)
        create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        # Metadata is aligned like data, so it takes a page for each object; one block of that size for all of it keeps
        # it from coming between the parts of a tile.
        metadata = (len(datasets) + len(self.header.records) * 2 + 64) * 2 * ALIGNMENT
        with h5py.File(
            self.temporary,
            "w",
            libver="latest",
            alignment_threshold=1,
            alignment_interval=ALIGNMENT,
            meta_block_size=metadata,
        ) as file:
            self._offsets: dict[str, int] = {}
            for name, shape, dtype in datasets:
                kind = h5py.h5t.py_create(dtype)
                space = h5py.h5s.create_simple(shape)
                dataset = h5py.h5d.create(file.id, name.encode(), kind, space, create, lcpl=links)
                # A dataset of no bytes has no place in the file.
                self._offsets[name] = dataset.get_offset() or 0
            h5py.Dataset(h5py.h5d.open(file.id, b"header"))[...] = header_json
        self._header_hash = xxhash.xxh3_64_intdigest(header_json)

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

    def write_embedding(self, first_row: int, rows: Array) -> None:
        """Write rows [first_row, first_row + len(rows)) of the embedding table, in row form: uint8 [rows, bytes a row]."""
        rows = np.ascontiguousarray(rows)
        assert rows.dtype == np.uint8 and rows.shape[1] == row_bytes(
            self.header.formats.embedding, self.header.config.hidden
        )
        hashes = np.array([xxhash.xxh3_64_intdigest(row) for row in rows], dtype="<u8")
        self._pwrite(memoryview(rows).cast("B"), self._offsets["embedding/weight"] + first_row * rows[0].nbytes)
        self._pwrite(memoryview(hashes).cast("B"), self._offsets["embedding/checksums"] + first_row * 8)

    def _pwrite(self, data: memoryview, offset: int) -> None:
        with _storage_errors(self.path):
            while data:
                written = os.pwrite(self._fd, data, offset)
                data, offset = data[written:], offset + written

    def finish(self) -> None:
        """Write the checksums; the file is now whole, still under its temporary name."""
        for record, count in zip(self.header.records, self._next_part, strict=True):
            assert count == len(record.parts), f"{record.path} has {count} of {len(record.parts)} parts"
        sums = np.array([self._header_hash, *(h.intdigest() for h in self._hashes)], dtype="<u8")
        self._pwrite(memoryview(sums).cast("B"), self._offsets["checksums"])
        with _storage_errors(self.path):
            os.fsync(self._fd)
            os.close(self._fd)
        self._fd = -1

    def publish(self) -> None:
        """Give the finished file its name."""
        with _storage_errors(self.path):
            self.temporary.replace(self.path)

    def abort(self) -> None:
        """Remove the temporary file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
        with contextlib.suppress(OSError):  # what went wrong before is said instead
            self.temporary.unlink()


def stored_bytes(header: Header) -> int:
    """Space a slice file takes on disk, to within a few pages."""
    row = row_bytes(header.formats.embedding, header.config.hidden) + 8
    table = header.config.vocab * row if header.rank == 0 else 0
    metadata = sum(len(record.parts) + 2 for record in header.records) * 2 * ALIGNMENT
    return sum(record.nbytes for record in header.records) + table + metadata

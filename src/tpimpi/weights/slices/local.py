"""What a rank has of its slice on its own disk: found, taken from other slices there, and made whole.

A slice is good if it opens and is of this model, these formats, these shares and this rank. What is missing of one is looked
for in other slices of the same model on the same disk (for other numbers of ranks, or other shares): a tile of the same
heads or columns in the same formats holds the same bytes. Only then it is asked for.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Hashable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tpimpi.errors import InputError, SliceError, StorageError, shorten
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.disk import storage_error
from tpimpi.system.files import check_folder
from tpimpi.weights.locations import cache_folder, elsewhere
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header, same_slice, tile_spans
from tpimpi.weights.slices.layout import Record
from tpimpi.weights.slices.names import parse_slice_name
from tpimpi.weights.slices.partition import Span
from tpimpi.weights.slices.problems import unreadable
from tpimpi.weights.slices.tile import Tile

if TYPE_CHECKING:
    # Imported where something is to be written: most runs find their slices as they are to be, and do without its memory.
    from tpimpi.weights.slices.writer import SliceWriter

# What the HDF5 of every slice names before its tiles, and the beginning of its header.
OBJECT_NAMES, HEADER_MARK = (b"header", b"checksums", b"resident"), b'{"tpimpi_slice":'
MAX_SEARCHED_BYTES = 64 << 20  # of a file, for these
_FINGERPRINT_DIGITS = 12  # digits of a model's fingerprint in the names of its cache folders


class LocalSlice:
    """One rank's slice, as far as its host has it. `look`, `prepare`, then the missing tiles, `finish`, `publish`; `close`
    however it ends.

    With `of_cache` it is one that a run makes by itself in the cache, where it takes the place of one in another format or
    for other shares; elsewhere the user's folder is left as it is. `good`: it was there already, and nothing is to be done.
    Memory: a tile.
    """

    def __init__(self, path: Path, header: Header, *, verify: bool = False, of_cache: bool = False) -> None:
        self.path, self.header, self.verify, self.of_cache = path, header, verify, of_cache
        self.good = False
        self.complaint = ""  # what is wrong with a file of its name
        self.needed = 0  # bytes of disk that it will take
        self.to_look = 0  # bytes that `prepare` will look at, about
        self.free = 0  # bytes that the disk has
        self.device = 0  # the disk, as the system numbers it (st_dev)
        self.writer: SliceWriter | None = None  # of a slice that is not good
        self.here = 0  # tiles that were here already: of an earlier attempt, or in other slices
        self.broken = 0  # tiles, and runs of rows of the embedding, that `verify` found broken

    def look(self) -> None:
        """Find out whether the slice is good, and what room it takes if it is not.

        Raises StorageError, InputError where another slice is in its place.
        """
        try:
            check_folder(self.path.parent, "TPIMPI_CACHE" if self.of_cache else "--out")
            if self.path.is_dir() and not self.path.is_symlink():
                raise StorageError(
                    f"cannot write {self.path}: a directory of that name is there; remove it{self._or_out()}"
                )
            self.good = self._is_good()
            if not self.good or self.verify:
                from tpimpi.weights.slices.writer import partial_path, stored_bytes
            if not self.good:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                partial = partial_path(self.path)
                there = partial.stat().st_blocks * 512 if partial.exists() else 0
                self.needed = max(0, stored_bytes(self.header) - there)
                self.to_look = min(there, stored_bytes(self.header))
            elif self.verify:
                self.to_look = stored_bytes(self.header)
            folder = self.path.parent
            room = os.statvfs(folder)  # shutil's disk_usage would bring the modules of its archives
            self.free, self.device = room.f_bavail * room.f_frsize, folder.stat().st_dev
        except OSError as error:
            raise storage_error(self.path, error, elsewhere(self.path)) from error

    def _is_good(self) -> bool:
        try:
            there = _header_of(self.path)
        except SliceError as error:
            if not self.of_cache and not is_ours(self.path):
                raise InputError(
                    f"{self.path} is there and is no slice of tpimpi; choose another --out, or remove it"
                ) from error
            self.complaint = str(error)
            return False
        if there is not None and there.fingerprint != self.header.fingerprint:
            raise InputError(
                f"{self.path} is a slice of another model, {shorten(there.model)}; remove it{self._or_out()}"
            )
        if there is None or same_slice(there, self.header):
            return there is not None
        if not self.of_cache:
            raise InputError(
                f"{self.path} is there in {there.format} for shares {there.partition.describe()}, asked for is "
                f"{self.header.format} for {self.header.partition.describe()}; choose another --out, or remove it"
            )
        return False

    def _or_out(self) -> str:
        """The other remedy where something is in the way."""
        return "" if self.of_cache else ", or choose another --out"

    def prepare(self) -> Iterator[int]:
        """Open the slice for writing, unless it is good, with all of it that is to be had here; yields the bytes gone
        through after each piece of the work. Raises StorageError, InputError."""
        if self.good:
            if self.verify:
                yield from self._verify()
        else:
            from tpimpi.weights.slices.writer import SliceWriter

            self.writer = SliceWriter(self.path, self.header)
            yield from self.writer.check()
        if self.writer is not None:
            yield from self._take_from_others(self.writer)
            self.here = len(self.header.records) - len(self.writer.missing)

    def _verify(self) -> Iterator[int]:
        """Read everything; where something is broken, take the file back to write that again."""
        broken: list[int] = []
        rows: list[int] = []
        with closing(SliceFile(self.path)) as file:
            buffer = aligned_buffer(max(record.nbytes for record in file.records))
            for index, record in enumerate(file.records):
                if _tile(file, record, buffer) is None:
                    broken.append(index)
                yield record.nbytes
            for first, wrong, nbytes in file.check_rows():
                rows += (first + np.flatnonzero(wrong)).tolist()
                yield nbytes
            contiguous = all(file.pieces(record) is not None for record in file.records)
        if not broken and not rows:
            return
        from tpimpi.weights.slices.writer import SliceWriter

        self.good = False
        if contiguous:
            self.writer = SliceWriter.mending(self.path, self.header, broken, rows)
        else:  # another tool has moved its parts: a new file, with what is good of this one
            self.writer = SliceWriter(self.path, self.header)
        self.broken = len(broken) + bool(rows)

    def _take_from_others(self, writer: SliceWriter) -> Iterator[int]:
        """Copy missing tiles from other slices on this host, each with its checksum verified."""
        spans, records = tile_spans(self.header), self.header.records
        wanted = {_content(records[index], spans[index]): index for index in writer.missing}
        wanted = {content: index for content, index in wanted.items() if records[index].block.kind != "tokenizer"}
        buffer = aligned_buffer(max(record.nbytes for record in records))
        for path in self._others() if wanted else []:
            try:
                file = SliceFile(path)
            except (SliceError, StorageError):
                continue  # what is wrong with it is no matter of ours
            with closing(file):
                if file.header.fingerprint != self.header.fingerprint:
                    continue
                for record, span in zip(file.records, tile_spans(file.header), strict=True):
                    index = wanted.get(_content(record, span))
                    if index is None or (tile := _tile(file, record, buffer)) is None:
                        continue
                    del wanted[_content(record, span)]
                    for part in record.parts:
                        matrix = tile.matrices.get(part.name)
                        writer.write(index, part.name, tile.parts[part.name] if matrix is None else matrix.data)
                    yield record.nbytes

    def _others(self) -> list[Path]:
        """Slices that may be of the same model: beside ours (the one that ours will replace, too), and in the cache."""
        found = [*self.path.parent.glob("rank-*.h5"), *model_folders(self.header.fingerprint, "rank-*.h5")]
        return sorted({Path(os.path.realpath(path)) for path in found if parse_slice_name(path.name) is not None})

    def finish(self) -> None:
        """All that was missing is written: have it on the disk."""
        if self.writer is not None:
            self.writer.finish()

    def publish(self) -> None:
        """Give the finished slice its name."""
        if self.writer is not None:
            self.writer.publish()

    def close(self) -> None:
        """What is not finished is left for the next attempt."""
        if self.writer is not None:
            self.writer.close()

    def discard(self) -> None:
        """What is not finished is of no use to anybody."""
        if self.writer is not None:
            self.writer.discard()


def is_good(path: Path, header: Header) -> bool:
    """Whether a file is the slice of that header; its tiles are not read. Raises SliceError where it cannot be opened."""
    there = _header_of(path)
    return there is not None and same_slice(there, header)


def is_ours(path: Path) -> bool:
    """Whether a file that cannot be opened as a slice was one once, or is empty. Raises OSError where it cannot be read."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        beginning = file.read(MAX_SEARCHED_BYTES)
    return not beginning or HEADER_MARK in beginning or all(name in beginning for name in OBJECT_NAMES)


def _header_of(path: Path) -> Header | None:
    """Of the slice that is there, if one is. Raises SliceError."""
    try:
        if not path.exists():
            return None
    except OSError as error:  # of a folder that may not be searched
        raise unreadable(path, error.errno or errno.EIO) from error
    with closing(SliceFile(path)) as file:
        return file.header


def _tile(file: SliceFile, record: Record, buffer: Bytes) -> Tile | None:
    """A tile read into `buffer`; None where it is broken."""
    try:
        return file.read(record, buffer)
    except SliceError:
        return None


def _content(record: Record, span: Span) -> Hashable:
    """What a tile of a model holds, whichever rank of however many it is of."""
    return (record.block, record.heads, record.kv_heads, span, record.parts)


def model_folders(fingerprint: str, pattern: str) -> list[Path]:
    """Files of that pattern in the cache folders of a model."""
    return list(cache_folder().glob(f"*-{fingerprint[:_FINGERPRINT_DIGITS]}-*/{pattern}"))


def tidy_up(path: Path, fingerprint: str) -> None:
    """The slice `path` is made: remove what earlier attempts, at whatever number of ranks, left beside it and in the cache
    folders of the same model, unless a process is writing it."""
    from tpimpi.weights.slices.writer import remove_leftovers

    leftovers = {partial.parent for partial in model_folders(fingerprint, ".rank-*.partial")}
    for folder in {path.parent, *leftovers}:
        remove_leftovers(folder)

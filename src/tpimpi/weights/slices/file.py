"""A slice file, opened to be read. The format is specified in the package (tpimpi.weights.slices)."""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.formats.packed import decode, row_bytes
from tpimpi.errors import DamagedMemoryError, InputError, SliceError, StorageError
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.direct_io import Descriptor, Extent, Trial, pieces
from tpimpi.system.disk import error_number
from tpimpi.weights.slices.datasets import link_elsewhere, stored_elsewhere
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Part, Record, embedding_dataset, experts_dataset
from tpimpi.weights.slices.problems import (
    NOT_THE_FILE,
    broken,
    changed,
    failing,
    in_words,
    missing,
    not_a_file,
    unreadable,
)
from tpimpi.weights.slices.tile import Tile

T = TypeVar("T")
_ROWS_BYTES = 1 << 20  # of the embedding, read at a time to check it
_MAX_HEADER_BYTES = 2**24  # far above any model's; a hostile file may promise to unpack to anything


class SliceFile:
    """A slice file, opened and validated. A tile that is laid out as we write it is one extent, read without HDF5.

    Peak memory: the header, and HDF5's metadata while it opens. Raises SliceError for whatever is wrong with the file;
    reading it later may also raise StorageError, where the disk fails. Tiles may be read by several threads at once.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._data: Descriptor | None = None
        self.waiting: tuple[float, str] | None = (
            None  # while a row is read: since when (time.monotonic()), and for what
        )
        self._file: h5py.File | None = None
        try:
            if (other := not_a_file(path, path.stat().st_mode)) is not None:
                raise other
            self._data = Descriptor(path)
        except FileNotFoundError as error:
            raise missing(path) from error
        except OSError as error:
            raise unreadable(path, error.errno or errno.EIO) from error
        try:
            self._open()
        except SliceError:
            self.close()
            raise
        except InputError as error:  # of the config or the shares in the header
            self.close()
            raise self._broken(str(error)) from error
        except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError) as error:
            self.close()
            if isinstance(error, ValueError) and "slice format version" in str(error):
                raise SliceError(
                    f"slice file {path} has {error}; make the slices again with: python -m tpimpi slice (see --help)"
                ) from error
            number = error_number(error) if isinstance(error, OSError) else None
            if number in NOT_THE_FILE:
                raise unreadable(path, number) from error
            raise self._broken(in_words(error)) from error

    def _broken(self, what: str) -> SliceError:
        return broken(self.path, what)

    def _open(self) -> None:
        file = self._file = h5py.File(self.path, "r", locking=False)
        if (name := link_elsewhere(file)) is not None:
            raise self._broken(f"{name} is a link to somewhere else")
        raw_header = self._small(file["header"], np.dtype("u1"))
        self._sums = self._small(file["checksums"], np.dtype("<u8"))
        if xxhash.xxh3_64_intdigest(raw_header) != int(self._sums[0]):
            raise self._broken("the header does not match its checksum")
        self.header = Header.from_json(raw_header.tobytes())
        if len(self._sums) != 1 + len(self.header.records):
            raise self._broken(f"{len(self._sums)} checksums for {len(self.header.records)} tiles")
        assert self._data is not None
        self._found = self._data.stat()
        self.size = size = self._found.st_size
        # Of each record the offsets of its parts; None where one is chunked, and h5py must read it.
        self._offsets: dict[str, tuple[int, ...] | None] = {}
        self._index = {record.path: index for index, record in enumerate(self.header.records)}
        chunked = False
        for record in self.header.records:
            self._offsets[record.path] = self._places(file, record)
            chunked |= self._offsets[record.path] is None
        self.has_embedding = "embedding" in file
        if self.has_embedding != (self.header.rank == 0):
            has = "has an" if self.has_embedding else "has no"
            raise self._broken(f"rank {self.header.rank} {has} embedding, which is rank 0's alone")
        if self.has_embedding:
            chunked |= self._open_embedding(file, size)
        if not chunked:
            # All that is left is plain reads at known places; HDF5's caches can go.
            file.close()
            self._file = None
        self._data.forget()  # what HDF5 read

    def _check_stored(self, *datasets: h5py.Dataset) -> None:
        for dataset in datasets:
            if (why := stored_elsewhere(dataset)) is not None:
                raise self._broken(why)

    def _places(self, file: h5py.File, record: Record) -> tuple[int, ...] | None:
        """Where the parts of a tile lie in the file; None where one is chunked. Raises SliceError for another dataset."""
        if record.expert > 0:  # its layer's first has looked at the dataset of all
            first = self._offsets[self._expert_path(record, 0)]
            return None if first is None else tuple(place + record.expert * record.nbytes for place in first)
        if record.expert == 0:
            shape = (self.header.config.experts, record.nbytes)
            offset = self._place(file[experts_dataset(record.block.layer)], shape, np.dtype("u1"))
            return None if offset is None else tuple(offset + start for start, _, _ in record.spans())
        offsets: list[int] = []
        for part in record.parts:
            offset = self._place(file[f"{record.path}/{part.name}"], part.dataset_shape, part.dtype)
            if offset is None:
                return None
            offsets.append(offset)
        return tuple(offsets)

    def _expert_path(self, record: Record, expert: int) -> str:
        return f"{experts_dataset(record.block.layer)}/{expert:04d}"

    def _place(self, dataset: h5py.Dataset, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int | None:
        """Where a dataset lies, 0 if it has no bytes; None where it is chunked. SliceError for one of another kind."""
        if dataset.shape != shape or dataset.dtype != dtype:
            raise self._broken(f"{dataset.name} is {dataset.shape} {dataset.dtype}, must be {shape} {dtype}")
        offset = dataset.id.get_offset()
        if offset is None and dataset.nbytes:
            if not dataset.id.get_storage_size():  # or a few bytes could promise any amount of zeros
                raise self._broken(f"{dataset.name} has no data")
            self._check_stored(dataset)
            return None
        if (offset or 0) + dataset.nbytes > self.size:
            raise self._broken(f"{dataset.name} ends beyond the file's {self.size} bytes")
        return offset or 0

    def _open_embedding(self, file: h5py.File, size: int) -> bool:
        config = self.header.config
        weight, sums = file["embedding/weight"], file["embedding/checksums"]
        shape, dtype = embedding_dataset(config, self.header.formats.embedding)
        if weight.shape != shape or weight.dtype != dtype:
            raise self._broken(f"the embedding is {weight.shape} {weight.dtype}, must be {shape} {dtype}")
        if sums.shape != (config.vocab,) or sums.dtype != np.dtype("<u8"):
            raise self._broken(f"the embedding has {sums.shape} checksums, must be {config.vocab}")
        self._check_stored(weight, sums)
        if sums.nbytes > _MAX_HEADER_BYTES:
            raise self._broken(f"the embedding has {len(sums)} checksums, more than any model")
        self._embedding = weight.id.get_offset()
        for dataset in (weight, sums):
            offset = dataset.id.get_offset()
            if offset is not None and offset + dataset.nbytes > size:
                raise self._broken(f"{dataset.name} ends beyond the file's {size} bytes")
        # Kept: read with the rows they would match whatever file is written over this one.
        self._row_sums = np.asarray(sums[...])
        return self._embedding is None

    def _small(self, dataset: h5py.Dataset, dtype: np.dtype[Any]) -> Array:
        """All of a dataset that is no tile. [n]"""
        if dataset.ndim != 1 or dataset.dtype != dtype or dataset.nbytes > _MAX_HEADER_BYTES:
            raise self._broken(f"{dataset.name} is {dataset.shape} {dataset.dtype}")
        self._check_stored(dataset)
        return np.asarray(dataset[...])

    @property
    def records(self) -> tuple[Record, ...]:
        return self.header.records

    def records_of(self, kind: str) -> list[Record]:
        """Records of one kind of block (attn, mlp, head, resident, tokenizer), in order."""
        return [record for record in self.records if record.block.kind == kind]

    @property
    def direct(self) -> bool:
        """Whether tiles are read past the page cache."""
        return self._opened().direct

    @property
    def device(self) -> int:
        """The disk that the file is on, as the system numbers it (st_dev)."""
        return self._found.st_dev

    def pieces(self, record: Record) -> list[Extent] | None:
        """The reads that a tile is made of, for `read_piece`; None where it is chunked, and only `read` can read it."""
        places = self._offsets[record.path]
        return None if places is None else list(pieces(_extents(places, record.spans())))

    def read_piece(self, record: Record, piece: Extent, buffer: Bytes) -> None:
        """Read one of `pieces` into `buffer`, that of the tile. Raises SliceError where the file is cut short."""
        try:
            self._opened().read(piece, buffer)
        except (OSError, EOFError) as error:
            raise self._failing(record.path, error) from error

    def tile(self, record: Record, buffer: Bytes) -> Tile:
        """The tile whose pieces are all in `buffer`, of which it holds views. Raises SliceError where a byte differs."""
        if not self.matches(record, buffer):
            raise self._changed(record.path) or self._broken(f"{record.path} does not match its checksum")
        return Tile.of(record, buffer)

    def matches(self, record: Record, buffer: Bytes) -> bool:
        """Whether the tile in `buffer` has the checksum that the file has of it."""
        digest = xxhash.xxh3_64()
        for start, stop, _ in record.spans():
            digest.update(buffer[start:stop])
        return digest.intdigest() == int(self._sums[1 + self._index[record.path]])

    def damage(self, record: Record, buffer: Bytes) -> DamagedMemoryError | None:
        """What is to be said where the tile that was read into `buffer` is not what it was then; None where it is."""
        if self.matches(record, buffer):
            return None
        return DamagedMemoryError(
            f"{record.path} of slice file {self.path} was right when it was read, and has changed since now; this machine's "
            "memory is bad or overclocked: test it (memtest86+), and take it out of the run"
        )

    def read(self, record: Record, buffer: Bytes) -> Tile:
        """Read and check a tile, into `buffer` (page-aligned, record.nbytes).

        Past the page cache an extent is one read: where all cores compute, a thread may wait for one for milliseconds after
        each. Else its pieces are read one after another, so that little of the page cache is taken."""
        places = self._offsets[record.path]
        if places is None:
            self._read_chunked(record, buffer)
        else:
            extents = _extents(places, record.spans())
            for part in extents if self.direct else pieces(extents):
                self.read_piece(record, part, buffer)
        return self.tile(record, buffer)

    def trial(self, records: Sequence[Record]) -> Trial:
        """For measuring how fast the disk gives these tiles; those that are chunked are left out."""
        placed = [(record, self._offsets[record.path]) for record in records]
        return Trial(self._opened(), (e for r, offsets in placed if offsets for e in _extents(offsets, r.spans())))

    def measure(self, what: Callable[[], T]) -> T:
        """What a trial's method gives. Raises StorageError or SliceError where reading fails."""
        try:
            return what()
        except (OSError, EOFError) as error:
            raise self._failing("tiles", error) from error

    def _opened(self) -> Descriptor:
        assert self._data is not None, "the slice file is closed"
        return self._data

    def load(self, record: Record) -> Tile:
        """Read a tile into memory of its own."""
        return self.read(record, aligned_buffer(record.nbytes))

    def _read_chunked(self, record: Record, buffer: Bytes) -> None:
        assert self._file is not None
        if record.expert >= 0:
            name = experts_dataset(record.block.layer)
            with self._reading(name):
                self._file[name].read_direct(buffer[: record.nbytes], np.s_[record.expert])
            self._opened().forget()
            return
        for start, stop, part in record.spans():
            if part.nbytes:
                target = buffer[start:stop].view(part.dtype).reshape(part.dataset_shape)
                with self._reading(f"{record.path}/{part.name}"):
                    self._file[f"{record.path}/{part.name}"].read_direct(target)
        self._opened().forget()

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn what HDF5 says while reading into one line: the file is broken, or the disk fails."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            raise self._failing(what, error) from error

    def _failing(self, what: str, error: Exception) -> SliceError | StorageError:
        """What to say of an error of the system, of HDF5 or EOFError while `what` was read."""
        if (problem := self._changed(what)) is not None:
            return problem
        return failing(self.path, what, error)

    def _changed(self, what: str) -> SliceError | None:
        """What to say where another program has written to the file since it was opened."""
        now = self._opened().stat()
        if (now.st_size, now.st_mtime_ns) == (self._found.st_size, self._found.st_mtime_ns):
            return None
        return changed(self.path, what)

    def _small_read(self, target: Array, offset: int) -> None:
        """Fill an array from any place in the file; pages that this brings into the page cache are not kept there."""
        self.waiting = (time.monotonic(), "a row of the embedding")
        try:
            self._opened().read_plain(target.view(np.uint8).reshape(-1), offset)
        except (OSError, EOFError) as error:
            raise self._failing("the embedding", error) from error
        finally:
            self.waiting = None
        self._opened().forget(offset, target.nbytes)

    def embedding_rows(self, ids: Iterable[int]) -> F32:
        """Rows of the embedding table, read one by one and checked. Returns f32 [len(ids), hidden]."""
        config, fmt = self.header.config, self.header.formats.embedding
        width = row_bytes(fmt, config.hidden)
        rows: list[Array] = []
        for token in ids:
            assert 0 <= token < config.vocab, f"token id {token} of a vocabulary of {config.vocab}"
            if self._file is not None:
                with self._reading("embedding"):
                    row = np.ascontiguousarray(self._file["embedding/weight"][token]).view(np.uint8)
            else:
                row = np.empty(width, np.uint8)
                self._small_read(row, self._embedding + token * width)
            if xxhash.xxh3_64_intdigest(row) != int(self._row_sums[token]):
                what = "a row of the embedding"
                raise self._changed(what) or self._broken(f"{what} does not match its checksum")
            rows.append(row)
        return decode(np.stack(rows), fmt, config.hidden)

    def tokenizer_assets(self) -> dict[str, bytes]:
        """The tokenizer's files, by name (rank 0's file only)."""
        return {n: p.tobytes() for r in self.records_of("tokenizer") for n, p in self.load(r).parts.items()}

    def verify(self) -> Iterator[int]:
        """Read and check everything; yields the bytes read after each tile. Raises SliceError at the first mismatch."""
        buffer = aligned_buffer(max(record.nbytes for record in self.records))
        for record in self.records:
            self.read(record, buffer)
            yield record.nbytes
        for first, wrong, nbytes in self.check_rows():
            if wrong.any():
                raise self._broken(f"row {first + int(np.argmax(wrong))} of the embedding does not match its checksum")
            yield nbytes

    def check_rows(self) -> Iterator[tuple[int, npt.NDArray[np.bool_], int]]:
        """Read the embedding, a run of rows at a time: (first row, bool [rows]: which do not match their checksum, bytes).

        Nothing where there is none.
        """
        config = self.header.config
        width = row_bytes(self.header.formats.embedding, config.hidden)
        step = max(1, _ROWS_BYTES // width)
        for first in range(0, config.vocab if self.has_embedding else 0, step):
            sums = self._row_sums[first : first + step]
            if self._file is not None:
                with self._reading("embedding"):
                    rows = np.ascontiguousarray(self._file["embedding/weight"][first : first + step]).view(np.uint8)
            else:
                rows = np.empty((len(sums), width), np.uint8)
                self._small_read(rows, self._embedding + first * width)
            found = [xxhash.xxh3_64_intdigest(row) for row in rows]
            yield first, np.array(found, "<u8") != sums, rows.nbytes

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._data is not None:
            self._data.close()
            self._data = None


def _extents(offsets: Sequence[int], spans: Iterable[tuple[int, int, Part]]) -> Iterator[Extent]:
    """Reads that bring a tile's parts, which lie at `offsets` in the file; neighbours there and in the buffer are one."""
    run: Extent | None = None
    for offset, (start, stop, part) in zip(offsets, spans, strict=True):
        if not part.nbytes:
            continue
        if run and offset - run.offset == start - run.start:
            run = run._replace(stop=stop)
        else:
            if run:
                yield run
            run = Extent(offset, start, stop)
    if run:
        yield run

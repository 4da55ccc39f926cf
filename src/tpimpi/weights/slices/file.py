"""The slice file: one rank's part of a model, as one HDF5 file. Version 2 of the format is specified here.

A slice file is named `rank-R-of-N.h5` and holds these objects:

`/header` (uint8)
    JSON, UTF-8: `tpimpi_slice` (this version, 2), `made_by`, `rank`, `formats` (of the weights: `layers`, a list of runs of
    layers that are alike, `[count, {part: format}]`; `head`; `embedding`; each f32, bf16, q8_0, q4_0 or q4_1), `model` (a
    name to show), `fingerprint` (of the source), `config` (ModelConfig), `plan` (`weights`, and for each rank
    `[heads, kv_heads, columns]`, each `[start, stop]`), and `tiles`: a list of records, in the order in which a run
    uses them. A record has `path` (of its group), `block` (`[kind, layer]`), `parts` (of `[name, format, shape]`), and
    for an attention tile `heads`, `kv_heads`, `q_to_kv` (see partition.AttentionTile).
`/checksums` (uint64)
    XXH3-64 of `/header`, then of each record's tile. A tile's checksum is taken over the bytes of its parts, in the
    order of the record, as they come out of the datasets: it stays true if another tool repacks or compresses them.
`/layers/LLLL/attn/tile-TTT/{q,k,v,o,q_bias,k_bias,v_bias}`
    Rows of the query, key and value projections of the tile's heads ([rows, hidden]), and its query heads' columns of
    the output projection ([hidden, heads * head_dim]); biases of the rows. A tile without KV heads has no k and v.
`/layers/LLLL/qkv/tile-TTT/{q,k,v,q_bias,k_bias,v_bias}`, `/layers/LLLL/attn/tile-TTT/o`
    The same in two tiles, where queries and keys are normed over all heads (see models/blocks).
`/layers/LLLL/mlp/tile-TTT/{gate,up,down,gate_bias,up_bias}`
    The tile's columns: rows of gate and up ([columns, hidden]), columns of down ([hidden, columns]).
`/head/tile-TTT/rows` (rank 0 only)
    A run of vocabulary rows of the output head ([rows, hidden]).
`/resident/tile-000/{attn_norm,mlp_norm,attn_post_norm,mlp_post_norm,q_norm,k_norm,o_bias,down_bias,norm}`
    f32, not packed, small, kept in memory for the whole run: those norms that the model has, of all layers
    ([layers, hidden]; q_norm and k_norm [layers, head_dim], or [layers, heads * head_dim] and [layers, kv_heads *
    head_dim] where they are over all heads); rank 0 alone has the biases of the output projections ([layers, hidden]),
    added once, and the final norm ([hidden]).
`/tokenizer/tile-000/NAME` (rank 0 only)
    The tokenizer's files as they are (uint8).
`/embedding/weight`, `/embedding/checksums` (rank 0 only)
    The embedding table in row form, of which a run reads single rows: f32 or bf16 [vocab, hidden], or blocks, uint8
    [vocab, bytes a row]; and XXH3-64 of each row's bytes (uint64).

Matrices (q, k, v, o, gate, up, down, rows; the shapes given above are those of the numbers, as in the header) are
stored in packed form: panels of 16 rows, as `tpimpi.compute.formats` specifies. The dataset is float32
[panels, columns, 16] for f32, uint16 [panels, ceil(columns / 2), 16, 2] for bf16, and uint8 [panels, bytes a panel] for
the quantized formats. Where the number of rows is no multiple of 16, or that of columns no multiple of 32 (of 2, in
bf16), the numbers that are not there are zeros. Biases are f32, not packed. f32 is stored as IEEE little-endian float,
bf16 as uint16.

The writer lays the parts of a tile next to each other, each at a multiple of 4096 bytes, so that a tile is one extent of
the file and is read with one call; a reader must not rely on that (`h5repack` may move or chunk them). HDF5 metadata
carries HDF5's own checksums (libver "latest").
slices/writer writes the file, SliceFile here reads it.
"""

from __future__ import annotations

import contextlib
import errno
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.compute.arrays import F32, Array
from tpimpi.compute.formats.packed import Matrix, decode, row_bytes
from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.system.direct_io import Descriptor, Extent, Trial, pieces
from tpimpi.system.disk import error_number
from tpimpi.weights.slices.header import Header
from tpimpi.weights.slices.layout import Part, Record, embedding_dataset
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

T = TypeVar("T")
_ROWS_BYTES = 1 << 20  # of the embedding, read at a time to check it
_MOST_HEADER_BYTES = 2**28  # far above any model's; a hostile file may promise to unpack to anything


@dataclass(frozen=True)
class Tile:
    """A tile in memory: its record, and its parts by name, which are views of one buffer."""

    record: Record
    parts: Mapping[str, Array]  # biases, norms (f32) and files (uint8), in their shapes
    matrices: Mapping[str, Matrix]


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
            offsets: list[int] = []
            for part in record.parts:
                dataset = file[f"{record.path}/{part.name}"]
                if dataset.shape != part.dataset_shape or dataset.dtype != part.dtype:
                    wanted = f"{part.dataset_shape} {part.dtype}"
                    raise self._broken(f"{dataset.name} is {dataset.shape} {dataset.dtype}, must be {wanted}")
                offset = dataset.id.get_offset()
                if offset is None and part.nbytes:
                    if not dataset.id.get_storage_size():  # or a few bytes could promise any amount of zeros
                        raise self._broken(f"{dataset.name} has no data")
                    chunked = True
                    break
                if (offset or 0) + part.nbytes > size:
                    raise self._broken(f"{dataset.name} ends beyond the file's {size} bytes")
                offsets.append(offset or 0)
            self._offsets[record.path] = tuple(offsets) if len(offsets) == len(record.parts) else None
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

    def _open_embedding(self, file: h5py.File, size: int) -> bool:
        config = self.header.config
        weight, sums = file["embedding/weight"], file["embedding/checksums"]
        shape, dtype = embedding_dataset(config, self.header.formats.embedding)
        if weight.shape != shape or weight.dtype != dtype:
            raise self._broken(f"the embedding is {weight.shape} {weight.dtype}, must be {shape} {dtype}")
        if sums.shape != (config.vocab,) or sums.dtype != np.dtype("<u8"):
            raise self._broken(f"the embedding has {sums.shape} checksums, must be {config.vocab}")
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
        if dataset.ndim != 1 or dataset.dtype != dtype or dataset.nbytes > _MOST_HEADER_BYTES:
            raise self._broken(f"{dataset.name} is {dataset.shape} {dataset.dtype}")
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
        parts: dict[str, Array] = {}
        matrices: dict[str, Matrix] = {}
        digest = xxhash.xxh3_64()
        for start, stop, part in record.spans():
            data = buffer[start:stop]
            digest.update(data)
            if part.is_matrix:
                matrices[part.name] = part.matrix(data)
            else:
                parts[part.name] = data.view(part.dtype).reshape(part.shape)
        if digest.intdigest() != int(self._sums[1 + self._index[record.path]]):
            raise self._changed(record.path) or self._broken(f"{record.path} does not match its checksum")
        return Tile(record, parts, matrices)

    def read(self, record: Record, buffer: Bytes) -> Tile:
        """Read and check a tile: all its pieces, one after another, into `buffer` (page-aligned, record.nbytes)."""
        wanted = self.pieces(record)
        if wanted is None:
            self._read_chunked(record, buffer)
        for piece in wanted or []:
            self.read_piece(record, piece, buffer)
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

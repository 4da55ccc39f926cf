"""The slice file: one rank's part of a model, as one HDF5 file. Version 2 of the format is specified here.

A slice file is named `rank-R-of-N.h5` and holds these objects:

`/header` (uint8)
    JSON, UTF-8: `tpimpi_slice` (this version, 2), `made_by`, `rank`, `formats` (of the weights: `layers`, a list of runs of
    layers that are alike, `[count, {part: format}]`; `head`; `embedding`; each f32, bf16, q8_0, q4_0 or q4_1), `model` (a
    name to show), `fingerprint` (of the source), `config` (ModelConfig), `plan` (`weights`, and for each rank
    `[heads, kv_heads, columns]`, each `[start, stop]`), and `tiles`: a list of records, in the order in which a run
    uses them. A record has `path` (of its group), `block` (`[kind, layer]`), `parts` (of `[name, format, shape]`), and
    for an attention tile `heads`, `kv_heads`, `q_to_kv` (see plan.AttentionTile).
`/checksums` (uint64)
    XXH3-64 of `/header`, then of each record's tile. A tile's checksum is taken over the bytes of its parts, in the
    order of the record, as they come out of the datasets: it stays true if another tool repacks or compresses them.
`/layers/LLLL/attn/tile-TTT/{q,k,v,o,q_bias,k_bias,v_bias}`
    Rows of the query, key and value projections of the tile's heads ([rows, hidden]), and its query heads' columns of
    the output projection ([hidden, heads * head_dim]); biases of the rows. A tile without KV heads has no k and v.
`/layers/LLLL/mlp/tile-TTT/{gate,up,down,gate_bias,up_bias}`
    The tile's columns: rows of gate and up ([columns, hidden]), columns of down ([hidden, columns]).
`/head/tile-TTT/rows` (rank 0 only)
    A run of vocabulary rows of the output head ([rows, hidden]).
`/resident/tile-000/{attn_norm,mlp_norm,q_norm,k_norm,o_bias,down_bias,norm}`
    f32, not packed, small, kept in memory for the whole run: the norms of all layers ([layers, hidden], or [layers,
    head_dim] for q_norm and k_norm); rank 0 alone has the biases of the output projections ([layers, hidden]), added
    once, and the final norm ([hidden]).
`/tokenizer/tile-000/NAME` (rank 0 only)
    The tokenizer's files as they are (uint8).
`/embedding/weight`, `/embedding/checksums` (rank 0 only)
    The embedding table in row form, of which a run reads single rows: f32 or bf16 [vocab, hidden], or blocks, uint8
    [vocab, bytes a row]; and XXH3-64 of each row's bytes (uint64).

Matrices (q, k, v, o, gate, up, down, rows; the shapes given above are those of the numbers, as in the header) are stored in
packed form: panels of 16 rows, as `tpimpi.formats` specifies. The dataset is float32 [panels, columns, 16] for f32, uint16
[panels, ceil(columns / 2), 16, 2] for bf16, and uint8 [panels, bytes a panel] for the quantized formats. Where the number of
rows is no multiple of 16, or that of columns no multiple of 32 (of 2, in bf16), the numbers that are not there are zeros.
Biases are f32, not packed. f32 is stored as IEEE little-endian float, bf16 as uint16.

The writer lays the parts of a tile next to each other, each at a multiple of 4096 bytes, so that a tile is one extent of
the file and is read with one call; a reader must not rely on that (`h5repack` may move or chunk them). HDF5 metadata
carries HDF5's own checksums (libver "latest").
slicewriter writes the file, SliceFile here reads it.
"""

from __future__ import annotations

import contextlib
import errno
import mmap
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import xxhash

from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.formats import F32, Array, Matrix, decode, row_bytes
from tpimpi.sliceheader import Header
from tpimpi.slicelayout import Part, Record, aligned, embedding_dataset

_MOST_HEADER_BYTES = 2**28  # far above any model's; a hostile file may promise to unpack to anything
# What the operating system says of a disk, a network or a limit, and not of what is in the file.
_NOT_THE_FILE = {
    *(errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EREMOTEIO, errno.EAGAIN, errno.ENODEV, errno.ENXIO),
    *(errno.EACCES, errno.EPERM, errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.ENAMETOOLONG),
}


@dataclass(frozen=True)
class Tile:
    """A tile in memory: its record, and its parts by name, which are views of one buffer."""

    record: Record
    parts: Mapping[str, Array]  # biases, norms (f32) and files (uint8), in their shapes
    matrices: Mapping[str, Matrix]


def slice_name(rank: int, ranks: int) -> str:
    """File name of one rank's slice."""
    return f"rank-{rank}-of-{ranks}.h5"


def parse_slice_name(name: str) -> tuple[int, int] | None:
    """Undo `slice_name`: (rank, ranks), or None for a name that no slice has, such as rank-2-of-2.h5."""
    match = re.fullmatch(r"rank-([0-9]{1,9})-of-([0-9]{1,9})\.h5", name)
    parsed = (int(match[1]), int(match[2])) if match else None
    return parsed if parsed and parsed[0] < parsed[1] and slice_name(*parsed) == name else None


def error_number(error: Exception) -> int | None:
    """The errno of what the operating system or HDF5 raised; HDF5 may give it in its text alone."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"errno = ([1-9][0-9]*)", str(error))
    return int(match[1]) if match else None


def _not_a_file(path: Path, mode: int) -> SliceError | None:
    """What stands in a slice's place, where that is no file."""
    if stat.S_ISREG(mode):
        return None
    kinds = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a named pipe", stat.S_IFSOCK: "a socket"}
    kind = kinds.get(stat.S_IFMT(mode), "a device")
    return SliceError(f"{path} is {kind} where a slice file is needed; remove it, and make the slices again")


def _unreadable(path: Path, number: int) -> SliceError:
    remedy = {
        errno.EACCES: "let this user read it, or use slices elsewhere (--slices)",
        errno.EMFILE: "raise the limit of open files (ulimit -n 4096)",
        errno.ENAMETOOLONG: "use a shorter path",
    }
    what = remedy.get(number, "check the disk or network it is on, or use slices elsewhere (--slices)")
    return SliceError(f"slice file {path} cannot be read: {os.strerror(number)}; {what}")


def _missing(path: Path) -> SliceError:
    wanted = parse_slice_name(path.name)
    found = {parsed[1] for other in path.parent.glob("*.h5") if (parsed := parse_slice_name(other.name))}
    if wanted and found and wanted[1] not in found:
        made_for = " and ".join(str(ranks) for ranks in sorted(found))
        return SliceError(
            f"the slices in {path.parent} are for {made_for} ranks, this run has {wanted[1]}; start as many ranks, "
            f"or make slices for {wanted[1]} with: python -m tpimpi slice --ranks {wanted[1]} --out {path.parent}"
        )
    return SliceError(
        f"slice file {path} is missing; make it with: python -m tpimpi slice (see --help), or copy it there from the host "
        "that has it"
    )


def aligned_buffer(nbytes: int) -> npt.NDArray[np.uint8]:
    """Zeroed memory of its own, page-aligned, not touched until used. uint8 [nbytes].

    In large pages where the system has them: kernels read those some 10 % faster.
    """
    try:
        memory = mmap.mmap(-1, max(nbytes, 1), flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            with contextlib.suppress(OSError):  # a kernel built without them
                memory.madvise(mmap.MADV_HUGEPAGE)
        return np.frombuffer(memory, dtype=np.uint8)[:nbytes]
    except (OSError, OverflowError) as error:
        raise MemoryError(f"no memory for {nbytes} bytes") from error


@dataclass(frozen=True)
class _Place:
    """Where a record's parts lie: (offset of each part), or None where a part is chunked and h5py must read it."""

    offsets: tuple[int, ...] | None


class SliceFile:
    """A slice file, opened and validated; reading a tile is one `pread` where the file is laid out as we write it.

    Peak memory: the header, and HDF5's metadata while it opens. Raises SliceError for whatever is wrong with the file;
    reading it later may also raise StorageError, where the disk fails.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = -1
        self._file: h5py.File | None = None
        try:
            if (other := _not_a_file(path, path.stat().st_mode)) is not None:
                raise other
            self._fd = os.open(path, os.O_RDONLY)
        except FileNotFoundError as error:
            raise _missing(path) from error
        except OSError as error:
            raise _unreadable(path, error.errno or errno.EIO) from error
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
            if number in _NOT_THE_FILE:
                raise _unreadable(path, number) from error
            kind = "" if type(error) is ValueError else f"{type(error).__name__}: "
            raise self._broken(f"{kind}{error}") from error

    def _broken(self, what: str) -> SliceError:
        return SliceError(f"slice file {self.path} is broken ({what}); delete it and make the slices again")

    def _open(self) -> None:
        file = self._file = h5py.File(self.path, "r")
        raw_header = self._small(file["header"], np.dtype("u1"))
        self._sums = self._small(file["checksums"], np.dtype("<u8"))
        if xxhash.xxh3_64_intdigest(raw_header) != int(self._sums[0]):
            raise self._broken("the header does not match its checksum")
        self.header = Header.from_json(raw_header.tobytes())
        if len(self._sums) != 1 + len(self.header.records):
            raise self._broken(f"{len(self._sums)} checksums for {len(self.header.records)} tiles")
        self.size = size = os.fstat(self._fd).st_size
        self._places: dict[str, _Place] = {}
        self._checked: set[str] = set()
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
            self._places[record.path] = _Place(tuple(offsets) if len(offsets) == len(record.parts) else None)
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

    def _open_embedding(self, file: h5py.File, size: int) -> bool:
        config = self.header.config
        weight, sums = file["embedding/weight"], file["embedding/checksums"]
        shape, dtype = embedding_dataset(config, self.header.formats.embedding)
        if weight.shape != shape or weight.dtype != dtype:
            raise self._broken(f"the embedding is {weight.shape} {weight.dtype}, must be {shape} {dtype}")
        if sums.shape != (config.vocab,) or sums.dtype != np.dtype("<u8"):
            raise self._broken(f"the embedding has {sums.shape} checksums, must be {config.vocab}")
        self._embedding = (weight.id.get_offset(), sums.id.get_offset())
        for dataset, offset in zip((weight, sums), self._embedding, strict=True):
            if offset is not None and offset + dataset.nbytes > size:
                raise self._broken(f"{dataset.name} ends beyond the file's {size} bytes")
        return None in self._embedding

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

    def read(self, record: Record, buffer: npt.NDArray[np.uint8]) -> Tile:
        """Read a tile into `buffer` (uint8, page-aligned, at least record.nbytes) and check it, the first time.

        What the tile holds are views of the buffer. Raises SliceError where the file is cut short or a byte differs.
        """
        places, position = self._places[record.path].offsets, 0
        spans: list[tuple[int, int, Part]] = []
        for part in record.parts:
            spans.append((position, position + part.nbytes, part))
            position += aligned(part.nbytes)
        if places is None:
            self._read_chunked(record, buffer, spans)
        else:
            for offset, start, stop in _extents(places, spans):
                self._pread(buffer[start:stop], offset)
        parts: dict[str, Array] = {}
        matrices: dict[str, Matrix] = {}
        for start, stop, part in spans:
            if part.is_matrix:
                rows, columns = part.shape
                matrices[part.name] = Matrix(part.format, rows, columns, buffer[start:stop])
            else:
                parts[part.name] = buffer[start:stop].view(part.dtype).reshape(part.shape)
        if record.path not in self._checked:
            digest = xxhash.xxh3_64()
            for start, stop, _ in spans:
                digest.update(buffer[start:stop])
            if digest.intdigest() != int(self._sums[1 + self._index[record.path]]):
                raise self._broken(f"{record.path} does not match its checksum")
            self._checked.add(record.path)
        return Tile(record, parts, matrices)

    def load(self, record: Record) -> Tile:
        """Read a tile into memory of its own."""
        return self.read(record, aligned_buffer(record.nbytes))

    def _read_chunked(
        self, record: Record, buffer: npt.NDArray[np.uint8], spans: Sequence[tuple[int, int, Part]]
    ) -> None:
        assert self._file is not None
        for start, stop, part in spans:
            if part.nbytes:
                target = buffer[start:stop].view(part.dtype).reshape(part.dataset_shape)
                with self._reading(f"{record.path}/{part.name}"):
                    self._file[f"{record.path}/{part.name}"].read_direct(target)

    @contextlib.contextmanager
    def _reading(self, what: str) -> Iterator[None]:
        """Turn what HDF5 says while reading into one line: the file is broken, or the disk fails."""
        try:
            yield
        except (OSError, RuntimeError, ValueError) as error:
            number = error_number(error)
            if number in _NOT_THE_FILE:
                raise self._failing(number) from error
            raise self._broken(f"{what}: {error}") from error

    def _failing(self, number: int) -> StorageError:
        return StorageError(
            f"slice file {self.path} can no longer be read: {os.strerror(number)}; "
            "check the disk or network it is on, and start again"
        )

    def _pread(self, target: npt.NDArray[np.uint8], offset: int) -> None:
        view = memoryview(target)
        while view:
            try:
                count = os.preadv(self._fd, [view], offset)
            except OSError as error:
                raise self._failing(error.errno or errno.EIO) from error
            if count == 0:
                raise self._broken(f"it ends at byte {offset}")
            view, offset = view[count:], offset + count

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
                    expected = int(self._file["embedding/checksums"][token])
            else:
                row, digest = np.empty(width, np.uint8), np.empty(8, np.uint8)
                self._pread(row, self._embedding[0] + token * width)
                self._pread(digest, self._embedding[1] + token * 8)
                expected = int(digest.view("<u8")[0])
            if xxhash.xxh3_64_intdigest(row) != expected:
                raise self._broken("a row of the embedding does not match its checksum")
            rows.append(row)
        return decode(np.stack(rows), fmt, config.hidden)

    def tokenizer_assets(self) -> dict[str, bytes]:
        """The tokenizer's files, by name (rank 0's file only)."""
        return {n: p.tobytes() for r in self.records_of("tokenizer") for n, p in self.load(r).parts.items()}

    def verify(self) -> Iterator[int]:
        """Read and check everything; yields the bytes read after each tile. Raises SliceError at the first mismatch."""
        buffer = aligned_buffer(max(record.nbytes for record in self.records))
        self._checked.clear()
        for record in self.records:
            self.read(record, buffer)
            yield record.nbytes
        if self.has_embedding:
            width = row_bytes(self.header.formats.embedding, self.header.config.hidden)
            for token in range(self.header.config.vocab):
                self.embedding_rows([token])
                if token % 4096 == 0:
                    yield 4096 * width

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _extents(offsets: Sequence[int], spans: Sequence[tuple[int, int, Part]]) -> Iterator[tuple[int, int, int]]:
    """Join parts that lie in the file as they lie in the buffer: (file offset, buffer start, buffer stop) a read."""
    run: tuple[int, int, int] | None = None
    for offset, (start, stop, part) in zip(offsets, spans, strict=True):
        if not part.nbytes:
            continue
        if run and offset - run[0] == start - run[1]:
            run = (run[0], run[1], stop)
        else:
            if run:
                yield run
            run = (offset, start, stop)
    if run:
        yield run

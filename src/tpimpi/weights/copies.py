"""Other ranks' tiles, made again on rank 0 to compare with what those ranks compute: from the model's file, which stays with
the user, or, where there is none, from slices that lie on rank 0's own disk."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Protocol

import numpy as np

from tpimpi.compute.arrays import Array
from tpimpi.compute.formats.base import Quantizer
from tpimpi.errors import SliceError
from tpimpi.system.buffers import Bytes, aligned_buffer
from tpimpi.weights.build import build_tiles
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.header import Header, same_slice
from tpimpi.weights.slices.layout import Record, layer_records, slice_records
from tpimpi.weights.slices.names import slice_name
from tpimpi.weights.slices.tile import Tile
from tpimpi.weights.sources import Source, open_source

_BUILD_BYTES = 40_000_000  # that making a tile takes beside the tile, at most (see build)


class TileCopies(Protocol):
    """Tiles of any rank, on rank 0."""

    @property
    def what(self) -> str:
        """Where they are from, in a word or two."""

    @property
    def work_bytes(self) -> int:
        """Memory that it takes to get one, beside the tile."""

    def tile(self, records: Sequence[Record], number: int, rank: int) -> Tile:
        """Of these records, all of one block of a rank, the tile of the one with this number."""

    def close(self) -> None:
        """Close the files."""


def records_of_rank(header: Header, rank: int, layer: int) -> list[Record]:
    """The tiles of a layer that another rank has, where `header` is that of our own slice; in the order of use."""
    return list(layer_records(header.config, header.partition.shares[rank], rank, header.formats, layer))


def open_copies(header: Header, model: Path | None, slices: Path | None, quantizer: Quantizer) -> TileCopies | None:
    """Where the tiles of other ranks are to be had, of the slices that `header` is rank 0's of: from the model's file, or
    the folder of the slices, if the others' are there too; None where neither is.

    Raises ModelError, SliceError for files that are of another model, or broken.
    """
    if model is not None:
        source = open_source(model)
        if source.fingerprint() == header.fingerprint:
            return SourceCopies(source, header, quantizer)
        source.close()
    paths = {rank: (slices or Path()) / slice_name(rank, header.partition.ranks) for rank in _others(header)}
    if slices is not None and all(path.is_file() for path in paths.values()):
        return SliceCopies(header, paths)
    return None


def _others(header: Header) -> range:
    return range(1, header.partition.ranks)


class SourceCopies:
    """Tiles made of the model's file, as slicing makes them."""

    what, work_bytes = "the model's file", _BUILD_BYTES

    def __init__(self, source: Source, header: Header, quantizer: Quantizer) -> None:
        self._source, self._header, self._quantizer = source, header, quantizer

    def tile(self, records: Sequence[Record], number: int, rank: int) -> Tile:
        header = Header(
            rank=rank,
            formats=self._header.formats,
            model=self._header.model,
            fingerprint=self._header.fingerprint,
            config=self._header.config,
            partition=self._header.partition,
            records=tuple(records),
        )
        target = _OneTile(header, number)
        build_tiles(self._source, [target], None, lambda done: None, self._quantizer)
        return Tile.of(records[number], target.buffer)

    def close(self) -> None:
        self._source.close()


class _OneTile:
    """Takes one tile of a slice into memory (a TileWriter, see build)."""

    def __init__(self, header: Header, number: int) -> None:
        self.header, self.missing = header, [number]
        record = header.records[number]
        self.buffer: Bytes = aligned_buffer(record.nbytes)
        self._next = {part.name: start for start, _, part in record.spans()}

    def write(self, index: int, name: str, values: Array) -> None:
        """See TileWriter."""
        data = np.ascontiguousarray(values).reshape(-1).view(np.uint8)
        start = self._next[name]
        self.buffer[start : start + data.size] = data
        self._next[name] = start + data.size


class SliceCopies:
    """Tiles of the other ranks' slice files, in a folder on rank 0's disk."""

    what, work_bytes = "the slices on rank 0's disk", 0

    def __init__(self, header: Header, paths: dict[int, Path]) -> None:
        """Raises SliceError where one is not of the same slices as `header`."""
        with ExitStack() as undo:
            self._files: dict[int, SliceFile] = {}
            for rank, path in paths.items():
                file = self._files[rank] = SliceFile(path)
                undo.callback(file.close)
                wanted = Header(
                    rank=rank,
                    formats=header.formats,
                    model=header.model,
                    fingerprint=header.fingerprint,
                    config=header.config,
                    partition=header.partition,
                    records=tuple(
                        slice_records(header.config, header.partition.shares[rank], rank, header.formats, {})
                    ),
                )
                if not same_slice(file.header, wanted):
                    raise SliceError(
                        f"slice file {path} is not of the slices that this run uses; remove it, or make them together"
                    )
            undo.pop_all()

    def tile(self, records: Sequence[Record], number: int, rank: int) -> Tile:
        return self._files[rank].load(records[number])

    def close(self) -> None:
        for file in self._files.values():
            file.close()

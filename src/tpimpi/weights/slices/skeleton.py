"""The skeleton of a slice file: its header, and the names, shapes and places of all its datasets, made by HDF5."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import xxhash

from tpimpi.compute.arrays import Array
from tpimpi.errors import InputError
from tpimpi.weights.slices.header import Header, same_slice
from tpimpi.weights.slices.layout import ALIGNMENT_BYTES, embedding_dataset, experts_dataset

_Dataset = tuple[str, tuple[int, ...], np.dtype[Any]]  # name, shape, dtype


@dataclass(frozen=True)
class Skeleton:
    """What a file that another process began says of itself."""

    offsets: dict[str, int]  # of each dataset, and of each part of an expert, in the file; 0 where it has no bytes
    checksums: Array  # of the header and of each tile, 0 where it is not there yet: uint64 [1 + tiles]
    row_checksums: Array | None  # of the embedding's rows (rank 0): uint64 [vocab]


def write_skeleton(path: Path, header: Header) -> tuple[dict[str, int], int]:
    """Make the datasets in the empty file `path`, which this process has locked, and write the header.

    Returns the offset of each dataset and of each part of an expert, and XXH3-64 of the header. Raises what HDF5 raises:
    OSError, RuntimeError, ValueError.
    """
    header_json = np.frombuffer(header.to_json(), np.uint8)
    datasets = _datasets(header, header_json.size)
    create = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    create.set_layout(h5py.h5d.CONTIGUOUS)
    create.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    create.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)
    # Metadata is aligned like data, so it takes a page for each object; one block of that size for all of it keeps
    # it from coming between the parts of a tile.
    objects = len(datasets) + 2 * sum(record.expert <= 0 for record in header.records)
    metadata = (objects + 64) * 2 * ALIGNMENT_BYTES
    offsets: dict[str, int] = {}
    with h5py.File(
        path,
        "w",
        libver="latest",
        locking=False,  # we have locked it ourselves
        alignment_threshold=1,
        alignment_interval=ALIGNMENT_BYTES,
        meta_block_size=metadata,
    ) as file:
        for name, shape, dtype in datasets:
            kind = h5py.h5t.py_create(dtype)
            space = h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name.encode(), kind, space, create, lcpl=links)
            # A dataset of no bytes has no place in the file.
            offsets[name] = dataset.get_offset() or 0
        h5py.Dataset(h5py.h5d.open(file.id, b"header"))[...] = header_json
    return offsets | _of_experts(header, offsets), xxhash.xxh3_64_intdigest(header_json)


def read_skeleton(path: Path, header: Header, size: int) -> Skeleton | None:
    """Of a file of `size` bytes that was begun for the slice of this header; None for any other file."""
    try:
        with h5py.File(path, "r", locking=False) as file:
            raw, checksums = np.asarray(file["header"][...]), np.asarray(file["checksums"][...])
            found = Header.from_json(raw.tobytes())
            if xxhash.xxh3_64_intdigest(raw) != int(checksums[0]) or not same_slice(found, header):
                return None
            offsets: dict[str, int] = {}
            for name, shape, dtype in _datasets(header, raw.size):
                dataset = file[name]
                if dataset.shape != shape or dataset.dtype != dtype:
                    return None
                offset = dataset.id.get_offset()
                if dataset.nbytes and (offset is None or offset + dataset.nbytes > size):
                    return None
                offsets[name] = offset or 0
            rows = np.asarray(file["embedding/checksums"][...]) if header.rank == 0 else None
    except (OSError, LookupError, ValueError, TypeError, RuntimeError, AttributeError, OverflowError, InputError):
        return None
    return Skeleton(offsets | _of_experts(header, offsets), checksums, rows)


def _of_experts(header: Header, offsets: dict[str, int]) -> dict[str, int]:
    """Where the parts of experts' tiles lie in the file, by the same kind of names as datasets have."""
    found: dict[str, int] = {}
    for record in header.records:
        if record.expert >= 0:
            tile = offsets[experts_dataset(record.block.layer)] + record.expert * record.nbytes
            found |= {f"{record.path}/{part.name}": tile + start for start, _, part in record.spans()}
    return found


def _datasets(header: Header, header_bytes: int) -> list[_Dataset]:
    datasets: list[_Dataset] = [
        ("header", (header_bytes,), np.dtype("u1")),
        ("checksums", (1 + len(header.records),), np.dtype("<u8")),
    ]
    for record in header.records:
        if record.expert < 0:
            datasets += [(f"{record.path}/{part.name}", part.dataset_shape, part.dtype) for part in record.parts]
        elif record.expert == 0:
            shape = (header.config.experts, record.nbytes)
            datasets.append((experts_dataset(record.block.layer), shape, np.dtype("u1")))
    if header.rank == 0:
        table, dtype = embedding_dataset(header.config, header.formats.embedding)
        datasets += [("embedding/weight", table, dtype), ("embedding/checksums", table[:1], np.dtype("<u8"))]
    return datasets

"""What a slice file's datasets must be, whatever HDF5 would allow: numbers that stand in this file."""

from __future__ import annotations

import math
from typing import Any

import h5py


def link_elsewhere(file: h5py.File) -> str | None:
    """The name of a link to somewhere else, another file say, if there is one. A slice has none, and to follow one might
    take for ever: a pipe can stand there."""

    def elsewhere(name: bytes, link: Any) -> bytes | None:
        return None if link.type == h5py.h5l.TYPE_HARD else name

    name = file.id.links.visit(elsewhere, info=True)
    return None if name is None else name.decode(errors="replace")


def stored_elsewhere(dataset: h5py.Dataset) -> str | None:
    """Why a dataset is not one to be read, if so: its numbers are in another file, or in pieces larger than all of them,
    each of which HDF5 would make room for."""
    create = dataset.id.get_create_plist()
    if create.get_external_count() or create.get_layout() == h5py.h5d.VIRTUAL:
        return f"the numbers of {dataset.name} are in another file"
    if dataset.chunks and math.prod(dataset.chunks) * dataset.dtype.itemsize > max(dataset.nbytes, 1):
        return f"{dataset.name} has pieces of {dataset.chunks}, more than its {dataset.shape}"
    return None

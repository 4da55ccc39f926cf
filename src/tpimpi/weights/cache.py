"""What is in this host's cache folder: its slices, when they were last used, and their removal.

A run that opens slices of the cache sets the time of change of their folder, which is when they were last used. In a cache
that cannot be written to it stays the time when they were made.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tpimpi.errors import InputError, SliceError, StorageError
from tpimpi.system.files import try_lock
from tpimpi.weights.locations import in_cache
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.names import parse_slice_name

_UNFINISHED = ".rank-*.partial"


@dataclass(frozen=True)
class CachedSlices:
    """The slices of one folder of the cache: those of one model for one partition, as far as this host has them."""

    name: str  # of the folder
    model: str  # "" where no slice of it can be read
    ranks: int  # of the partition; 0 where no slice can be read
    shares: str
    format: str
    slices: int  # whole ones that are here
    nbytes: int  # on the disk, unfinished ones included
    last_used: float  # seconds since 1970
    problem: str  # why none of its slices can be read, "" where one can


def list_cache(folder: Path) -> list[CachedSlices]:
    """All slices in a cache folder, those last used first; none where there is no such folder.

    Reads a header for each. Raises StorageError where the folder cannot be read.
    """
    try:
        folders = [path for path in folder.iterdir() if path.is_dir() and _files(path)] if folder.is_dir() else []
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror}; set TPIMPI_CACHE to another place") from error
    found = []
    for path in folders:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append(_describe(path))
    return sorted(found, key=lambda slices: slices.last_used, reverse=True)


def _files(folder: Path) -> list[Path]:
    """Slices in a folder, whole and unfinished."""
    whole = [path for path in folder.glob("rank-*.h5") if parse_slice_name(path.name)]
    return sorted(whole) + sorted(folder.glob(_UNFINISHED))


def _describe(folder: Path) -> CachedSlices:
    files = _files(folder)
    whole = [path for path in files if path.suffix == ".h5"]
    nbytes = sum(path.stat().st_blocks * 512 for path in files)
    values, problem = ("", 0, "", ""), "unfinished"
    for path in whole:
        try:
            with closing(SliceFile(path)) as file:
                header = file.header
        except (SliceError, StorageError) as error:
            problem = str(error)
            continue
        values, problem = (header.model, header.partition.ranks, header.partition.describe(), header.format), ""
        break
    return CachedSlices(folder.name, *values, len(whole), nbytes, folder.stat().st_mtime, problem)


def mark_used(path: Path) -> None:
    """Note that a run uses this slice, where it is one of the cache: see the module."""
    if in_cache(path):
        with contextlib.suppress(OSError):
            os.utime(path.parent)


def remove_slices(folder: Path, names: Iterable[str]) -> None:
    """Remove folders of slices from a cache folder. A run that uses such slices keeps them until its end.

    Raises InputError, before any is removed, where one is not there, and where a process is making its slices; StorageError.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if Path(name).name != name or not (folder / name).is_dir() or not _files(folder / name):
            raise InputError(f"there are no slices named {name[:80]!r} in {folder}; see: python -m tpimpi cache")
    for name in chosen:
        try:
            _remove(folder / name)
        except OSError as error:
            raise StorageError(f"cannot remove {folder / name}: {error.strerror}; remove it by hand") from error


def _remove(folder: Path) -> None:
    """Nothing but slices is removed: what else is in the folder stays, and the folder with it."""
    lock = folder.with_name(f"{folder.name}.lock")
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try_lock(descriptor)
        for path in _files(folder):
            path.unlink()
        folder.rmdir()
        lock.unlink()
    except BlockingIOError as error:
        raise InputError(f"another tpimpi is slicing into {folder}; remove it when that is done") from error
    finally:
        os.close(descriptor)

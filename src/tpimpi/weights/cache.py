"""What is in this host's cache folder: its slices, when they were last used, and their removal.

A run that opens slices of the cache sets the time of change of their folder, which is when they were last used. In a cache
that cannot be written to it stays the time when they were made.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path

from tpimpi.errors import InputError, SliceError, StorageError, shorten_path
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

    Symbolic links are left out: what they lead to is not the cache's. Reads a header for each set. Raises
    StorageError where the folder cannot be read.
    """
    try:
        folders = [path for path in folder.iterdir() if _is_set(path)] if folder.is_dir() else []
    except OSError as error:
        raise StorageError(f"cannot read {folder}: {error.strerror}; set TPIMPI_CACHE to another place") from error
    found = []
    for path in folders:
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            found.append(_describe(path))
    return sorted(found, key=lambda slices: slices.last_used, reverse=True)


def _files(folder: Path) -> list[Path]:
    """Slices in a folder, whole and unfinished; also links that lead nowhere, but no folders."""
    whole = [path for path in folder.glob("rank-*.h5") if parse_slice_name(path.name)]
    found = sorted(whole) + sorted(folder.glob(_UNFINISHED))
    return [path for path in found if os.path.islink(path) or not os.path.isdir(path)]  # noqa: PTH112, PTH114


def _disk_bytes(path: Path) -> int:
    """What a file takes on the disk; 0 where it cannot be looked at, or was removed meanwhile."""
    try:
        return path.lstat().st_blocks * 512
    except OSError:
        return 0


def _describe(folder: Path) -> CachedSlices:
    files = _files(folder)
    whole = [path for path in files if path.suffix == ".h5"]
    nbytes = sum(_disk_bytes(path) for path in files)
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
    if in_cache(path.parent):
        with contextlib.suppress(OSError):
            os.utime(path.parent)


def remove_slices(folder: Path, names: Iterable[str]) -> list[Path]:
    """Remove folders of slices from a cache folder. A run that uses such slices keeps them until its end.

    Nothing but slices is removed: a folder with something else in it stays, with that. Returns these folders. Where one set
    cannot be removed, the others are all the same. Raises InputError, before any is removed, where one is not there, and
    where a process is making its slices; StorageError.
    """
    chosen = list(dict.fromkeys(names))
    for name in chosen:
        if Path(name).name != name or not _is_set(folder / name):
            raise InputError(
                f"there are no slices named {shorten_path(name)!r} in {folder}; see: python -m tpimpi cache"
            )
    stay, failure = [], None
    with ExitStack() as locks:
        files = {folder / name: _lock_set(folder / name, locks) for name in chosen}
        for path, slices in files.items():
            try:
                if not _remove(path, slices):
                    stay.append(path)
            except OSError as error:
                failure = failure or _not_removed(path, error)
    if failure is not None:
        raise failure
    return stay


def _is_set(path: Path) -> bool:
    """Whether this is a folder of slices. A symbolic link is none: what it leads to is not the cache's to remove."""
    return not path.is_symlink() and path.is_dir() and bool(_files(path))


def _lock_set(folder: Path, locks: ExitStack) -> list[Path]:
    """Keep other processes from making slices in a folder until `locks` ends; the slices in it that may be removed.

    Rank 0 of a run locks the file beside the folder, every rank the slice that it writes, `slice --out` the folder.
    """
    try:
        _lock_beside(folder.with_name(f"{folder.name}.lock"), locks)
        files = _files(folder)
        for path in (folder, *(path for path in files if path.suffix == ".partial" and path.is_file())):
            with contextlib.suppress(FileNotFoundError):  # finished, or removed, meanwhile
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
                locks.callback(os.close, descriptor)
                try_lock(descriptor)
    except BlockingIOError as error:
        raise InputError(f"another tpimpi is slicing into {folder}; remove it when that is done") from error
    except OSError as error:
        raise _not_removed(Path(error.filename or folder), error) from error
    return files


def _lock_beside(path: Path, locks: ExitStack) -> None:
    """Lock a file that is made if it is not there, until `locks` ends, which removes it."""
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        locks.callback(os.close, descriptor)
        try_lock(descriptor)
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(path.stat(), os.fstat(descriptor)):  # else another process removed it meanwhile
                locks.callback(_unlink, path)
                return


def _unlink(path: Path) -> None:
    with contextlib.suppress(OSError):  # a lock that is left over is in nobody's way
        path.unlink()


def _remove(folder: Path, files: Iterable[Path]) -> bool:
    """Remove these files and the folder; False where there is something else in it, with which it stays."""
    for path in files:
        if path.is_symlink() or not path.is_dir():
            path.unlink(missing_ok=True)
    try:
        folder.rmdir()
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        return False
    return True


def _not_removed(folder: Path, error: OSError) -> StorageError:
    return StorageError(f"cannot remove {folder}: {error.strerror}; remove it by hand")

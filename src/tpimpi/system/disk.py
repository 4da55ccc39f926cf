"""Disks: which file system a path is on, a scratch file to measure one with, and what is said of one that fails."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tpimpi.errors import StorageError
from tpimpi.system.files import unfinished

SCRATCH_BYTES = 64 << 20  # of a file to measure a disk with, at most
SCRATCH_WRITE_S = 0.4  # of writing it, at most
_SCRATCH_WRITE_BYTES = 4 << 20
_IN_MEMORY = ("tmpfs", "ramfs", "devtmpfs", "hugetlbfs")


# Mounted file systems


@dataclass(frozen=True)
class Mount:
    """A mounted file system: its device (as the system names it), its kind (ext4, …), and MAJOR:MINOR of the device."""

    point: Path
    device: str
    kind: str
    number: str
    options: str = field(default="", compare=False)  # of the file system itself: for a control group its controllers

    @property
    def in_memory(self) -> bool:
        return self.kind in _IN_MEMORY

    def disk(self, blocks: Path = Path("/sys/dev/block")) -> str | None:
        """MAJOR:MINOR of the whole disk, of which the device may be a partition; None for what is no local disk."""
        number = self.number
        if number.startswith("0:"):  # btrfs and others that have a number of their own
            try:
                found = Path(self.device).stat()
            except OSError:
                return None
            if not stat.S_ISBLK(found.st_mode):
                return None
            number = f"{os.major(found.st_rdev)}:{os.minor(found.st_rdev)}"
        place = (blocks / number).resolve()
        if (place / "partition").exists():
            place = place.parent
        return (place / "dev").read_text().strip() if (place / "dev").exists() else None

    def describe(self) -> str:
        return f"{self.device} ({self.kind}, mounted at {self.point})"


MOUNTINFO = Path("/proc/self/mountinfo")


def mounts(mountinfo: Path = MOUNTINFO) -> Iterator[Mount]:
    """The mounted file systems, in the order of mounting; none where the system does not tell (it is not Linux)."""
    try:
        lines = mountinfo.read_text(errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        before, _, after = line.partition(" - ")
        fields, (kind, device, *options) = before.split(" "), after.split(" ")
        point = Path(re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), fields[4]))
        yield Mount(point, device, kind, fields[2], " ".join(options))


def mount_of(path: Path, mountinfo: Path = MOUNTINFO) -> Mount:
    """The file system that `path` is on: the last mounted of those with the longest mount point above it."""
    whole = path.resolve()
    best = Mount(Path("/"), "unknown", "unknown", "0:0")
    for mount in mounts(mountinfo):
        if whole.is_relative_to(mount.point) and len(mount.point.parts) >= len(best.point.parts):
            best = mount
    return best


# A file to measure with


@contextlib.contextmanager
def scratch_file(folder: Path, most: int = SCRATCH_BYTES, write_s: float = SCRATCH_WRITE_S) -> Iterator[Path]:
    """A file of random bytes in `folder`, which is made if it is not there: of `most` bytes, or fewer where writing them
    takes longer than `write_s` seconds. It is removed at the end. Raises OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f".disk-{os.getpid()}.partial"
    with unfinished(path):
        began, data = time.monotonic(), np.random.default_rng().bytes(_SCRATCH_WRITE_BYTES)
        with path.open("wb") as file:
            for _ in range(most // len(data)):
                file.write(data)
                os.fdatasync(file.fileno())
                if time.monotonic() > began + write_s:
                    break
        yield path


# What is said of a disk that fails


def error_number(error: Exception) -> int | None:
    """The errno of what the operating system or HDF5 raised; HDF5 may give it in its text alone."""
    if isinstance(error, OSError) and error.errno:
        return error.errno
    match = re.search(r"errno = ([1-9][0-9]*)", str(error))
    return int(match[1]) if match else None


def storage_error(path: Path, error: Exception, elsewhere: str) -> StorageError:
    """What the operating system, or HDF5, says of a full or unwritable disk, in one line; `elsewhere` is the remedy, such as
    "choose another place with --out"."""
    number = error_number(error)
    said = os.strerror(number) if number else str(error)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return StorageError(f"disk full while writing {path}: {said}; free some space there, or {elsewhere}")
    if number in (errno.EMFILE, errno.ENFILE):
        return StorageError(
            f"cannot write {path}: {said}; slicing has a file open for each rank: raise the limit (ulimit -n 4096), "
            "or slice for fewer ranks"
        )
    return StorageError(f"cannot write {path}: {said}; {elsewhere}")


def disk_full(what: str, needed: int, where: str, free: int, elsewhere: str) -> StorageError:
    """`what` ("the slices need") takes `needed` bytes, of which `where` ("DIR has") has only `free`; remedy as above."""
    return StorageError(
        f"disk full: {what} {needed / 1e9:.2f} GB, {where} {free / 1e9:.2f} GB free; "
        f"free some space there, or {elsewhere}"
    )

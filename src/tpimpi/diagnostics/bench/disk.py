"""`bench disk`: what the disk under a path gives, as the ranks of a run would read from it.

    buffered    one read after the other through the page cache, which is emptied of the file first: what the kernel's
                read-ahead gives
    O_DIRECT    past the page cache, with 1, 2, 4 and 8 reads in flight for each reader

There may be several readers, as there are ranks: each reads its own slice file where there are as many, else its own part of
one. A rate is that of all readers together: all bytes over the time from the first read's start to the last one's end. All
is measured in rounds, a short turn for each way of reading, so that whatever else the machine does disturbs all of them
alike; the figure is the median over the rounds. No turn reads what another has just read, as long as the files are large
enough.

Peak memory: readers x 8 x the size of a read.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import psutil

from tpimpi.errors import InputError, StorageError
from tpimpi.system.buffers import PAGE_BYTES, aligned_buffer
from tpimpi.system.direct_io import open_direct
from tpimpi.system.disk import Mount, mount_of
from tpimpi.system.terminal import print_table as show_table
from tpimpi.weights.slices.names import parse_slice_name

ROUNDS = 5
DEPTHS = (1, 2, 4, 8)  # reads in flight
BUFFERED = "buffered"
DIRECT = "O_DIRECT"
MIN_READER_BYTES = 1 << 20  # bytes that a reader needs at least
ENOUGH_READER_BYTES = 64 << 20  # bytes that a reader should have


# Where a file lies


def sharing(mounts: Sequence[Mount]) -> str:
    """Whether readers on these file systems share a disk, in words."""
    disks = {mount.disk() or mount.describe() for mount in mounts}
    if len(mounts) < 2:
        return "one reader"
    if len(disks) == 1:
        return f"{len(mounts)} readers share one disk"
    return f"{len(mounts)} readers on {len(disks)} disks"


# What is read


@dataclass
class Region:
    """A part of a file that one reader goes round in: `length` bytes from `start`, both multiples of PAGE_BYTES."""

    path: Path
    start: int
    length: int
    _next: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def take(self, size: int) -> int:
        """Offset of the next `size` bytes; the region must have so many."""
        with self._lock:
            if self._next + size > self.length:
                self._next = 0
            self._next += size
            return self.start + self._next - size


def find_files(path: Path, readers: int) -> list[Path]:
    """The files to read: `path`, or the slices in it or in a folder in it, of `readers` ranks if any, else the largest set.

    Raises InputError.
    """
    remedy = "give a slice file, a folder of slices, or any large file"
    try:
        if path.is_file():
            return [path]
        if not path.exists():
            raise InputError(f"{path} is not there; {remedy}")
        if not path.is_dir():
            raise InputError(f"{path} is neither a file nor a folder; {remedy}")
        folders = [path, *sorted(other for other in path.iterdir() if os.path.isdir(other))]  # noqa: PTH112
        sets: list[tuple[bool, int, list[Path]]] = []
        for folder in folders:
            of: dict[int, list[Path]] = {}
            for file in sorted(folder.glob("*.h5")):
                # A link that leads nowhere is left out, as is what this user may not look at.
                if os.path.isfile(file) and (parsed := parse_slice_name(file.name)):  # noqa: PTH113
                    of.setdefault(parsed[1], []).append(file)
            sets += [(len(files) == readers, _size(files), files) for files in of.values()]
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}; {remedy}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{str(path)!r}: {error}; {remedy}") from error
    if not sets:
        raise InputError(f"{path} has no slices in it; {remedy}")
    return max(sets)[2]


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def make_regions(files: Sequence[Path], readers: int) -> list[Region]:
    """A region for each reader: a file each where there are as many, else equal parts of the files, which take turns.

    Raises InputError where one would be under MIN_READER_BYTES bytes.
    """
    regions = []
    for reader in range(readers):
        path = files[reader % len(files)]
        parts = len(range(reader % len(files), readers, len(files)))
        try:
            size = path.stat().st_size
        except OSError as error:
            raise InputError(f"{path}: {error.strerror}; give a file that can be read") from error
        length = size // parts // PAGE_BYTES * PAGE_BYTES
        if length < MIN_READER_BYTES:
            for_each = f", {length} for each of {parts} readers" if parts > 1 else ""
            raise InputError(
                f"{path} has {size} bytes{for_each}; each needs {MIN_READER_BYTES} at least: give a larger file"
            )
        regions.append(Region(path, reader // len(files) * length, length))
    return regions


# What comes out


@dataclass(frozen=True)
class Row:
    """One way of reading: `how` is BUFFERED or DIRECT, `rates` in bytes per second, one of each round, and their median."""

    how: str
    in_flight: int
    rate: float
    rates: list[float]
    bytes_read: int


class _Reader:
    """One region with its open files, and a buffer for each read in flight."""

    def __init__(self, region: Region, size: int) -> None:
        """Raises InputError where the file cannot be opened."""
        self.region, self.size = region, min(size, region.length)
        try:
            self._direct_fd, direct = open_direct(region.path)
        except OSError as error:
            raise InputError(f"{region.path}: {error.strerror}; give a file that can be read") from error
        try:
            self._fd = os.open(region.path, os.O_RDONLY)
        except OSError as error:
            os.close(self._direct_fd)
            raise InputError(f"{region.path}: {error.strerror}; give a file that can be read") from error
        self.mount = mount_of(region.path)
        self.direct = direct and not self.mount.in_memory  # tmpfs takes O_DIRECT, and copies from memory all the same
        memory = aligned_buffer(max(DEPTHS) * self.size)
        self._buffers = [memory[slot * self.size : (slot + 1) * self.size] for slot in range(max(DEPTHS))]
        memory[:] = 0  # so that no read has to wait for memory

    def read(self, how: str, slot: int) -> int:
        """The next bytes of the region, into the buffer of `slot`; returns how many. Raises StorageError."""
        fd = self._direct_fd if how == DIRECT else self._fd
        try:
            got = os.preadv(fd, [self._buffers[slot]], self.region.take(self.size))
        except OSError as error:
            raise StorageError(
                f"{self.region.path} can no longer be read: {error.strerror}; check the disk or network it is on"
            ) from error
        if got == 0:
            raise StorageError(f"{self.region.path} has become shorter while it was read; measure a file that stays")
        return got

    def forget(self) -> None:
        """Have the page cache let go of the region."""
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._fd, self.region.start, self.region.length, os.POSIX_FADV_DONTNEED)

    def close(self) -> None:
        os.close(self._fd)
        os.close(self._direct_fd)


class Bench:
    """Files, ready to be read and timed; `with` closes them."""

    def __init__(self, path: Path, readers: int, size: int) -> None:
        """`path` as in find_files; `size` of a read, a multiple of PAGE_BYTES. Raises InputError."""
        self.size = size
        self.regions = make_regions(find_files(path, readers), readers)
        needed, free = readers * max(DEPTHS) * size, psutil.virtual_memory().available
        if needed > free:
            raise InputError(
                f"{readers} readers with {max(DEPTHS)} reads of {size} bytes in flight take {needed / 1e9:.1f} GB, "
                f"this machine has {free / 1e9:.1f} GB of memory free; give fewer --readers or a smaller --size"
            )
        self._stack = ExitStack()
        with self._stack:
            self._readers: list[_Reader] = []
            for region in self.regions:
                self._readers.append(_Reader(region, size))
                self._stack.callback(self._readers[-1].close)
            self._stack = self._stack.pop_all()
        self.direct = all(reader.direct for reader in self._readers)

    def __enter__(self) -> Bench:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def run(self, seconds: float, progress: Callable[[int, int], None]) -> list[Row]:
        """Measure each way of reading for about `seconds`; progress(round, rounds) is called as each round begins.

        Raises StorageError.
        """
        ways = [(BUFFERED, 1)] + [(DIRECT, depth) for depth in DEPTHS if self.direct]
        rates: dict[tuple[str, int], list[float]] = {way: [] for way in ways}
        total: dict[tuple[str, int], int] = dict.fromkeys(ways, 0)
        for number in range(ROUNDS):
            progress(number + 1, ROUNDS)
            for way in ways:
                nbytes, elapsed = self._turn(*way, seconds / ROUNDS)
                rates[way].append(nbytes / elapsed)
                total[way] += nbytes
        return [Row(*way, median(found), found, total[way]) for way, found in rates.items()]

    def _turn(self, how: str, depth: int, seconds: float) -> tuple[int, float]:
        """Read for `seconds`, at least once in each thread: (bytes, seconds that it took)."""
        if how == BUFFERED:
            for reader in self._readers:
                reader.forget()
        slots = [(reader, slot) for reader in self._readers for slot in range(depth)]
        together = threading.Barrier(len(slots) + 1)
        done: list[int] = []
        errors: list[BaseException] = []

        def work(reader: _Reader, slot: int) -> None:
            together.wait()
            nbytes = 0
            try:
                while not errors:
                    nbytes += reader.read(how, slot)
                    if time.perf_counter() >= deadline:
                        break
            except BaseException as error:
                errors.append(error)
            done.append(nbytes)

        threads = [threading.Thread(target=work, args=slot, daemon=True) for slot in slots]
        for thread in threads:
            thread.start()
        began = time.perf_counter()
        deadline = began + seconds
        together.wait()
        for thread in threads:
            thread.join()
        elapsed = time.perf_counter() - began
        if errors:
            raise errors[0]
        if how == BUFFERED:
            for reader in self._readers:
                reader.forget()
        return sum(done), elapsed

    def title(self) -> list[str]:
        """What is measured, on what, and what should be known about it; a line each."""
        mounts = [reader.mount for reader in self._readers]
        names = list(dict.fromkeys(str(region.path) for region in self.regions))
        lines = [f"{names[0]}{f' and {len(names) - 1} more' if len(names) > 1 else ''}"]
        lines += [f"on {text}" for text in dict.fromkeys(mount.describe() for mount in mounts)]
        lines.append(f"{sharing(mounts)}; {self.size / (1 << 20):g} MiB a read")
        lines += self.remarks()
        return lines

    def remarks(self) -> Iterator[str]:
        """What makes the figures less than they seem."""
        smallest = min(self.regions, key=lambda region: region.length)
        if smallest.length < ENOUGH_READER_BYTES:
            yield (
                f"{smallest.path}: only {smallest.length / 1e6:.1f} MB for a reader, which a cache in the disk may hold; "
                f"{ENOUGH_READER_BYTES / 1e6:.0f} MB or more would be sure"
            )
        for mount in dict.fromkeys(reader.mount for reader in self._readers if reader.mount.in_memory):
            yield f"{mount.point} is in memory ({mount.kind}): no disk is measured, and there is no O_DIRECT"
        if not self.direct and not any(reader.mount.in_memory for reader in self._readers):
            kinds = {reader.mount.kind for reader in self._readers if not reader.direct}
            yield f"no O_DIRECT on {', '.join(sorted(kinds))}"

    def as_json(self, table: Sequence[Row]) -> dict[str, Any]:
        """What `--json` writes."""
        mounts = [reader.mount for reader in self._readers]
        return {
            "size": self.size,
            "readers": len(self.regions),
            "direct": self.direct,
            "disks": len({mount.disk() or mount.describe() for mount in mounts}),
            "regions": [
                {
                    "path": str(region.path),
                    "start": region.start,
                    "bytes": region.length,
                    "device": mount.device,
                    "disk": mount.disk(),
                    "file_system": mount.kind,
                }
                for region, mount in zip(self.regions, mounts, strict=True)
            ],
            "remarks": list(self.remarks()),
            "rows": [asdict(row) for row in table],
            "best": asdict(best(table)),
        }


def best(table: Sequence[Row]) -> Row:
    """The fastest way of reading."""
    return max(table, key=lambda row: row.rate)


def print_table(table: Sequence[Row], title: Iterable[str]) -> None:
    """The table, on stdout."""
    from rich.table import Table

    shown = Table(box=None, pad_edge=False, header_style="none")
    shown.add_column("reading")
    for name in ("in flight", "GB/s", "least", "most", "/ one O_DIRECT"):
        shown.add_column(name, justify="right")
    one = next((row.rate for row in table if (row.how, row.in_flight) == (DIRECT, 1)), None)
    for row in table:
        figures = (f"{value / 1e9:.3f}" for value in (row.rate, min(row.rates), max(row.rates)))
        shown.add_row(row.how, str(row.in_flight), *figures, "-" if one is None else f"{row.rate / one:.2f}")
    for line in title:
        print(line)
    print()
    show_table(shown, 120)

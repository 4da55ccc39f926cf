"""What rank 0 asks of every rank beside its speed: what its disk gives."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import xxhash

from tpimpi.engine.rank_memory import DISK_TRIAL_S
from tpimpi.errors import StorageError
from tpimpi.star import Star
from tpimpi.star.control import (
    Done,
    Note,
    Proceed,
    Task,
    TaskNote,
    gather_notes,
    on_every_rank,
    receive_note,
    report_errors,
    send_note,
)
from tpimpi.system.buffers import aligned_buffer
from tpimpi.system.direct_io import DEPTHS, TRIAL_BUFFER_BYTES, Descriptor, Extent, Trial
from tpimpi.system.disk import SCRATCH_BYTES, scratch_file
from tpimpi.weights.locations import cache_folder


class MeasureDisks(TaskNote, frozen=True, tag="disk"):
    """Hub: every rank measures its disk, all at the same time."""


class DiskRate(Note, frozen=True):
    """What the sender's disk gives: bytes a second, and the processor seconds that a byte takes."""

    rate: float
    cpu: float


def measure_disks(star: Star) -> list[tuple[float, float]]:
    """Rank 0: what every rank's disk gives while all read, in rank order: (bytes a second, processor seconds a byte).

    Raises StorageError.
    """
    send_note(star, MeasureDisks())
    on_every_rank(star, lambda: None, Done)
    send_note(star, Proceed())
    mine, others = on_every_rank(star, _disk, DiskRate)
    return [mine, *((note.rate, note.cpu) for note in others)]


def take_part_in_disks(star: Star, task: Task) -> None:
    """Another rank's side of `measure_disks`."""
    task.note(MeasureDisks)
    gather_notes(star, Done())
    receive_note(star, Proceed)
    rate, cpu = report_errors(star, _disk)
    gather_notes(star, DiskRate(rate, cpu))


def _disk() -> tuple[float, float]:
    """Bytes a second from the disk of the cache folder, and the processor seconds that a byte takes, its check included."""
    folder = cache_folder()
    with _some_file(folder) as path:
        try:
            file = Descriptor(path)
            try:
                trial = Trial(file, [Extent(0, 0, path.stat().st_size)])
                buffer = aligned_buffer(TRIAL_BUFFER_BYTES)
                trial.rate(buffer, DEPTHS[0], 0.05)
                began = time.process_time()
                wall = time.perf_counter()
                rate = trial.rate(buffer, DEPTHS[0], DISK_TRIAL_S)
                nbytes = rate * (time.perf_counter() - wall)
                cpu = (time.process_time() - began) / max(nbytes, 1.0)
            finally:
                file.close()
        except (OSError, EOFError) as error:
            raise StorageError(f"cannot read {path}: {error}; check the disk that it is on") from error
        began = time.perf_counter()
        xxhash.xxh3_64_intdigest(buffer)
        return rate, cpu + (time.perf_counter() - began) / len(buffer)


@contextlib.contextmanager
def _some_file(folder: Path) -> Iterator[Path]:
    """The largest slice below the cache folder; or a file of our own, which is removed again. Raises StorageError."""
    slices = [(path.stat().st_size, path) for path in folder.glob("*/rank-*.h5") if path.is_file()]
    size, path = max(slices, default=(0, folder))
    if size >= SCRATCH_BYTES // 2:
        yield path
        return
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(scratch_file(folder))
        except OSError as error:
            text = f"cannot write to {folder}: {error.strerror}; set TPIMPI_CACHE to another place"
            raise StorageError(text) from error
        yield path

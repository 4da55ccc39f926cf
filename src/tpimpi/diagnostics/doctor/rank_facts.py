"""What one rank finds out about itself and its host, for `doctor`: facts only, `doctor` judges them.

Nothing here fails because of what it finds: what cannot be found out is left at its default, or is told in words.
"""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import sys
import time
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tpimpi import __version__
from tpimpi.compute.backends import has_native
from tpimpi.engine.engine import identity
from tpimpi.errors import TpimpiError
from tpimpi.star import MpiLibrary, Ping, Star, answer_link, mpi_library, ping_link
from tpimpi.star.control import (
    Note,
    Proceed,
    Task,
    TaskNote,
    check_host,
    decode_note,
    gather_notes,
    receive_note,
    send_note,
    to_json,
)
from tpimpi.system.buffers import aligned_buffer
from tpimpi.system.cpu import processor_quota
from tpimpi.system.direct_io import READ_BYTES, TRIAL_BUFFER_BYTES, Descriptor, Extent, Trial
from tpimpi.system.disk import scratch_file
from tpimpi.system.launcher import bound_by_launcher
from tpimpi.system.memory import headroom, places
from tpimpi.system.network import Counters, Interface, counters, interfaces
from tpimpi.weights.locations import SliceLocation, cache_folder
from tpimpi.weights.slices.file import SliceFile
from tpimpi.weights.slices.writer import partial_path

TASK = "doctor"
TIMEOUT_S = 60.0  # seconds that ranks wait for one another here
DISK_READING_S = 0.3  # of reading
SCRATCH_WRITE_S = 1.0  # of writing a file to read, where there is no slice
SPARE_DISK_BYTES = 256 << 20  # bytes of disk without which no such file is written

HERE, MISSING, WRONG, UNKNOWN = "here", "missing", "wrong", ""


@dataclass(frozen=True)
class ExpectedSlices:
    """The slices that a run would use, as rank 0 tells all: in `folder`, or in `cache_name` of each host's cache; none where
    both are None. `identity` is what they have in common, where that is known, and `sizes` the bytes of each rank's."""

    folder: str | None = None
    cache_name: str | None = None
    identity: dict[str, str] = field(default_factory=dict)
    sizes: list[int] = field(default_factory=list)

    def path(self, rank: int, ranks: int) -> Path | None:
        if self.folder is None and self.cache_name is None:
            return None
        return SliceLocation(self.folder, self.cache_name).path(rank, ranks)


@dataclass(frozen=True)
class SliceFacts:
    """A rank's slice: one of HERE, MISSING, WRONG (`problem` says what), UNKNOWN where no model is meant; and bytes that are
    still to be written, None where that is not known."""

    state: str = UNKNOWN
    path: str = ""
    problem: str = ""
    missing_bytes: int | None = None
    model: str = ""  # whose it is


@dataclass(frozen=True)
class Facts:
    """Sizes in bytes, rates in bytes a second. Of a rank with another version some may be missing."""

    host: str = "?"
    machine: str = ""  # the kernel's boot id: two machines never have the same
    tpimpi: str = "?"
    python: str = "?"
    numpy: str = "?"
    system: str = "?"
    byte_order: str = ""
    mpi: MpiLibrary = field(default_factory=MpiLibrary)
    watched: bool = True  # by a thread that MPI allows for it, or there is no other rank
    kernels: str = ""  # the instruction set they use, "" where none were built
    cores: list[int] = field(default_factory=list)  # that this rank may use
    host_cores: int = 0
    bound_by_launcher: bool = False  # to those cores, of more
    quota: float | None = None  # processors that a control group allows
    memory_total: int = 0
    memory_free: int = 0
    memory_limit: int | None = None  # of the tightest control group or job
    memory_headroom: int = 0  # beyond what --memory auto leaves to others
    folder: str = ""  # where slices are, or will be
    disk_free: int | None = None
    disk_rate: float | None = None
    disk_problem: str = ""
    slice: SliceFacts = field(default_factory=SliceFacts)
    interfaces: list[Interface] = field(default_factory=list)


def examine(star: Star, wanted: ExpectedSlices) -> Facts:
    """All about this rank, in about a second."""
    found = places()
    host, limits = found[0], [place.total for place in found[1:]]
    path = wanted.path(star.rank.index, star.rank.size)
    folder = cache_folder() if path is None else path.parent
    size = wanted.sizes[star.rank.index] if wanted.sizes else None
    rate, problem = _disk_rate(cache_folder() if wanted.folder is None else folder, path)
    return Facts(
        host=star.rank.host,
        machine=_text(Path("/proc/sys/kernel/random/boot_id")),
        tpimpi=__version__,
        python=platform.python_version(),
        numpy=np.__version__,
        system=f"{platform.system()} {platform.release().split('-')[0]} {platform.machine()}",
        byte_order=sys.byteorder,
        mpi=mpi_library(),
        watched=star.has_heartbeat,
        kernels=_kernels(),
        cores=sorted(os.sched_getaffinity(0)),
        host_cores=os.cpu_count() or 1,
        bound_by_launcher=bound_by_launcher(),
        quota=processor_quota(),
        memory_total=host.total,
        memory_free=min(place.free for place in found),
        memory_limit=min(limits, default=None),
        memory_headroom=headroom(found),
        folder=str(folder),
        disk_free=_free(folder),
        disk_rate=rate,
        disk_problem=problem,
        slice=SliceFacts() if path is None else examine_slice(path, wanted, size),
        interfaces=interfaces(),
    )


def examine_slice(path: Path, wanted: ExpectedSlices, size: int | None) -> SliceFacts:
    """Whether the slice at `path` is the one that is wanted; its tiles are not read."""
    if not path.exists():
        try:
            partial = partial_path(path).stat().st_blocks * 512
        except OSError:
            partial = 0
        return SliceFacts(MISSING, str(path), missing_bytes=None if size is None else max(0, size - partial))
    try:
        with closing(SliceFile(path)) as file:
            found, model = identity(file.header), file.header.model
    except TpimpiError as error:
        return SliceFacts(WRONG, str(path), str(error), size)
    for name, value in wanted.identity.items():
        if found.get(name) != value:
            return SliceFacts(
                WRONG, str(path), f"{path} has {name} {found.get(name)}, rank 0 wants {value}", size, model
            )
    return SliceFacts(HERE, str(path), missing_bytes=0, model=model)


def _kernels() -> str:
    if not has_native():
        return ""
    try:
        from tpimpi.compute.backends.native import NativeBackend

        return NativeBackend(1).level
    except (ImportError, TpimpiError):
        return ""


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""


def _free(folder: Path) -> int | None:
    """Bytes free on the disk of a folder that may yet have to be made."""
    for above in (folder, *folder.parents):
        with contextlib.suppress(OSError):
            return shutil.disk_usage(above).free
    return None


# The disk


def _disk_rate(folder: Path, path: Path | None) -> tuple[float | None, str]:
    """Bytes a second that are read past the page cache from the slice `path`, or where there is none from a file written
    for it in `folder`, None where it is too small; and what is wrong where that cannot be done."""
    try:
        if path is not None and path.is_file():
            return (_rate(path) if path.stat().st_size >= READ_BYTES else None), ""
        if (_free(folder) or 0) < SPARE_DISK_BYTES:
            return None, ""
        with scratch_file(folder, write_s=SCRATCH_WRITE_S) as scratch:
            return _rate(scratch), ""
    except (OSError, EOFError) as error:
        return None, f"{folder}: {getattr(error, 'strerror', None) or error}"


def _rate(path: Path) -> float:
    with closing(Descriptor(path)) as file:
        nbytes = path.stat().st_size // READ_BYTES * READ_BYTES
        return Trial(file, [Extent(0, 0, nbytes)]).rate(aligned_buffer(TRIAL_BUFFER_BYTES), 4, DISK_READING_S)


# All ranks together


@dataclass(frozen=True)
class LinkFacts:
    """A link to rank 0, with what the interfaces of both ends counted before and after."""

    ping: Ping
    before: tuple[Counters, Counters]  # of rank 0 and of the other
    after: tuple[Counters, Counters]


class ExamineRank(TaskNote, frozen=True, tag=TASK, forbid_unknown_fields=False):
    """Hub: examine yourself, and answer with Facts. Both may go between ranks of different versions."""

    wanted: ExpectedSlices


class TestLink(Note, frozen=True):
    """Hub: the link to this rank is looked at next; None: that was all, every rank answers with LinkCounters."""

    rank: int | None


class LinkCounters(Note, frozen=True):
    """What the sender's interfaces counted before and after the look at its link."""

    before: Counters
    after: Counters


def gather_facts(star: Star, wanted: ExpectedSlices) -> list[Facts]:
    """Rank 0: have every rank examine itself, all at once; in rank order. `gather_link_facts` is to follow.

    Raises StarError where a rank does not answer.
    """
    star.timeout = TIMEOUT_S
    send_note(star, ExamineRank(wanted))
    notes = star.gather_notes(to_json(examine(star, wanted)))
    facts = [decode_note(note, Facts, star.rank_name(rank), any_version=True) for rank, note in enumerate(notes)]
    for rank, fact in enumerate(facts):
        check_host(star, rank, {"host": fact.host})
    return facts


def gather_link_facts(star: Star) -> tuple[list[float], list[LinkFacts]]:
    """Rank 0: seconds by which the clock of each rank is behind ours, in rank order, and the link to each other rank.

    Raises StarError where a rank does not answer.
    """
    send_note(star, Proceed())
    clocks = star.clock_offsets(time.time)
    pings: list[tuple[Ping, Counters, Counters]] = []
    for rank in range(1, star.rank.size):
        send_note(star, TestLink(rank))
        before = counters()
        ping = ping_link(star, rank)
        pings.append((ping, before, counters()))
    send_note(star, TestLink(None))
    theirs = gather_notes(star, LinkCounters({}, {}))[1:]
    return clocks, [
        LinkFacts(ping, (before, their.before), (after, their.after))
        for (ping, before, after), their in zip(pings, theirs, strict=True)
    ]


def take_part(star: Star, task: Task) -> None:
    """Another rank's side of `gather_facts` and `gather_link_facts`; the first may be all."""
    star.timeout = TIMEOUT_S
    wanted = task.note(ExamineRank, any_version=True).wanted
    star.gather_notes(to_json(examine(star, wanted)))
    receive_note(star, Proceed)
    star.clock_offsets(time.time)
    before: Counters = {}
    after: Counters = {}
    while (rank := receive_note(star, TestLink).rank) is not None:
        if rank == star.rank.index:
            before = counters()
            answer_link(star)
            after = counters()
    gather_notes(star, LinkCounters(before, after))

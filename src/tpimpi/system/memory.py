"""How much memory a rank may take, and what that buys: sizes as users write them, what a host has free, and budgets.

Everything that a rank takes is one of these (`Needs`, and `Budget` for what is chosen):

    base         what it has resident when its model is about to be loaded: Python, libraries, MPI, the tokenizer
    cache        keys and values, for the context
    work         activations and messages of the largest step
    reserve      RESERVE: what cannot be seen from inside (the page cache of files that it reads, the kernel's own tables)
    buffers      the window's ring, and records for a trace
    pinned       tiles that stay; all that is left

`--memory SIZE` bounds their sum. `--memory auto` finds the sum: what the host has free, or the smallest memory limit of a
cgroup that the rank is in (batch jobs are such), less a reserve for others, is divided among the ranks there (`divide`).
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil

from tpimpi.errors import InputError

RESERVE = 24_000_000  # bytes; of page cache, page tables and sockets, 12 to 17 MB were seen
_VARIES = 4_000_000  # bytes; up to 3 MB more were seen from one start to the next, on a busy machine
_HOST_RESERVE = Fraction(1, 16)  # of a host's or cgroup's memory, left to other programs by --memory auto
_LEAST_HOST_RESERVE = 256_000_000  # bytes
_UNITS = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_SIZE = re.compile(r"([0-9]{1,15}(?:\.[0-9]{1,9})?)\s*(?:([kmgt]?)(i?)b?)", re.IGNORECASE | re.ASCII)

JOB = "job"
MIN_SIZE = 1_000_000  # bytes; a smaller one is a unit that was forgotten


def parse_size(text: str, option: str, least: int = MIN_SIZE) -> int:
    """Bytes that a user writes: 700M and 2.5G are powers of ten, 512MiB and 2GiB (or Mi, Gi) of two, 700000000 bytes.

    Raises InputError, which names `option`, also for less than `least`.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match[3] and not match[2]):
        raise InputError(f"{option} is {text[:40]!r}, must be a size such as 700M, 2.5G, 512MiB or 2GiB")
    size = math.floor(Fraction(match[1]) * (1024 if match[3] else 1000) ** _UNITS[match[2].lower()])
    if not least <= size < 1 << 60:
        raise InputError(f"{option} is {text[:40]!r}, which is {size} bytes; give a size such as 700M, 2.5G or 512MiB")
    return size


def show_size(nbytes: float) -> str:
    """Bytes for people, in powers of ten: "412 MB", "3.90 GB"."""
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.0f} MB"


def resident_bytes() -> int:
    """Memory of this process that is resident now, shared libraries included."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        rss: int = psutil.Process().memory_info().rss
        return rss


# What a host has free


@dataclass(frozen=True)
class Place:
    """Memory that several ranks may share: a host's, that of a cgroup on it with a limit, or of a batch job. In bytes."""

    name: str  # "" for the host itself, else the cgroup's path, or "job"
    total: int
    free: int  # now; of a job, of which nobody keeps count, `total`

    @property
    def reserve(self) -> int:
        """What --memory auto leaves free there: so much that other programs can take it faster than we notice, and live."""
        return min(max(_LEAST_HOST_RESERVE, int(self.total * _HOST_RESERVE)), self.total // 4)


def places(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> list[Place]:
    """The host, and every cgroup (v1 or v2) with a memory limit that this process is in. What is not there is left out."""
    host = psutil.virtual_memory()
    found = [Place("", host.total, host.available)]
    job = _slurm_job()
    if job and job < host.total:
        found.append(Place(JOB, job, job))
    for folder, names in _memory_cgroups(proc, cgroups):
        place = _cgroup(folder, names)
        if place is not None and place.total < host.total:
            found.append(place)
    return found


def _slurm_job() -> int | None:
    """Memory on this host that Slurm allows the job, in bytes: not every site has Slurm enforce it by cgroups."""
    try:
        if per_host := os.environ.get("SLURM_MEM_PER_NODE"):
            return int(per_host) << 20
        return int(os.environ["SLURM_MEM_PER_CPU"]) * int(os.environ["SLURM_CPUS_ON_NODE"]) << 20
    except (KeyError, ValueError):
        return None


@dataclass(frozen=True)
class _Names:
    """Files of a memory cgroup."""

    limit: str
    usage: str
    file: str  # in memory.stat: page cache that the kernel drops first


_V1 = _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_V2 = _Names("memory.max", "memory.current", "inactive_file")


def _memory_cgroups(proc: Path, root: Path) -> Iterator[tuple[Path, _Names]]:
    """Folders of the cgroups that this process is in, from its own up to the root, with the names of their files."""
    try:
        lines = (proc / "self/cgroup").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            top, names = root / "memory", _V1
        elif controllers == "":
            top, names = root, _V2
        else:
            continue
        folder = top / path.lstrip("/")
        while True:
            yield folder, names
            if folder == top or top not in folder.parents:
                break
            folder = folder.parent


def _cgroup(folder: Path, names: _Names) -> Place | None:
    try:
        limit = (folder / names.limit).read_text(encoding="ascii").strip()
        if limit == "max":
            return None
        usage = int((folder / names.usage).read_text(encoding="ascii"))
        stat = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="ascii").splitlines())
        return Place(str(folder), int(limit), max(0, int(limit) - usage + int(stat.get(names.file, 0))))
    except (OSError, ValueError):
        return None


# Budgets


@dataclass(frozen=True)
class Needs:
    """What one rank needs, in bytes; see the module's docstring. `tiles` are all of its tiles together."""

    base: int
    cache: int
    work: int
    least_buffers: int
    usual_buffers: int
    tiles: int

    @property
    def fixed(self) -> int:
        return self.base + self.cache + self.work + RESERVE

    @property
    def least(self) -> int:
        """The smallest budget that works."""
        return self.fixed + self.least_buffers

    @property
    def most(self) -> int:
        """The budget beyond which more memory is of no use."""
        return self.fixed + self.tiles


@dataclass(frozen=True)
class Budget:
    """What a rank does with its memory, in bytes. `promise` is None where it was not bounded."""

    promise: int | None
    buffers: int
    pinned: int  # at most


def make_budget(needs: Needs, promise: int, whose: str = "") -> Budget:
    """What `promise` bytes buy; `whose` says for a message where they come from. Everything is pinned where that fits,
    and the ring then takes nothing.

    Otherwise the ring is a quarter of what is left, within its least and usual sizes. Raises InputError where it cannot
    work.
    """
    if promise < needs.least:
        whose = whose or f"--memory is {show_size(promise)}"
        raise InputError(
            f"{whose}, this rank needs at least {megabytes_up(needs.least + _VARIES)} "
            f"({show_size(needs.base)} for program and libraries, {show_size(needs.cache)} for keys and values, "
            f"{show_size(needs.work + RESERVE)} to work with, {show_size(needs.least_buffers)} for buffers); "
            "give that, or a smaller --context"
        )
    left = promise - needs.fixed
    if needs.tiles <= left:
        return Budget(promise, needs.usual_buffers, needs.tiles)
    buffers = min(max(left // 4, needs.least_buffers), needs.usual_buffers)
    return Budget(promise, buffers, left - buffers)


def megabytes_up(nbytes: int) -> str:
    """A size that is at least `nbytes`, as --memory takes it: "412 MB"."""
    return f"{-(-nbytes // 1_000_000)} MB"


def divide(free: int, needs: Mapping[int, Needs]) -> dict[int, int]:
    """Divide `free` bytes among ranks (by number): so that each reads as much for a token, as far as that can be.

    A token waits for the rank that reads most. So the rank with most to keep, rank 0 with its head and tokenizer, gets more.
    What is beyond everyone's needs is divided evenly. A rank may get less than its least where there is not enough for all.
    """
    whole = sum(need.least for need in needs.values())
    if whole > free:  # not enough in any case: in proportion
        return {rank: free * need.least // whole for rank, need in needs.items()}
    beyond = {rank: max(0, need.most - need.least) for rank, need in needs.items()}
    level = _level(list(beyond.values()), free - whole)
    shares = {rank: need.least + max(0, beyond[rank] - level) for rank, need in needs.items()}
    rest = (free - sum(shares.values())) // max(1, len(needs))
    return {rank: share + max(0, rest) for rank, share in shares.items()}


def _level(sizes: Sequence[int], spare: int) -> int:
    """The least level s for which the parts of `sizes` above it, max(0, size - s), fit into `spare` together."""
    if sum(sizes) <= spare:
        return 0
    ordered = sorted(sizes, reverse=True)
    above = 0
    for count, size in enumerate(ordered, start=1):
        above += size
        lower = ordered[count] if count < len(ordered) else 0
        if above - count * lower >= spare:
            return -(-(above - spare) // count)
    return 0


def allowances(
    places_of: Mapping[int, Sequence[Place]], hosts: Mapping[int, str], needs: Mapping[int, Needs]
) -> dict[int, int]:
    """What each rank may take under --memory auto: of every place it is in, its part of what is free beyond the reserve.

    `places_of`, `hosts` and `needs` are by rank. What ranks have resident already is theirs to keep (`needs.base`).
    """
    shared: dict[tuple[str, str], list[int]] = {}
    for rank, mine in places_of.items():
        for place in mine:
            shared.setdefault((hosts[rank], place.name), []).append(rank)
    found = dict.fromkeys(places_of, 1 << 60)
    for (_, name), ranks in shared.items():
        at = [place for rank in ranks for place in places_of[rank] if place.name == name]
        free = min(place.free for place in at) - at[0].reserve
        free += 0 if name == JOB else sum(needs[rank].base for rank in ranks)
        for rank, part in divide(max(0, free), {rank: needs[rank] for rank in ranks}).items():
            found[rank] = min(found[rank], part)
    return found


def per_rank(sizes: Sequence[int], ranks: int) -> list[int]:
    """The meaning of --memory for so many ranks: one size for each, or one for all. Raises InputError."""
    if len(sizes) == 1:
        return list(sizes) * ranks
    if len(sizes) != ranks:
        raise InputError(
            f"--memory has {len(sizes)} sizes, this run has {ranks} ranks; give one for each, or one for all"
        )
    return list(sizes)


def headroom(found: Iterable[Place]) -> int:
    """Bytes that may be taken before a place is down to its reserve; negative where it is past that."""
    return min(place.free - place.reserve for place in found if place.name != JOB)

"""What memory a host, a cgroup or a batch job has, and what of it is free; what this process takes."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import psutil

from tpimpi.system.cgroups import CGROUPS, PROC, cgroup_folders

_HOST_RESERVE = Fraction(1, 16)  # of a host's or cgroup's memory, left to other programs by --memory auto
_MIN_HOST_RESERVE = 256_000_000  # bytes

JOB = "job"


def resident_bytes() -> int:
    """Memory of this process that is resident now, shared libraries included."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError, ValueError):
        rss: int = psutil.Process().memory_info().rss
        return rss


def use_one_arena() -> None:
    """Let all threads take memory from one place, which the C library else has several of, each with some that is free: a
    megabyte. Python's threads seldom ask at once. To be called before there are threads (mallopt(3), M_ARENA_MAX)."""
    m_arena_max = -8
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).mallopt(m_arena_max, 1)


def release_freed_memory() -> None:
    """Give the system back what this process has freed. The C library else keeps it: 7 MB after a vocabulary was read."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


# What a host has free


@dataclass(frozen=True)
class Place:
    """Memory that several ranks may share: a host's, that of a cgroup on it with a limit, or of a batch job. In bytes."""

    name: str  # "" for the host itself, else the cgroup's path, or "job"
    total: int
    free: int  # now; of a job, of which nobody keeps count, `total`

    @property
    def reserve(self) -> int:
        """Bytes that --memory auto leaves free there, for what other programs take between two looks at it."""
        return min(max(_MIN_HOST_RESERVE, int(self.total * _HOST_RESERVE)), self.total // 4)


def places(proc: Path = PROC, cgroups: Path = CGROUPS) -> list[Place]:
    """The host, and every cgroup (v1 or v2) with a memory limit that this process is in. What is not there is left out."""
    host = psutil.virtual_memory()
    found = [Place("", host.total, host.available)]
    job = _slurm_job()
    if job and job < host.total:
        found.append(Place(JOB, job, job))
    for folder, version in cgroup_folders("memory", proc, cgroups):
        place = _cgroup(folder, _NAMES[version])
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


_NAMES = {  # by version
    1: _Names("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    2: _Names("memory.max", "memory.current", "inactive_file"),
}


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


def headroom(found: Iterable[Place]) -> int:
    """Bytes that may be taken before a place is down to its reserve; negative where it is past that."""
    return min(place.free - place.reserve for place in found if place.name != JOB)


def peak_rss_bytes() -> int:
    """The most memory this process ever had resident."""
    try:  # getrusage would count the process that started this one, before it became Python
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError, ValueError):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

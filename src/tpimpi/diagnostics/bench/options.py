"""What the benches take, checked already: no text of the command line is parsed here, and nothing large imported."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class KernelBenchOptions:
    """What `bench kernels` takes."""

    formats: tuple[str, ...]
    positions: tuple[int, ...]  # that are computed at once, in ascending order
    shape: tuple[int, int]  # of the matrix: rows (out), columns (in)
    threads: int
    kernels: str  # "auto", or one of KERNEL_LEVELS
    backend: str | None  # None: native where it is installed, else the others
    seconds: float  # of each measurement
    json: Path | None = None


@dataclass(frozen=True)
class DiskBenchOptions:
    """What `bench disk` takes."""

    path: Path | None  # None: the cache folder
    readers: int  # that read at once
    read_bytes: int  # of each of their reads, a multiple of PAGE_BYTES
    seconds: float  # of each measurement
    json: Path | None = None


@dataclass(frozen=True)
class AllreduceBenchOptions:
    """What `bench allreduce` takes."""

    sizes: tuple[int, ...]  # numbers that are added, in ascending order
    algorithms: tuple[str, ...]
    wires: tuple[str, ...]
    rounds: int
    json: Path | None = None
    plot: Path | None = None
    quiet: bool = False

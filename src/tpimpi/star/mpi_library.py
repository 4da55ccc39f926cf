"""Which MPI this process uses, and what started it, in words."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass

import psutil

from tpimpi.system.launcher import LAUNCHERS, launched_rank

OPEN_MPI, MPICH = "Open MPI", "MPICH"


@dataclass(frozen=True)
class AboutMpi:
    """Kind and version of the MPI library, mpi4py's version, and the launcher: its kind, and its program where it runs on
    this host. All empty where no launcher started this process."""

    kind: str = ""
    version: str = ""
    mpi4py: str = ""
    launcher: str = ""
    program: str = ""


def about_mpi() -> AboutMpi:
    """MPI as it is here; it must have been started, where a launcher started this process."""
    if launched_rank() is None:
        return AboutMpi()
    import mpi4py
    from mpi4py import MPI

    kind, version = MPI.get_vendor()
    numbers = ".".join(map(str, version))
    if kind == OPEN_MPI and (found := re.search(r"v(\d[\w.]*)", MPI.Get_library_version())):
        numbers = found[1]
    return AboutMpi(kind, numbers, mpi4py.__version__, launcher_kind(), _program())


def launcher_kind() -> str:
    """The kind of launcher, as the variables that it set tell; "" where they do not."""
    if "OMPI_COMM_WORLD_RANK" in os.environ:
        return OPEN_MPI
    if "PMI_RANK" in os.environ and ("HYDI_CONTROL_FD" in os.environ or "MPI_LOCALNRANKS" in os.environ):
        return MPICH
    return "Slurm" if "SLURM_PROCID" in os.environ else ""


def _above() -> list[psutil.Process]:
    """The launchers above this process, on this host, the nearest first. Raises psutil.Error."""
    return [process for process in psutil.Process().parents() if process.name() in LAUNCHERS]


def _program() -> str:
    """Path of the launcher above this process; "" where there is none on this host."""
    try:
        above = _above()
        return above[-1].exe() if above else ""
    except psutil.Error:
        return ""


def launcher_commands() -> list[tuple[list[str], str]]:
    """The launchers above this process, on this host, the nearest first: the words of each, and the folder it is in."""
    try:
        return [(process.cmdline(), process.cwd()) for process in _above()]
    except psutil.Error:
        return []

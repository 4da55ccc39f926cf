"""Which MPI this process uses, and what started it, in words."""

from __future__ import annotations

import re
from dataclasses import dataclass

from tpimpi.system.launcher import OPEN_MPI, launched_rank, launcher_kind, launcher_program


@dataclass(frozen=True)
class MpiLibrary:
    """Kind and version of the MPI library, mpi4py's version, and the launcher: its kind, and its program where it runs on
    this host. All empty where no launcher started this process."""

    kind: str = ""
    version: str = ""
    mpi4py: str = ""
    launcher: str = ""
    program: str = ""


def mpi_library() -> MpiLibrary:
    """MPI as it is here; it must have been started, where a launcher started this process."""
    if launched_rank() is None:
        return MpiLibrary()
    import mpi4py
    from mpi4py import MPI

    kind, version = MPI.get_vendor()
    numbers = ".".join(map(str, version))
    if kind == OPEN_MPI and (found := re.search(r"v(\d[\w.]*)", MPI.Get_library_version())):
        numbers = found[1]
    return MpiLibrary(kind, numbers, mpi4py.__version__, launcher_kind(), launcher_program())

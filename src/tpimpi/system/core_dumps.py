"""Core dumps, which would write the memory of a process, with text and keys, to a disk, or give it to another program."""

from __future__ import annotations

import contextlib
import os
import resource
from pathlib import Path

# With a limit of 1 Linux neither writes a file nor starts the program that core_pattern names, which a limit of 0 does not
# keep it from (do_coredump in its fs/coredump.c).
_LIMIT_BYTES = 1


def wants_traceback() -> bool:
    """Whether the user looks for a fault of the program: TPIMPI_TRACEBACK is set."""
    return os.environ.get("TPIMPI_TRACEBACK", "0") not in ("", "0")


def turn_off_core_dumps() -> None:
    """Neither this process nor what it starts leaves its memory when it crashes; but where a traceback is wanted.

    The process stays dumpable otherwise (PR_SET_DUMPABLE): another process of the same user could read the user's files as
    well, and Open MPI's ranks on one host copy large messages straight out of one another's memory, which they could not.
    """
    if wants_traceback():
        return
    _, hard = resource.getrlimit(resource.RLIMIT_CORE)
    limit = 0 if hard == 0 else _LIMIT_BYTES
    resource.setrlimit(resource.RLIMIT_CORE, (limit, limit))
    with contextlib.suppress(OSError):  # should it be raised again, or not be asked: without any mapping
        Path("/proc/self/coredump_filter").write_text("0")

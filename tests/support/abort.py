"""How a test's program on several ranks ends when something is wrong."""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator


@contextlib.contextmanager
def abort_on_error() -> Iterator[None]:
    """What is raised inside is printed, and ends all ranks: the others would wait for this one."""
    try:
        yield
    except BaseException:
        from mpi4py import MPI

        traceback.print_exc()
        sys.stderr.flush()
        MPI.COMM_WORLD.Abort(1)

"""What a target is: a function of bytes, the errors that it may raise, and inputs to begin with."""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from tests.fuzz.limits import within_limits
from tests.fuzz.mutate import Mutator, mutate_bytes
from tpimpi.errors import TpimpiError


@dataclass(frozen=True)
class Target:
    """One reader of what others write. `run` raises `expected` errors where an input cannot be used, and no others."""

    name: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutator = mutate_bytes
    expected: tuple[type[Exception], ...] = (TpimpiError,)

    def __call__(self, data: bytes) -> None:
        """Try an input. Raises what is not expected, and TooMuchError; and AssertionError for an error of several lines, or
        one that calls itself internal."""
        with within_limits():
            try:
                self.run(data)
            except self.expected as error:
                line = str(error)
                assert "internal error" not in line, line
                assert not isinstance(error, TpimpiError) or ("\n" not in line and line.isprintable()), repr(line)


@functools.cache
def folder() -> Path:
    """Where this process puts inputs that are files: in memory, where there is such a place."""
    shared = Path("/dev/shm")
    path = Path(tempfile.mkdtemp(prefix="tpimpi-fuzz-", dir=shared if shared.is_dir() else None))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def written(name: str, data: bytes) -> Path:
    """The input as a file of that name."""
    path = folder() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

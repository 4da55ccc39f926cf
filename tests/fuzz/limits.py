"""What an input may take: 10 s of a processor and 512 MB."""

from __future__ import annotations

import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAX_TIME_S = 10.0
MAX_WAIT_S = 60.0  # in all, on a machine that does other things too
MAX_BYTES = 512 << 20
_PAGE_BYTES = resource.getpagesize()


class TooMuchError(AssertionError):
    """An input took more time or memory than it may."""


@contextmanager
def within_limits() -> Iterator[None]:
    """Raises TooMuchError where what is inside took too much, once it has ended."""
    before, peak_before, began = _resident(), _peak(), time.process_time()
    yield
    took, peak = time.process_time() - began, _peak()
    if took > MAX_TIME_S:
        raise TooMuchError(f"took {took:.1f} s, more than {MAX_TIME_S:.0f}")
    if peak > peak_before and peak - before > MAX_BYTES:
        raise TooMuchError(f"took {(peak - before) >> 20} MiB, more than {MAX_BYTES >> 20}")


def bound_memory() -> None:
    """From now on this process cannot get much more memory than an input may take: an input that wants all there is does
    not take it from others. What exceeds it is a MemoryError."""
    mapped = _statm()[0] * _PAGE_BYTES
    _, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (mapped + 3 * MAX_BYTES, hard))


def _resident() -> int:
    return _statm()[1] * _PAGE_BYTES


def _statm() -> list[int]:
    return [int(word) for word in Path("/proc/self/statm").read_text().split()]


def _peak() -> int:
    """Of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10

"""What a chat template may take: it is a program that came with a model, and might go on for ever, or want all memory."""

from __future__ import annotations

import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

MOST_TIME_S = 5.0  # of processors
MOST_BYTES = 256 << 20


class TemplateTimeError(Exception):
    """A template took too long."""


@contextmanager
def bounded() -> Iterator[None]:
    """Raises TemplateTimeError where what is inside takes more than MOST_TIME_S, and MemoryError where it wants more than
    MOST_BYTES beyond what the process has. The time is limited in the main thread alone, since signals come there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MOST_BYTES
    in_main = threading.current_thread() is threading.main_thread()
    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    if in_main:
        before = signal.signal(signal.SIGVTALRM, _too_long)
        signal.setitimer(signal.ITIMER_VIRTUAL, MOST_TIME_S, 1.0)  # again, where a library has swallowed it
    try:
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def _too_long(number: int, frame: FrameType | None) -> None:
    raise TemplateTimeError(f"it takes more than {MOST_TIME_S:.0f} s")

"""What a chat template may take: it is a program that came with a model, and might go on for ever, or want all memory."""

from __future__ import annotations

import resource
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

MAX_BYTES = 256 << 20
COMPILE_TIME_S = 2.0  # of a processor, as below
# For one text, of which a tokenizer asks for a dozen: far more than a template takes that looks at each message a few times.
RENDER_TIME_S, RENDER_TIME_A_CHARACTER_S = 0.5, 2e-5
_LOOK_INTERVAL_S = 0.1


class TemplateTimeError(Exception):
    """A template took too long."""


@contextmanager
def bounded(seconds: float) -> Iterator[None]:
    """Raises TemplateTimeError where what is inside takes this thread more than so many seconds of a processor, and
    MemoryError where it wants more than MAX_BYTES beyond what the process has. The time is limited in the main thread
    alone, since signals come there."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    most = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() + MAX_BYTES
    in_main, ends = threading.current_thread() is threading.main_thread(), time.thread_time() + seconds

    def look(number: int, frame: FrameType | None) -> None:  # again and again: a library may have swallowed it
        if time.thread_time() > ends:
            raise TemplateTimeError(f"it takes more than {seconds:.1f} s")

    if soft == resource.RLIM_INFINITY or most < soft:
        resource.setrlimit(resource.RLIMIT_AS, (most, hard))
    if in_main:
        before = signal.signal(signal.SIGVTALRM, look)
        signal.setitimer(signal.ITIMER_VIRTUAL, _LOOK_INTERVAL_S, _LOOK_INTERVAL_S)
    try:
        yield
    finally:
        if in_main:
            signal.setitimer(signal.ITIMER_VIRTUAL, 0)
            signal.signal(signal.SIGVTALRM, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

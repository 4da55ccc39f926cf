"""The readers: the threads that read a slice file, for the window and the expert cache together.

A disk gives most with so many reads in flight as were measured for it; with two sets of threads it would have twice as many,
and tiles that are needed soon would share it with some that are needed late. So there is one set, and whenever a thread is
free it takes what is needed soonest: see Urgency. A read that has begun is not broken off.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable
from enum import IntEnum
from typing import Protocol

DEFAULT_READS = 2  # in flight
SPARE_DELAY_S = 0.01  # by which spare reads that have begun may delay one that is asked for
JOIN_TIMEOUT_S = 2.0  # a reader that waits for a disk which stalls is left behind


class Urgency(IntEnum):
    """When a read is needed, the soonest first."""

    AWAITED = 0  # a tile of the window that the compute waits for
    CHOSEN = 1  # experts that the block in use has chosen
    AHEAD = 2  # tiles of the window that come later
    GUESSED = 3  # experts that a block will probably choose
    SPARE = 4  # what nobody has asked for, and has room: never by all threads, see `_spare_threads`


Read = Callable[[int], None]  # reads something, as the thread of this lane


class ReadSource(Protocol):
    """Who wants something read. Both are called by the readers, with their lock held."""

    def next_read(self, urgency: Urgency) -> Read | None:
        """The next read of this urgency, which is then made without the lock; None where there is none now."""

    def fail(self, error: BaseException) -> None:
        """A read raised this: there will be no further ones."""


class Readers:
    """`reads` threads, which run while there are sources; `lock` guards the sources too."""

    def __init__(self, reads: int = DEFAULT_READS) -> None:
        self.lock = threading.Lock()
        self._work = threading.Condition(self.lock)  # there may be something to read
        self._ended = threading.Condition(self.lock)  # a read has ended
        self._reads = reads
        self._sources: list[ReadSource] = []
        self._in_flight: Counter[ReadSource] = Counter()  # reads of each
        self._threads: list[threading.Thread] = []
        self._spare_read_s = 0.0  # what the last spare read would have taken the disk alone

    def add(self, source: ReadSource) -> None:
        """From now on read for `source` too."""
        with self.lock:
            self._sources.append(source)
            if len(self._sources) > 1:
                return
            self._threads = [
                threading.Thread(target=self._run, args=(lane,), name=f"tpimpi-read-{lane}", daemon=True)
                for lane in range(self._reads)
            ]
            for thread in self._threads:
                thread.start()

    def remove(self, source: ReadSource) -> None:
        """Read for `source` no more, once what is being read for it is there; a disk that stalls is not waited for. Without
        sources the threads end."""
        with self.lock:
            if source not in self._sources:
                return
            self._sources.remove(source)
            self._ended.wait_for(lambda: not self._in_flight[source], JOIN_TIMEOUT_S)
            if self._sources:
                return
            self._work.notify_all()
        for thread in self._threads:
            thread.join(JOIN_TIMEOUT_S)

    def wake(self) -> None:
        """There may be something to read: wakes one thread, which wakes the next. The lock is held."""
        self._work.notify()

    def wake_all(self) -> None:
        """As `wake`, where it may be spare, which not every thread takes."""
        self._work.notify_all()

    def _run(self, lane: int) -> None:
        """A thread: make read after read."""
        while (job := self._take(lane)) is not None:
            source, read, urgency = job
            error: BaseException | None = None
            began, beside = time.monotonic(), sum(self._in_flight.values())
            try:
                read(lane)
            except BaseException as raised:
                error = raised
            with self.lock:
                self._in_flight[source] -= 1
                if urgency is Urgency.SPARE:
                    self._spare_read_s = (time.monotonic() - began) / max(1, beside)
                if error is not None:
                    source.fail(error)
                self._ended.notify_all()

    def _take(self, lane: int) -> tuple[ReadSource, Read, Urgency] | None:
        """What this thread is to read next, once there is something; None where there are no sources."""
        with self.lock:
            while self._sources:
                job = self._find(lane)
                if job is not None:
                    self._in_flight[job[0]] += 1
                    self._work.notify()
                    return job
                self._work.wait()
            return None

    def _find(self, lane: int) -> tuple[ReadSource, Read, Urgency] | None:
        """What is needed soonest."""
        for urgency in Urgency:
            if urgency is Urgency.SPARE and lane >= self._spare_threads():
                break
            for source in self._sources:
                if (read := source.next_read(urgency)) is not None:
                    return source, read, urgency
        return None

    def _spare_threads(self) -> int:
        """How many threads may read what nobody has asked for: all but one, and one where the disk is slow, since a read
        that is asked for shares it with those that have begun."""
        soon = SPARE_DELAY_S / self._spare_read_s if self._spare_read_s else self._reads
        return max(1, min(self._reads - 1, int(soon)))

"""The memory guard: a thread that keeps a rank within its memory while it runs, and notes what it has.

Twenty times a second (five, while nothing is computed) it compares what the rank has resident with what was promised or,
under `--memory auto`, what its host and its cgroup have free with what is to stay free for others. Where it is too much,
pinned tiles are given back at once; when there has been room again for a while, they are taken again, some at a time. It
also says when the disk keeps the rank waiting: slow is not gone.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

from tpimpi.engine.budget import RESERVE_BYTES
from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.window import Window
from tpimpi.system.memory import headroom, places, resident_bytes

CHECK_INTERVAL_S = 0.05  # time between two looks at memory
IDLE_CHECK_INTERVAL_S = 0.2  # the same while nothing is computed; a look takes 1 ms
_IDLE_CORE_SHARE = 0.2  # a rank that uses less of one core is idle
_CALM_TIME_S = 2.0  # there has to be room for so long before more is pinned again
_MAX_TIMELINE_POINTS = 400  # with more, every other point is dropped, and new ones come half as often
_FIRST_POINT_INTERVAL_S = 0.1  # time between two points of the timeline at first
STALL_REPORT_S = 5.0  # waiting for the disk is reported after so long, and again after each doubling


class MemoryTimeline:
    """What a rank had in memory over time: [time.monotonic(), resident, pinned, buffers], in seconds and bytes."""

    def __init__(self) -> None:
        self.points: list[list[float]] = []
        self._every = _FIRST_POINT_INTERVAL_S

    def add(self, now: float, resident: int, pinned: int, buffers: int) -> None:
        """Note a point, unless the last is too near."""
        if self.points and now - self.points[-1][0] < self._every:
            return
        self.points.append([round(now, 3), resident, pinned, buffers])
        if len(self.points) > _MAX_TIMELINE_POINTS:
            self.points = self.points[::2]
            self._every *= 2


class MemoryGuard:
    """Watches the windows and expert caches of a rank; `limit_pinned` says how much they may pin at most."""

    def __init__(
        self,
        windows: Sequence[Window],
        caches: Sequence[ExpertCache] = (),
        *,
        promise: int | None,
        watched_by: int = 0,
        stalled: Callable[[str], None] = lambda line: None,
        waiting: Callable[[], tuple[float, str] | None] = lambda: None,
    ) -> None:
        """`promise` is what the rank may have resident, None for no bound. `watched_by` is how many ranks of ours share
        its host under `--memory auto`, 0 where the host's memory is not to be watched. `stalled` gets a line for the
        user; `waiting` says since when something else than a window waits for the disk, and for what."""
        self._windows, self._caches, self._promise, self._watched_by = windows, caches, promise, watched_by
        self._stalled, self._waiting = stalled, waiting
        self._most = self.wanted
        self._roomy_since: float | None = None
        self._said = 0.0  # how long the wait was that was last reported
        self.timeline = MemoryTimeline()
        self._lock = threading.Lock()
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpimpi-memory-guard", daemon=True)
        self._thread.start()

    @property
    def pinned(self) -> int:
        """Memory of pinned tiles and of experts."""
        windows = sum(window.pinned_bytes for window in self._windows)
        return windows + sum(cache.held_bytes for cache in self._caches)

    @property
    def wanted(self) -> int:
        """What they may take."""
        return sum(window.wanted_bytes for window in self._windows) + sum(cache.limit_bytes for cache in self._caches)

    def limit_pinned(self, most: int) -> None:
        """From now on pin at most so many bytes, experts included."""
        with self._lock:
            self._most = min(most, self._total())
            if self.wanted > most:
                self._pin(most)

    def _pin(self, nbytes: int) -> None:
        """Each window gets its part, by size, and the expert caches what is left: they are the first to give back."""
        whole = sum(window.total_bytes for window in self._windows)
        dense = max(0, min(whole, nbytes - sum(cache.min_bytes for cache in self._caches)))
        experts = sum(cache.total_bytes for cache in self._caches)
        for cache in self._caches:
            cache.limit(max(0, nbytes - dense) * cache.total_bytes // max(1, experts))
        for window in self._windows:
            window.pin_at_most(dense * window.total_bytes // max(1, whole))

    def _total(self) -> int:
        """What windows and caches could take."""
        windows = sum(window.total_bytes for window in self._windows)
        return windows + sum(cache.total_bytes for cache in self._caches)

    def _run(self) -> None:
        period, used = CHECK_INTERVAL_S, time.process_time()
        while not self._closed.wait(period):
            self.look(time.monotonic())
            before, used = used, time.process_time()
            period = IDLE_CHECK_INTERVAL_S if used - before < _IDLE_CORE_SHARE * period else CHECK_INTERVAL_S

    def look(self, now: float) -> None:
        """One look: at memory, and at waiting."""
        with self._lock:
            resident = resident_bytes()
            room = self._room(resident)
            pinned = self.pinned
            if room is not None:
                if room < 0 and pinned:
                    self._pin(min(pinned + room, self.wanted))
                    self._roomy_since = None
                elif room < 0:
                    self._roomy_since = None
                elif self.wanted < self._most:
                    self._grow(now, room)
            self.timeline.add(now, resident, self.pinned, sum(window.buffer_bytes for window in self._windows))
        self._report_stall(now)

    def _room(self, resident: int) -> int | None:
        """Bytes that this rank may take beyond what it has; negative: that it should give back; None: unbounded."""
        rooms = []
        if self._promise is not None:
            rooms.append(self._promise - RESERVE_BYTES - resident)
        if self._watched_by:
            free = headroom(places())
            # All ranks see the same want, and each gives its part; but all of the room, if one took it, would be too much.
            rooms.append(-(-free // self._watched_by) if free < 0 else free // (2 * self._watched_by))
        return min(rooms) if rooms else None

    def _grow(self, now: float, room: int) -> None:
        """Pin more again, if there has been room for a while."""
        coming = self.wanted - self.pinned  # is not resident yet
        worth = min(self._most - self.wanted, room - coming)
        if worth < (self._most - self.wanted) // 8 or worth <= 0:
            self._roomy_since = None
        elif self._roomy_since is None:
            self._roomy_since = now
        elif now - self._roomy_since >= _CALM_TIME_S:
            self._pin(self.wanted + worth)
            self._roomy_since = None

    def _report_stall(self, now: float) -> None:
        readers: list[Window | ExpertCache] = [*self._windows, *self._caches]
        waits = [self._waiting(), *((r.waiting_since, r.waiting_for) for r in readers if r.waiting_since)]
        longest = max(((now - wait[0], wait[1]) for wait in waits if wait and wait[0]), default=(0.0, ""))
        if longest[0] < STALL_REPORT_S:
            if self._said:
                self._stalled("the disk goes on")
            self._said = 0.0
        elif longest[0] >= 2 * self._said or not self._said:
            self._said = longest[0]
            self._stalled(f"waiting for the disk for {longest[0]:.0f} s, for {longest[1]}: slow, not gone")

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

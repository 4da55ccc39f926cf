"""Pinned tiles are read once, and used for as long as a run lasts; so are experts that are used often. A thread compares
them with their checksums again and again, so that a bit that flips in memory is noticed. That takes a small part of one
core's time, more while nothing is computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from tpimpi.engine.expert_cache import ExpertCache
from tpimpi.engine.window import Window

IDLE_SHARE, BUSY_SHARE = 0.03, 0.002  # of one core
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
NOTHING_PINNED_S = 1.0  # until the next look, where there was nothing to check


class PinnedCheck:
    """Goes through the pinned tiles of these windows, and the experts of these caches, until `close`. What is damaged is
    raised by Window.raise_damage and ExpertCache.begin."""

    def __init__(self, windows: Sequence[Window], caches: Sequence[ExpertCache] = ()) -> None:
        self._windows = windows
        self._checks = [*(window.check_next_pinned for window in windows), *(cache.check_next for cache in caches)]
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpimpi-pinned", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number, turns = 0, [-1]
        pause = NOTHING_PINNED_S
        while not self._end.wait(pause):
            began = time.monotonic()
            nbytes = 0
            for _ in self._checks:  # the next that has something
                number = (number + 1) % len(self._checks)
                if nbytes := self._checks[number]():
                    break
            spent = time.monotonic() - began
            turns, before = [window.turn for window in self._windows], turns
            pause = spent / (IDLE_SHARE if turns == before else BUSY_SHARE) if nbytes else NOTHING_PINNED_S
            pause = min(max(pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def close(self) -> None:
        """Stop; the tiles may be given back afterwards."""
        self._end.set()
        self._thread.join()

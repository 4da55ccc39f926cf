"""Pinned tiles are read once, and used for as long as a run lasts: a thread compares them with their checksums again and
again, so that a bit that flips in memory is noticed. That takes a small part of one core's time, more while nothing is
computed.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence

from tpimpi.engine.window import Window

IDLE_SHARE, BUSY_SHARE = 0.03, 0.002  # of one core
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 5.0
NOTHING_PINNED_S = 1.0  # until the next look, where there was nothing to check


class PinnedCheck:
    """Goes through the pinned tiles of these windows, until `close`. What is damaged is raised by Window.raise_damage."""

    def __init__(self, windows: Sequence[Window]) -> None:
        self._windows = windows
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="tpimpi-pinned", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        number, turns = 0, [-1]
        pause = NOTHING_PINNED_S
        while not self._end.wait(pause):
            number = (number + 1) % len(self._windows)
            began = time.monotonic()
            nbytes = self._windows[number].check_next_pinned()
            spent = time.monotonic() - began
            turns, before = [window.turn for window in self._windows], turns
            pause = spent / (IDLE_SHARE if turns == before else BUSY_SHARE) if nbytes else NOTHING_PINNED_S
            pause = min(max(pause, SHORTEST_PAUSE_S), LONGEST_PAUSE_S)

    def close(self) -> None:
        """Stop; the tiles may be given back afterwards."""
        self._end.set()
        self._thread.join()

"""What tests of memory guard share."""

from __future__ import annotations

import threading

import pytest

from tpimpi.engine import memory_guard as keeping
from tpimpi.engine.memory_guard import MemoryGuard
from tpimpi.system.memory import Place

TILE = 10


CALM = 2.0  # seconds


BASE = 1000  # bytes that a rank has resident beside its tiles


class FakeWindow:
    """A window of `tiles` tiles of TILE bytes; what is wanted is pinned when `read` is called."""

    def __init__(self, tiles: int) -> None:
        self.total_bytes = self.wanted_bytes = self.pinned_bytes = tiles * TILE
        self.buffer_bytes = 5
        self.waiting_since: float | None = None
        self.waiting_for = ""

    def pin_at_most(self, nbytes: int | None) -> int:
        assert nbytes is not None and nbytes >= 0
        self.wanted_bytes = min(nbytes, self.total_bytes) // TILE * TILE
        self.pinned_bytes = min(self.pinned_bytes, self.wanted_bytes)
        return self.wanted_bytes

    def read(self) -> None:
        self.pinned_bytes = self.wanted_bytes


class Case:
    """A guard that looks only when it is told to, over windows that read when they are told to."""

    def __init__(self, patch: pytest.MonkeyPatch, *tiles: int) -> None:
        self._patch = patch
        self.windows = [FakeWindow(count) for count in tiles]
        self.others = 0  # bytes that this process has taken beside base and tiles
        self.free = 0  # of the host, beyond its reserve
        self.lines: list[str] = []
        self.row: tuple[float, str] | None = None
        patch.setattr(keeping, "CHECK_INTERVAL_S", threading.TIMEOUT_MAX)
        patch.setattr(keeping, "resident_bytes", lambda: self.resident)
        patch.setattr(keeping, "places", lambda: [Place("", 4 * 10**9, 10**9)])
        patch.setattr(keeping, "headroom", lambda places: self.free)

    @property
    def resident(self) -> int:
        return BASE + self.others + sum(window.pinned_bytes for window in self.windows)

    @property
    def pinned(self) -> list[int]:
        return [window.pinned_bytes for window in self.windows]

    @property
    def wanted(self) -> list[int]:
        return [window.wanted_bytes for window in self.windows]

    def read(self) -> None:
        for window in self.windows:
            window.read()

    def keep(self, **options: object) -> MemoryGuard:
        made = MemoryGuard(self.windows, stalled=self.lines.append, waiting=lambda: self.row, **options)  # type: ignore[arg-type]
        self.guard = made
        return made

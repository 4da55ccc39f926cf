"""Processes that are watched: which of them ended first."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping


class ProcessWatch:
    """Sees processes end, in their order, as the event loop runs. Those that cannot be seen from here are left out."""

    def __init__(self) -> None:
        self.ended: list[str] = []
        self._watched: set[int] = set()

    def begin(self, names: Mapping[int, str]) -> None:
        """Watch these from now on, by their numbers, and no others."""
        self.end()
        self.ended = []
        loop = asyncio.get_running_loop()
        for pid, name in names.items():
            with contextlib.suppress(OSError):
                descriptor = os.pidfd_open(pid)
                self._watched.add(descriptor)
                loop.add_reader(descriptor, self._has_ended, descriptor, name)

    def _has_ended(self, descriptor: int, name: str) -> None:
        self.ended.append(name)
        self._drop(descriptor)

    def _drop(self, descriptor: int) -> None:
        asyncio.get_running_loop().remove_reader(descriptor)
        self._watched.discard(descriptor)
        os.close(descriptor)

    def end(self) -> None:
        """Watch nothing."""
        for descriptor in list(self._watched):
            self._drop(descriptor)

"""Other processes of a run on this machine, to see which of them has ended."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import psutil


class Siblings:
    """The processes that are there now, by a number of theirs, the rank."""

    def __init__(self, pids: Mapping[int, int]) -> None:
        """`pids` by rank. Those that cannot be seen from here, in another container say, are left out."""
        self._processes: dict[int, psutil.Process] = {}
        for rank, pid in pids.items():
            try:
                self._processes[rank] = psutil.Process(pid)
            except (psutil.Error, ValueError):
                continue

    def ended(self) -> Iterable[int]:
        """Those that have ended since, in rank order."""
        return [rank for rank, process in sorted(self._processes.items()) if not _lives(process)]


def _lives(process: psutil.Process) -> bool:
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.Error:
        return False

"""What a run prints, and which processes of tpimpi are on a device."""

from __future__ import annotations

import contextlib
import os
import re
import subprocess
import threading
import time
from collections.abc import Callable
from pathlib import Path

from bench.home.home import Home
from bench.home.sweep import HomeError

_BESIDE = re.compile(r"-m tpimpi(\.serving\.server\.front| up\b)")  # processes that are no ranks
START_TIMEOUT_S = 90.0  # until a run is where it is to be broken


class Screen:
    """What a run prints, with the time of each line of standard error."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process, self.text, self.lines = process, "", list[tuple[float, str]]()
        self._threads = [threading.Thread(target=read, daemon=True) for read in (self._read_text, self._read_lines)]
        for thread in self._threads:
            thread.start()

    def _read_text(self) -> None:
        assert self.process.stdout is not None
        while piece := os.read(self.process.stdout.fileno(), 4096):
            self.text += piece.decode(errors="replace")

    def _read_lines(self) -> None:
        assert self.process.stderr is not None
        for line in self.process.stderr:
            self.lines.append((time.monotonic(), line.rstrip("\n\0")))

    def until(self, ready: Callable[[], bool], what: str) -> None:
        """Wait until `ready`. Raises TimeoutError."""
        end = time.monotonic() + START_TIMEOUT_S
        while not ready():
            if time.monotonic() > end or self.process.poll() is not None:
                said = "\n".join(line for _, line in self.lines[-5:])
                raise TimeoutError(f"the run did not get to {what}: {self.text[-100:]!r} {said}")
            time.sleep(0.01)

    def ended(self, timeout: float) -> bool:
        """Whether the run ends within so many seconds."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(timeout)
        return self.process.poll() is not None

    def join(self) -> None:
        """Read what is left."""
        for thread in self._threads:
            thread.join(2)


def tpimpi_processes(home: Home, rank: int) -> dict[int, str]:
    """Processes of tpimpi on a device: id and command line."""
    found = {}
    for pid in home.pids(rank):
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            if "-m tpimpi" in command and not re.match(r"\S*(mpirun|mpiexec|prterun|prted|hydra)", command):
                found[pid] = command
    return found


def rank_process(home: Home, rank: int) -> int:
    """The process of the rank on device `rank`, which has threads of ours; not the shells around it."""
    mine = [
        pid
        for pid, command in tpimpi_processes(home, rank).items()
        if Path(command.split()[0]).name.startswith("python") and not _BESIDE.search(command)
    ]
    if not mine:
        raise HomeError(f"rank {rank} has no process any more")
    return max(mine, key=lambda pid: len(list(Path(f"/proc/{pid}/task").iterdir())))

"""Ranks that stay up, so that many programs need one launch.

`Ranks` is called as a `Launcher` is, and gives the same results; but the processes, and MPI in them, are there already
after the first call for a number of ranks. Not for what is about the process itself: how it starts, what it has imported,
how much memory it took, and signals to it; nor for programs that change modules.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping
from multiprocessing.connection import Connection, Listener, wait
from pathlib import Path

import pytest

from tests.support.launch import ROOT, TIMEOUT, Launcher, Result, code_asked_for

MAX_PROCESSES = 12  # that stay up at a time: the groups used longest ago are ended first
START_S = 120.0  # in which the ranks of a launch come up
END_S = 5.0  # that others have when a rank has failed, and that a launcher has to end


class Ranks:
    """Runs Python programs on ranks that stay up, under one MPI."""

    def __init__(self, launcher: Launcher) -> None:
        self.launcher = launcher
        self.mpi = launcher.mpi
        self._groups: dict[int, _Group] = {}  # by number of ranks; the one used last is last

    def __call__(
        self,
        ranks: int,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        stdin: str | None = None,
        cwd: Path | None = None,
        timeout: float = TIMEOUT,
    ) -> Result:
        """Run `python ARGUMENTS` on so many ranks; `-c` and options of Python itself are not known here."""
        group = self._groups.pop(ranks, None)
        if group is None or not group.is_up():
            while self._groups and ranks + sum(self._groups) > MAX_PROCESSES:
                self._groups.pop(next(iter(self._groups))).close()
            group = _Group(self.launcher, ranks)
        try:
            result = group.run(list(arguments), env or {}, stdin, cwd, timeout)
        except BaseException:
            group.close()
            raise
        if result.code in (0, 2) and group.is_whole:  # done, or refused before it began
            self._groups[ranks] = group
        else:  # whatever it left behind is nobody's trouble
            group.close()
        return result

    def close(self) -> None:
        for group in self._groups.values():
            group.close()
        self._groups.clear()


class _Group:
    """The ranks of one launch."""

    def __init__(self, launcher: Launcher, ranks: int) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="tpimpi-ranks-"))
        self._said = self._folder / "launcher"  # a file: text then comes from each rank's own streams
        self._processes: list[int] = []  # as descriptors: numbers are given to others when a process has ended
        self._connections: list[Connection] = []
        self.is_whole = True  # every rank is there and has ended the last program by itself
        address = str(self._folder / "socket")
        with Listener(address, "AF_UNIX", backlog=ranks) as listener, self._said.open("w") as said:
            self._process = subprocess.Popen(
                launcher.command(ranks, ["-m", "tests.support.worker", address]),
                env={**os.environ, **launcher.env},
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=said,
                stderr=said,
                start_new_session=True,
            )
            found = {}
            listener._listener._socket.settimeout(START_S)  # type: ignore[attr-defined]
            try:
                for _ in range(ranks):
                    connection = listener.accept()
                    rank, pid = connection.recv()
                    found[rank] = connection
                    self._processes.append(os.pidfd_open(pid))
            except OSError:
                self.close()
                pytest.fail(f"{ranks} ranks did not come up in {START_S:.0f} s: {self._said.read_text()}")
        self._connections = [found[rank] for rank in range(ranks)]

    def is_up(self) -> bool:
        return self._process.poll() is None

    def run(
        self, arguments: list[str], env: Mapping[str, str], stdin: str | None, cwd: Path | None, timeout: float
    ) -> Result:
        (self._folder / "stdin").write_text(stdin or "", errors="surrogateescape")
        outs, errs = ([self._folder / f"{name}-{i}" for i in range(len(self._processes))] for name in ("out", "err"))
        for path in (*outs, *errs):
            path.write_bytes(b"")
        before = self._said.stat().st_size
        for rank, connection in enumerate(self._connections):
            connection.send(
                {
                    "arguments": arguments,
                    "env": dict(env),
                    "cwd": None if cwd is None else str(cwd),
                    "stdin": str(self._folder / "stdin") if rank == 0 else os.devnull,
                    "out": str(outs[rank]),
                    "err": str(errs[rank]),
                }
            )
        code, all_ended = self._codes(time.monotonic() + timeout)
        self.is_whole = code is not None and all_ended
        if code not in (0, 2) or not self.is_whole:
            with contextlib.suppress(subprocess.TimeoutExpired):
                ended = self._process.wait(END_S)
                code = ended if code is None and ended else code
        with self._said.open(errors="replace") as said:
            said.seek(before)
            more = said.read()
        out, err = ("".join(path.read_text(errors="replace") for path in paths) for paths in (outs, errs))
        if not all_ended:
            pytest.fail(f"{' '.join(arguments)} took over {timeout:.0f} s\nstdout: {out}\nstderr: {err}\n{more}")
        return Result(1 if code is None else code_asked_for(code, err + more), out, err + more)

    def _codes(self, deadline: float) -> tuple[int | None, bool]:
        """The worst exit code, None where a rank was ended without one; and whether all of them have ended in time."""
        left, worst, died = list(self._connections), 0, False
        while left:
            ready = wait(left, max(0.0, deadline - time.monotonic()))
            if not ready:
                return (None if died else worst), died or worst != 0
            for connection in ready:
                left.remove(connection)  # type: ignore[arg-type]
                try:
                    worst = max(worst, connection.recv())  # type: ignore[union-attr]
                except (EOFError, OSError):
                    died = True
            if died or worst:
                deadline = min(deadline, time.monotonic() + END_S)
        return (None if died else worst), True

    def close(self) -> None:
        """End the ranks, whatever they are doing, and their launcher."""
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(process, signal.SIGKILL)
            os.close(process)
        self._processes.clear()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

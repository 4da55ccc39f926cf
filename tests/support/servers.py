"""A server of ours that runs: started under mpirun, and ended as the test likes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import httpx2
import psutil

from tests.support.launch import TIMEOUT, Launcher

START_S = 120.0


class RunningServer:
    """`tpimpi serve`, or `up`, on so many ranks; `url` is where it listens, before the model is loaded."""

    def __init__(
        self,
        mpirun: Launcher,
        ranks: int,
        log: Path,
        *options: str,
        env: Mapping[str, str],
        program: Sequence[str] = ("-m", "tpimpi"),
        up: bool = False,
    ) -> None:
        self.log = log
        command = mpirun.command(ranks, [*program, "serve", "--port", "0", *options])
        if up:  # which finds this launcher
            env = {**env, "PATH": f"{Path(command[0]).parent}{os.pathsep}{os.environ['PATH']}"}
            command = [sys.executable, *program, "up", "--ranks", str(ranks), "--port", "0", *options]
        self._command, self._environment = command, {**os.environ, **mpirun.env, **env}
        self.start()

    def start(self) -> None:
        """As it was started, also after its end; what it said before is gone."""
        with self.log.open("wb") as file:
            self.process = subprocess.Popen(
                self._command,
                env=self._environment,
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
            )
        self.url = self._listening()
        self.client = httpx2.Client(base_url=self.url, timeout=TIMEOUT)

    def _listening(self) -> str:
        until = time.monotonic() + START_S
        while time.monotonic() < until and self.process.poll() is None:
            for line in self.said().splitlines():
                if line.startswith("tpimpi: http"):
                    return line.split(" ")[1]
            time.sleep(0.05)
        self.close()
        raise AssertionError(f"the server does not listen: {self.said()}")

    def said(self) -> str:
        return self.log.read_text(errors="replace")

    def until_ready(self) -> None:
        until = time.monotonic() + START_S
        while self.client.get("/health").status_code != 200:
            assert time.monotonic() < until and self.process.poll() is None, self.said()
            time.sleep(0.05)

    def rank(self, number: int) -> psutil.Process:
        """The process of a rank."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            if "serve" in process.cmdline() and _rank(process) == str(number):
                return process
        raise AssertionError(f"there is no rank {number}")

    def processes(self) -> list[psutil.Process]:
        """All of it, the launcher too."""
        launcher = psutil.Process(self.process.pid)
        return [launcher, *launcher.children(recursive=True)]

    def wait(self) -> int:
        """The launcher's exit code."""
        return self.process.wait(TIMEOUT)

    def close(self) -> None:
        """End all of it, however it is."""
        if hasattr(self, "client"):
            self.client.close()
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _rank(process: psutil.Process) -> str | None:
    found = process.environ()
    return found.get("OMPI_COMM_WORLD_RANK", found.get("PMI_RANK"))

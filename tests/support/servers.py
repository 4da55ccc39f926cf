"""A real server, `serve` on some ranks, that stays up for the tests of a module."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import psutil
import pytest

from tests.support.launch import TIMEOUT, Launcher

LISTENING = re.compile(r"tpimpi: (https?://\S+)")


@dataclass(frozen=True)
class Server:
    """One that is ready."""

    url: str
    process: subprocess.Popen[bytes]

    def rank(self, rank: int) -> psutil.Process:
        """The process of a rank, as both MPIs number them in their environment."""
        names = ("OMPI_COMM_WORLD_RANK", "PMI_RANK")
        found = [
            one
            for one in psutil.Process(self.process.pid).children(recursive=True)
            if "tpimpi" in one.cmdline() and str(rank) in (one.environ().get(name) for name in names)
        ]
        return min(found, key=lambda one: one.create_time())


@contextmanager
def serving(mpirun: Launcher, ranks: int, *arguments: str, env: Mapping[str, str]) -> Iterator[Server]:
    """`serve ARGUMENTS` on so many ranks, at a free port, from when it answers /health until the block ends."""
    command = mpirun.command(ranks, ["-m", "tpimpi", "serve", "--port", "0", *arguments])
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(
            command,
            env={**os.environ, **mpirun.env, **env},
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=said,
            start_new_session=True,
        )

        def lines() -> str:
            return os.pread(said.fileno(), 1 << 20, 0).decode(errors="replace")

        try:
            yield Server(_until_ready(process, lines), process)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(TIMEOUT)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                pytest.fail(f"the server did not end\n{lines()}")


def _until_ready(process: subprocess.Popen[bytes], lines: Callable[[], str]) -> str:
    """The server's address, once it answers."""
    end = time.monotonic() + TIMEOUT
    while time.monotonic() < end and process.poll() is None:
        if (found := LISTENING.search(lines())) is not None:
            try:
                urllib.request.urlopen(f"{found[1]}/health").close()
                return found[1]
            except urllib.error.HTTPError:  # it is loading
                pass
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    pytest.fail(f"the server did not come up\n{lines()}")

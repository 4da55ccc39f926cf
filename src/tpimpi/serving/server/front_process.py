"""The front as rank 0 starts it: a process of its own, which has HTTP, so that rank 0 has its interpreter for computing."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import msgspec

from tpimpi.errors import InputError, TpimpiError
from tpimpi.serving.server.connection import Connection
from tpimpi.serving.server.front_options import FrontOptions, Listening

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
END_S = 5.0  # the front tells its clients that the run ends, and has so long to end itself
# Of the launcher: nothing that the front starts is to take itself for a rank.
LAUNCHERS_VARIABLES = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "HYDRA_", "MPI_", "PALS_")


def check_installed() -> None:
    """Raise InputError where a package of the server is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}, which are missing here; pip install 'tpimpi[serve]'")


class FrontProcess:
    """The front, which listens when this is made, and rank 0's connection to it. Raises InputError where it cannot."""

    def __init__(self, options: Callable[[str], FrontOptions]) -> None:
        """`options` are made with the path of the socket."""
        check_installed()
        self._folder = tempfile.mkdtemp(prefix="tpimpi-")  # for this user alone
        socket = str(Path(self._folder) / "front")
        environment = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS_VARIABLES)}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tpimpi.serving.server.front"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # the launcher's signals are for rank 0
        )
        try:
            self.url = self._start(options(socket))
            self.connection = Connection(socket)
        except BaseException:
            self.close()
            raise

    def _start(self, options: FrontOptions) -> str:
        """Where it listens."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.write(msgspec.json.encode(options) + b"\n")
            self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise TpimpiError("the HTTP front ended before it listened; the lines above say why")
        listening = msgspec.json.decode(line, type=Listening)
        if listening.problem:
            raise InputError(listening.problem)
        return listening.url

    def close(self) -> None:
        """Let it end, and see that it does."""
        if hasattr(self, "connection"):
            self.connection.close()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

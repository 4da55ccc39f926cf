"""The front as rank 0 starts it: a process of its own, which has HTTP, so that rank 0 has its interpreter for computing."""

from __future__ import annotations

import contextlib
import importlib.util
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec

from tpimpi.errors import InputError, TpimpiError
from tpimpi.serving.server.front_options import FrontOptions, Listening, State
from tpimpi.system.launcher import environment_without_launcher

PACKAGES = ("starlette", "uvicorn", "prometheus_client")
END_S = 5.0  # the front tells its clients that the run ends, and has so long to end itself


def check_installed() -> None:
    """Raise InputError where a package of the server is missing."""
    missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"serve needs {', '.join(missing)}, which are missing here; pip install 'tpimpi[serve]'")


class FrontProcess:
    """The front, which listens at `url` when this is made, and rank 0 at `socket`, in `folder`, which is there until the
    front ends. Raises InputError where it cannot."""

    def __init__(self, options: Callable[[str], FrontOptions]) -> None:
        """`options` are made with the path of the socket."""
        check_installed()
        # For this user alone; the front removes it too, where we are killed.
        self.folder = tempfile.mkdtemp(prefix="tpimpi-")
        self.socket = str(Path(self.folder) / "front")
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "tpimpi.serving.server.front"],  # nothing is imported from the current folder
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment_without_launcher(),
            start_new_session=True,  # the launcher's signals are for rank 0
        )
        try:
            self.url = self._start(msgspec.structs.replace(options(self.socket), folder=self.folder))
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

    def states(self) -> Iterator[State]:
        """What becomes of rank 0, as the front sees it, until the front ends; where it outlives rank 0."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            yield msgspec.json.decode(line, type=State)

    def end_run(self) -> None:
        """Where the front outlives rank 0: have rank 0 end the run, and the front after it."""
        self._process.terminate()

    def close(self) -> None:
        """Let it end, and see that it does."""
        assert self._process.stdin is not None
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

"""The front of a server by itself, and a stand-in for rank 0 on its socket."""

from __future__ import annotations

import socket
import subprocess
import sys
from pathlib import Path
from typing import IO

import msgspec

from tpimpi.serving.sealed_lines import LineSeal
from tpimpi.serving.server import front as front_module
from tpimpi.serving.server import wire
from tpimpi.serving.server.front_options import FrontOptions, Listening

TIMEOUT_S = 60.0
PASSPHRASE = "correct horse battery staple"  # of a journal
READY = wire.Ready("m", 64, 2, 100, "")


class StandIn:
    """In place of rank 0."""

    def __init__(self, path: str) -> None:
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(path)
        self._frames, self._heard = wire.Frames(), list[wire.Question]()

    def say(self, *messages: wire.Reply) -> None:
        self._socket.sendall(b"".join(map(wire.frame, messages)))

    def hear(self) -> wire.Question:
        while not self._heard:
            data = self._socket.recv(1 << 16)
            assert data, "the front has closed the connection"
            self._heard += map(wire.decode_question, self._frames.feed(data))
        return self._heard.pop(0)

    def close(self) -> None:
        self._socket.close()


class Front:
    """A front that runs."""

    def __init__(self, options: FrontOptions, *, stderr: IO[bytes] | None = None, files: int | None = None) -> None:
        """`files`: how many it may have open unless it asks for more."""
        limit = [] if files is None else ["prlimit", f"--nofile={files}:"]
        self.process = subprocess.Popen(
            [*limit, sys.executable, "-m", front_module.__name__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(msgspec.json.encode(options) + b"\n")
        self.process.stdin.flush()
        self.listening = msgspec.json.decode(self.process.stdout.readline(), type=Listening)

    def close(self) -> int:
        self.process.terminate()
        code = self.process.wait(TIMEOUT_S)
        for pipe in (self.process.stdin, self.process.stdout):
            assert pipe is not None
            pipe.close()
        return code


def written(path: Path) -> bytes:
    """The lines of a journal."""
    first, *lines = path.read_bytes().splitlines(keepends=True)
    seal = LineSeal(PASSPHRASE.encode(), first, "journal")
    return b"".join(seal.open(line) for line in lines)

"""A program at a terminal: what it shows, and what somebody types."""

from __future__ import annotations

import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import termios
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from tests.support.launch import TIMEOUT


class Terminal:
    """A running program whose streams are a terminal. `seen` is all that it has shown, in so many `pieces`."""

    def __init__(self, process: subprocess.Popen[bytes], ours: int) -> None:
        self.process, self.ours = process, ours
        self.pieces = 0
        self._shown, self._taken = b"", 0  # bytes so far, and how many of them were returned

    @property
    def seen(self) -> str:
        return _text(self._shown)

    def _wait_for(self, what: str, reached: Callable[[], bool], timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while not reached() or select.select([self.ours], [], [], 0)[0]:
            assert time.monotonic() < deadline, f"no {what}: {self.seen!r}"
            if select.select([self.ours], [], [], 0.1)[0]:
                try:
                    self._shown += os.read(self.ours, 4096)
                    self.pieces += 1
                except OSError:  # the program has ended
                    self.process.wait(timeout)
                    assert reached(), f"it ended without {what}: {self.seen!r}"
                    break
        new, self._taken = self._shown[self._taken :], len(self._shown)
        return _text(new)

    def until(self, end: str, timeout: float = TIMEOUT) -> str:
        """Wait until the program has shown something new that ends so; what came since the last call."""
        return self._wait_for(repr(end), lambda: self._shown[self._taken :].endswith(end.encode()), timeout)

    def type(self, text: str) -> None:
        """As from the keyboard: \\x03 is Ctrl-C, \\x04 Ctrl-D."""
        os.write(self.ours, text.encode())

    def end(self, timeout: float = TIMEOUT) -> tuple[int, str]:
        """The exit code, once the program has ended; and what it showed since the last call."""
        shown = self._wait_for("end", lambda: self.process.poll() is not None, timeout)
        return self.process.returncode, shown


class Screen:
    """What somebody sees of a program that moves the cursor: a terminal of `ROWS` lines, which the program knows."""

    ROWS, COLUMNS = 300, 240

    def __init__(self, terminal: Terminal) -> None:
        import pyte

        self.terminal = terminal
        fcntl.ioctl(terminal.ours, termios.TIOCSWINSZ, struct.pack("HHHH", self.ROWS, self.COLUMNS, 0, 0))
        self._screen = pyte.Screen(self.COLUMNS, self.ROWS)
        self._stream = pyte.ByteStream(self._screen)
        self._text: str | None = None

    @property
    def text(self) -> str:
        """All lines, without what is blank at their ends."""
        if self._text is None:
            rows = [self._screen.buffer[row] for row in range(max(self._screen.buffer, default=-1) + 1)]
            lines = ["".join(row[at].data for at in range(max(row, default=-1) + 1)).rstrip() for row in rows]
            self._text = "\n".join(lines).rstrip("\n")
        return self._text

    def _feed(self) -> None:
        self._stream.feed(os.read(self.terminal.ours, 4096))
        self._text = None

    def until(self, end: str, what: str = "", since: int = -1, timeout: float = TIMEOUT) -> str:
        """Wait until what is shown has more than `since` characters, `what` among the new ones, and ends so; all of it."""
        deadline = time.monotonic() + timeout
        while not (len(self.text) > since and self.text.endswith(end) and what in self.text[max(since, 0) :]) or (
            self._more(0)
        ):
            assert time.monotonic() < deadline, f"no {what!r}, {end!r}: {self.text}"
            if self._more(0.1):
                self._feed()
        return self.text

    def ask(self, text: str, end: str = "\n>", what: str = "") -> str:
        """Type a line, and wait for the next prompt; what was shown meanwhile."""
        before = len(self.text)
        self.terminal.type(f"{text}\r")
        return self.until(end, what, before)[before:]

    def _more(self, timeout: float) -> bool:
        return bool(select.select([self.terminal.ours], [], [], timeout)[0])

    def end(self, timeout: float = TIMEOUT) -> int:
        """The exit code, once the program has ended."""
        deadline = time.monotonic() + timeout
        while self.terminal.process.poll() is None or self._more(0):
            assert time.monotonic() < deadline, f"it does not end: {self.text}"
            if self._more(0.1):
                try:
                    self._feed()
                except OSError:
                    break
        return self.terminal.process.wait(timeout)


def _text(shown: bytes) -> str:
    return shown.decode(errors="replace").replace("\r\n", "\n")


@contextmanager
def terminal(command: Sequence[str], env: Mapping[str, str]) -> Iterator[Terminal]:
    """Run the command at a terminal; it is killed at the end, if it still runs."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        command,
        env={**os.environ, **env},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(theirs, termios.TIOCSCTTY, 0),  # noqa: PLW1509  (nothing else runs yet)
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        os.close(ours)

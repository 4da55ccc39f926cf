"""Keys as they are typed, also through a launcher.

A terminal gives whole lines, of 4,095 bytes at most, and makes a signal of Ctrl-C, which under mpirun ends the launcher and
with it the run. Here it is set to give each key at once, Ctrl-C among them. That is a matter of the terminal alone, so it
works through a launcher too: rank 0 sets the terminal that the launcher reads (it is on the same machine), and the launcher
passes on what it reads there.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import termios
from collections.abc import Callable
from pathlib import Path

from tpimpi.system.terminal import STDIN, Input, in_foreground, launcher_stream

CTRL_C = b"\x03"
PASTE_BEGINS, PASTE_ENDS = b"\x1b[200~", b"\x1b[201~"  # what a terminal with bracketed paste puts around what is pasted
_ESCAPE = b"\x1b"
_NONE = b"\x00"  # a control character that the terminal does not have
_GUARD = 'cat >/dev/null; stty "$1" <&1'
INTERRUPTS_TO_LEAVE = 3  # Ctrl-C so often in an answer ends the run, if the answer has not ended


class CharacterTerminal:
    """The terminal of standard input, set to give keys at once. `descriptor` is open for reading and writing.

    However this process ends, the terminal is set back: a shell of a few lines waits for the end, and does it.
    """

    def __init__(self) -> None:
        """Raises OSError or termios.error where the terminal cannot be set, or is somebody else's as we run in the
        background."""
        stream = None if os.isatty(STDIN) else launcher_stream(STDIN)
        if not in_foreground(Path("/proc/self") if stream is None else stream.parent.parent):
            raise OSError("in the background")
        self.descriptor = os.open(f"/proc/self/fd/{STDIN}" if stream is None else stream, os.O_RDWR | os.O_NOCTTY)
        self._guard: subprocess.Popen[bytes] | None = None
        try:
            # Under a launcher we are in the background, where the system stops who changes a terminal.
            signal.signal(signal.SIGTTOU, signal.SIG_IGN)
            self._before = termios.tcgetattr(self.descriptor)
            self._guard = self._start_guard()
            iflag, oflag, cflag, lflag, ispeed, ospeed, characters = termios.tcgetattr(self.descriptor)
            iflag &= ~(termios.IXON | termios.IXOFF | termios.ICRNL | termios.INLCR | termios.IGNCR)
            lflag &= ~(termios.ICANON | termios.ECHO | termios.IEXTEN)
            for name, value in (
                (termios.VINTR, _NONE),
                (termios.VSUSP, _NONE),
                (termios.VMIN, b"\x01"),
                (termios.VTIME, b"\x00"),
            ):
                characters[name] = value
            attributes = [iflag, oflag, cflag, lflag, ispeed, ospeed, characters]
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, attributes)
        except BaseException:
            self.close()
            raise

    def _start_guard(self) -> subprocess.Popen[bytes] | None:
        """None where there is no stty or shell."""
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            found = subprocess.run(["stty", "-g"], stdin=self.descriptor, capture_output=True, check=True, text=True)
            return subprocess.Popen(
                ["sh", "-c", _GUARD, "sh", found.stdout.strip()],
                stdin=subprocess.PIPE,
                stdout=self.descriptor,
                stderr=subprocess.DEVNULL,
                start_new_session=True,  # so that what ends our processes does not end it
            )
        return None

    def close(self) -> None:
        """Set the terminal back."""
        if self.descriptor < 0:
            return
        if self._guard is not None:
            self._guard.kill()
            self._guard.wait()
            if self._guard.stdin is not None:
                self._guard.stdin.close()
        with contextlib.suppress(termios.error, OSError, AttributeError):
            termios.tcsetattr(self.descriptor, termios.TCSADRAIN, self._before)
        os.close(self.descriptor)
        self.descriptor = -1


class Keyboard:
    """Gives keys to `sink` as they come, b"" at the end; but in an answer it takes Ctrl-C, with what was typed before it.

    `answering` says whether an answer is being made, `interrupts` how often Ctrl-C was pressed in it.
    """

    def __init__(self, keys: Input, sink: Callable[[bytes], None]) -> None:
        self._sink, self._pasting = sink, False
        self.answering, self.interrupts = False, 0
        keys.hand_over(self._take)

    def begin_answer(self) -> None:
        self.answering, self.interrupts = True, 0

    def end_answer(self) -> None:
        self.answering = False

    def _take(self, keys: bytes) -> None:
        if self.answering and CTRL_C in keys:
            self.interrupts += keys.count(CTRL_C)
            if self.interrupts >= INTERRUPTS_TO_LEAVE:
                os.kill(os.getpid(), signal.SIGINT)
            keys = keys.rpartition(CTRL_C)[2]
            if not keys:
                return
        self._sink(self._as_paste(keys))

    def _as_paste(self, keys: bytes) -> bytes:
        """Several lines that came together are marked as pasted, where the terminal does not do that."""
        begins, ends = keys.rfind(PASTE_BEGINS), keys.rfind(PASTE_ENDS)
        was_pasting = self._pasting
        if begins != ends:  # else there is neither
            self._pasting = begins > ends
        lines = keys.rstrip(b"\r\n")
        if was_pasting or _ESCAPE in keys or CTRL_C in keys or not (b"\r" in lines or b"\n" in lines):
            return keys
        return PASTE_BEGINS + lines + PASTE_ENDS + (b"\r" if len(lines) < len(keys) else b"")

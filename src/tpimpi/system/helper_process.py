"""Processes that are there for one thing: to try what may end a whole process or take all memory, or to hold what is needed
for a moment.

`HelperProcess` is the side of the run: it starts the process, asks, and tells how the process ended where it did. `serve` is
the other side, the main function of that process. They speak over pipes: a length (8 bytes, little-endian), and so many
bytes; an empty answer, before any request, says that the process has begun. It ends where its standard input does, so it
outlives nobody; one that is asked nothing for a while ends by itself.
"""

from __future__ import annotations

import contextlib
import math
import os
import resource
import select
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tpimpi.errors import shorten
from tpimpi.system.core_dumps import turn_off_core_dumps
from tpimpi.system.launcher import environment_without_launcher

IDLE_S = 600.0  # after which a process that is asked nothing ends
MAX_REASON_CHARACTERS = 200
_LENGTH = struct.Struct("<Q")
_MAX_SAID_BYTES = 1 << 14
_FROM_OUTSIDE = (signal.SIGKILL, signal.SIGTERM)  # by a system that is short of memory, or by who administers it
# One thread: so many cores as there may be would each map memory of their own.
_VARIABLES = {
    "RAYON_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "MALLOC_ARENA_MAX": "1",
    "RUST_BACKTRACE": "0",
}
_NO_REASON = ("note: ", "skipping backtrace printing ")  # what Rust says behind a reason
_STATM = Path("/proc/self/statm")


class EndedError(Exception):
    """What became of the process instead of an answer: "was ended by SIGABRT (…)", "took more than 5 s"."""

    def __init__(self, how: str, *, from_outside: str = "", busy: bool = False) -> None:
        """`from_outside` is the name of the signal where the system ended it, not what was tried; `busy` says that it may
        have been the machine's fault: the process did not get its time of a processor, or had just ended by itself."""
        super().__init__(how)
        self.from_outside, self.busy = from_outside, busy


class HelperProcess:
    """A process that does one thing after another; where one has ended it, the next gets another."""

    def __init__(self, module: str) -> None:
        """`module` is the one whose main function is `serve`."""
        self._module = module
        self._process: subprocess.Popen[bytes] | None = None
        self._said = b""  # the end of what it has written to standard error for this request

    def start(self, max_wait_s: float) -> bool:
        """As `say` does where there is none yet. Returns False where there can be no such process."""
        return (self._process or self._start(max_wait_s)) is not None

    def say(self, request: bytes, max_wait_s: float) -> bool:
        """Give it a request; returns False where there can be no such process. `hear` has to follow."""
        for _ in range(2):
            process = self._process or self._start(max_wait_s)
            if process is None:
                return False
            assert process.stdin is not None
            self._hear_errors(process)
            self._said = b""
            with contextlib.suppress(BrokenPipeError):  # then `hear` tells how it ended
                process.stdin.write(_LENGTH.pack(len(request)))
                process.stdin.write(request)
                process.stdin.flush()
                return True
            if process.wait() != 0:
                return True
            self.close()  # it had nothing to do for so long that it has ended
        return False

    def hear(self, *, max_wait_s: float, max_cpu_s: int = 0) -> bytes:
        """Its answer. `max_cpu_s` is what it was given of a processor, for the message. Raises EndedError."""
        process = self._process
        assert process is not None
        try:
            return self._answer(process, max_wait_s)
        except TimeoutError:
            self.close()
            raise EndedError(f"took more than {max_wait_s:.0f} s", busy=True) from None
        except (BrokenPipeError, EOFError):
            raise self._ending(process, max_cpu_s) from None

    def close(self) -> None:
        """End the process."""
        process, self._process = self._process, None
        if process is None:
            return
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout, process.stderr):
            assert pipe is not None
            with contextlib.suppress(OSError):  # what it did not read any more
                pipe.close()

    def _start(self, max_wait_s: float) -> subprocess.Popen[bytes] | None:
        """None where there is no room for another process, or it does not begin."""
        with contextlib.suppress(OSError, EOFError):
            self._process = subprocess.Popen(
                # -P: the current folder may be that of a model, and has no say in what is imported.
                [sys.executable, "-P", "-m", self._module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env={**environment_without_launcher(), **_VARIABLES},
                start_new_session=True,  # the signals of launcher and terminal are for rank 0
            )
            assert self._process.stderr is not None
            os.set_blocking(self._process.stderr.fileno(), False)
            self._answer(self._process, max_wait_s)
            return self._process
        self.close()
        return None

    def _answer(self, process: subprocess.Popen[bytes], max_wait_s: float) -> bytes:
        """Raises EOFError, TimeoutError."""
        deadline = time.monotonic() + max_wait_s
        (nbytes,) = _LENGTH.unpack(self._read(process, _LENGTH.size, deadline))
        return self._read(process, nbytes, deadline)

    def _read(self, process: subprocess.Popen[bytes], nbytes: int, deadline: float) -> bytes:
        assert process.stdout is not None and process.stderr is not None
        data, answers, errors = b"", process.stdout.fileno(), process.stderr.fileno()
        heard = [answers, errors]
        while len(data) < nbytes:
            ready = select.select(heard, [], [], max(0.0, deadline - time.monotonic()))[0]
            if not ready:
                raise TimeoutError
            if errors in ready and not self._hear_errors(process):  # a full pipe would stop it
                heard.remove(errors)
            if answers in ready:
                piece = os.read(answers, nbytes - len(data))
                if not piece:
                    raise EOFError
                data += piece
        return data

    def _hear_errors(self, process: subprocess.Popen[bytes]) -> bool:
        """Take in what it has written to standard error; returns whether there may be more."""
        assert process.stderr is not None
        with contextlib.suppress(BlockingIOError):
            while piece := os.read(process.stderr.fileno(), 1 << 16):
                self._said = (self._said + piece)[-_MAX_SAID_BYTES:]
            return False
        return True

    def _ending(self, process: subprocess.Popen[bytes], max_cpu_s: int) -> EndedError:
        """How it has ended."""
        code = process.wait()
        self._hear_errors(process)
        said = self._said.decode(errors="replace")
        self.close()
        if code == -signal.SIGXCPU:
            return EndedError(f"took more than {max_cpu_s} s")
        lines = [line for line in said.splitlines() if line.strip() and not line.startswith(_NO_REASON)]
        reason = f" ({shorten(lines[-1].strip(), MAX_REASON_CHARACTERS)})" if lines else ""
        name = signal.Signals(-code).name if code < 0 else ""
        how = f"was ended by {name}" if code < 0 else f"ended with exit code {code}"
        return EndedError(how + reason, from_outside=name if -code in _FROM_OUTSIDE else "", busy=code == 0)


# In the process


def serve(answer: Callable[[bytes], str], *, idle_s: float = IDLE_S) -> None:
    """Answer requests until there are no more, or none for `idle_s`."""
    turn_off_core_dumps()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints is no answer
    answers.write(_LENGTH.pack(0))
    answers.flush()
    requests = sys.stdin.buffer
    while select.select([requests], [], [], idle_s)[0] and (head := requests.read(_LENGTH.size)):
        (nbytes,) = _LENGTH.unpack(head)
        answered = answer(requests.read(nbytes)).encode("utf-8", "backslashreplace")
        answers.write(_LENGTH.pack(len(answered)) + answered)
        answers.flush()


def limit_cpu(seconds: int) -> None:
    """From now on this process has so many seconds of a processor, and then SIGXCPU."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    _limit(resource.RLIMIT_CPU, math.ceil(used.ru_utime + used.ru_stime) + seconds)


def limit_memory(nbytes: int) -> None:
    """From now on this process can map so much more than it has."""
    mapped = int(_STATM.read_text().split()[0]) * resource.getpagesize() if _STATM.exists() else 0
    _limit(resource.RLIMIT_AS, mapped + nbytes)


def _limit(what: int, limit: int) -> None:
    _, hard = resource.getrlimit(what)
    resource.setrlimit(what, (limit if hard == resource.RLIM_INFINITY else min(limit, hard), hard))


def grave(error: BaseException, what: str) -> str:
    """What a run has to be kept from, or "": want of memory, of what is tried, `what`; and panics of Rust, which are no
    Exception, and of which two at once end a process."""
    if isinstance(error, MemoryError):
        return f"takes more memory than {what} should"
    return "" if isinstance(error, Exception) else str(error)

"""This process: its streams and signals, and how an error becomes one line and an exit code.

Exit codes: 0 done, 2 bad input, 1 anything else, 128 and the signal's number where a signal ended us.
"""

from __future__ import annotations

import contextlib
import io
import os
import select
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator

from tpimpi.errors import LostError, StorageError, as_ours
from tpimpi.star import RELAY_TIME_S, WAIT_FOR_HUB_REPORT_S, Star, launched_rank
from tpimpi.system.core_dumps import wants_traceback
from tpimpi.system.files import remove_unfinished
from tpimpi.system.terminal import STDERR, STDOUT, Input, leave_bar, open_past_the_launcher

STOPPING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
# Open MPI's launcher kills ranks half a second after it got one of these; it passes this one on, and leaves them time.
ENDING_SIGNALS = (*STOPPING_SIGNALS, signal.SIGUSR1)
LAST_LINE_TIME_S = 0.1  # that rank 0 has to say its last line; MPICH's launcher kills all ranks once it sees one end


class Job:
    """This process's part in a run: its star once it has joined, and whether other ranks wait for this one."""

    star: Star | None = None
    input: Input | None = None  # standard input, where it is being read already
    _awaited = False

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments
        self.began = time.monotonic()
        self.at_end = contextlib.ExitStack()  # what is to be closed, also after an error

    @contextlib.contextmanager
    def others_waiting(self) -> Iterator[None]:
        """Inside, other ranks wait for this one: an error that leaves it ends the job on all of them."""
        self._awaited = self.star is not None and self.star.rank.size > 1
        yield
        self._awaited = False

    def seconds(self) -> float:
        """Since this process began."""
        return time.monotonic() - self.began

    def name(self) -> str:
        """What this process's lines begin with."""
        if self.star is not None and self.star.rank.size > 1:
            return str(self.star.rank)
        return "tpimpi"

    def leave(self, code: int) -> None:
        """Leave the other ranks: in order, or by ending the job on all of them where they wait for us."""
        if self.star is None:
            return
        if self._awaited:
            time.sleep(RELAY_TIME_S)
            self.star.abort(code)
        self.star.close(failed=code != 0)


def guarded(command: Callable[[Job], int], arguments: list[str]) -> int:
    """The exit code of `command`. What it raises is said in one line, and ends the job where other ranks wait for us."""
    job = Job(arguments)
    try:
        with job.at_end:
            code = _until_exit(command, job)
        sys.stdout.flush()
    except BrokenPipeError:
        code = 1  # whoever read our output has gone; there is nobody to tell
        _drop_unwritten()
    except Exception as error:
        if isinstance(error, LostError) and job.star is not None and not job.star.rank.is_hub:
            time.sleep(WAIT_FOR_HUB_REPORT_S)  # rank 0 or the launcher knows better who is gone, and ends us meanwhile
        ours = as_ours(error)
        code = ours.exit_code
        # Where standard error cannot be written either, the exit code says it alone.
        with contextlib.suppress(OSError, StorageError):
            if wants_traceback():
                traceback.print_exc()
            say(f"{ours.where or job.name()}: {ours}")
        _drop_unwritten()
    job.leave(code)
    return code


def _until_exit(command: Callable[[Job], int], job: Job) -> int:
    """Run `command`; a parser that has printed its help leaves by SystemExit, which is an exit code like another."""
    try:
        return command(job)
    except SystemExit as left:
        return left.code if isinstance(left.code, int) else int(left.code is not None)


def _drop_unwritten() -> None:
    """Write what is left in the streams, or drop it where that fails: Python would try again at its end, and say so."""
    for stream, number in ((sys.stdout, STDOUT), (sys.stderr, STDERR)):
        try:
            stream.flush()
        except (OSError, StorageError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), number)


class Stdout(io.TextIOWrapper):
    """Standard output, which says in one line of ours why it cannot be written. Raises StorageError, BrokenPipeError.

    `what` is being written, for the message.
    """

    what = ""

    def write(self, text: str) -> int:
        with self._in_words():
            return super().write(text)

    def flush(self) -> None:
        with self._in_words():
            super().flush()

    @contextlib.contextmanager
    def _in_words(self) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise
        except OSError as error:  # which argparse would drop
            raise StorageError(
                f"cannot write {self.what}to standard output: {error.strerror}; write it elsewhere"
            ) from error


def set_up_streams() -> None:
    """UTF-8 on both output streams, and each line in one write: the launcher would put other ranks' lines within it."""
    if type(sys.stdout) is io.TextIOWrapper:
        sys.stdout = Stdout(sys.stdout.detach())
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # also with PYTHONUNBUFFERED
            stream.reconfigure(encoding="utf-8", errors="replace", line_buffering=True, write_through=False)


def say(line: str | None) -> None:
    """A line on stderr, where there is one to say, after what stdout has so far."""
    if line:
        with contextlib.suppress(OSError, StorageError):  # said where the answer is written
            sys.stdout.flush()
        print(line, file=sys.stderr, flush=True)


def print_answer(text: str) -> None:
    """Text of an answer on stdout, at once. Raises StorageError where it cannot be written."""
    if isinstance(sys.stdout, Stdout):
        sys.stdout.what = "the answer "
    sys.stdout.write(text)
    sys.stdout.flush()


# Signals


def leave_on_signals(last_line: Callable[[], str | None] | None = None) -> None:
    """Ctrl-C, or the launcher's word to stop: leave at once. What was printed was flushed as it came, and what is no use
    half-written is removed. `last_line` is said on stderr then, where there is one to say, and stderr takes it at once; past
    the launcher, which now drops what it gets.

    No exception is raised for that: wherever the main thread is just now, in a callback of a library say, it could be
    dropped there.
    """
    left = threading.Lock()
    past = open_past_the_launcher(STDERR) if last_line else None
    stderr = STDERR if past is None else past

    def leave(number: int, frame: object) -> None:
        if not left.acquire(blocking=False):
            return  # the other thread is leaving
        leave_bar()
        if launched_rank() not in (None, 0):
            time.sleep(LAST_LINE_TIME_S)
        line = last_line() if last_line else None
        with contextlib.suppress(OSError, ValueError):
            if line and select.select([], [stderr], [], 0)[1]:
                os.write(stderr, f"\n{line}\n".encode(errors="replace"))
        remove_unfinished()
        os._exit(128 + number)

    for number in STOPPING_SIGNALS:
        signal.signal(number, leave)
    if last_line:
        _also_inside_libraries(leave)


def _also_inside_libraries(leave: Callable[[int, object], None]) -> None:
    """Let `leave` be called at once also while the main thread is in a library's call: Python alone would wait for its end.
    Under a load that can be longer than the quarter of a second between the SIGTERM of Open MPI's launcher and its SIGKILL.
    """

    def take(number: int) -> None:
        if signal.getsignal(number) is leave:  # and not somebody else's for a while
            leave(number, None)

    _take_in_a_thread(take)


def _take_in_a_thread(take: Callable[[int], None]) -> None:
    """Let a thread of its own take the number of each signal that comes and has a handler of Python's."""
    came, arrives = os.pipe()
    os.set_blocking(arrives, False)
    signal.set_wakeup_fd(arrives, warn_on_full_buffer=False)

    def wait() -> None:
        while number := os.read(came, 1):
            with contextlib.suppress(Exception):  # the next signal is to be heard too
                take(number[0])

    threading.Thread(target=wait, name="signals", daemon=True).start()


def leave_signals_to_rank_0() -> None:
    """Another rank of a server: a signal that the launcher gives to all is for rank 0, which ends the run in order."""
    for number in ENDING_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def call_on_signals(action: Callable[[], None]) -> None:
    """Ctrl-C, or the launcher's word to stop: `action`, in the main thread, sees to it that the run ends. It may come in the
    midst of anything, so it must not wait for a lock that this thread may have; `call_aside_on_signals` is for what does."""
    for number in ENDING_SIGNALS:
        signal.signal(number, lambda number, frame: action())


def call_aside_on_signals(action: Callable[[], None]) -> None:
    """As `call_on_signals`, but `action` is called in a thread of its own."""
    _take_in_a_thread(lambda number: action() if number in ENDING_SIGNALS else None)
    for number in ENDING_SIGNALS:
        signal.signal(number, lambda number, frame: None)

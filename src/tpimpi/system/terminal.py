"""What the user sees and types, also through a launcher: is there a terminal, has the input ended, how far is it.

Under mpirun a rank's own streams are pipes. Rank 0 runs on the machine where mpirun was started, so the launcher's streams
are looked at through /proc. Open MPI relays output by whole lines, at which an answer would not stream, and does not
pass on the end of its standard input, at which a run that reads prompts from a pipe would wait for ever.
"""

from __future__ import annotations

import array
import contextlib
import ctypes
import fcntl
import io
import os
import queue
import select
import stat
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import psutil

from tpimpi.system.launcher import DAEMONS, LAUNCHERS, launcher_commands

STDIN, STDOUT, STDERR = 0, 1, 2
MAX_LINE_BYTES = 4 << 20  # bytes of a prompt
_PIPE_COLUMNS = 10_000  # of a table that no terminal shows
_READ_BYTES = 65536  # bytes read at a time
_LAUNCHER_CHECK_INTERVAL_S = 0.2  # seconds between two looks at the launcher's input
_LATE_INPUT_S = 1.0  # seconds in which what the launcher has read may still arrive
_BURST_S = 0.005  # what comes within it came together: no hand types so fast
_PROGRESS_INTERVAL_S = 5.0  # seconds between two lines of progress


def repair_streams() -> None:
    """Open each standard stream that is closed on /dev/null: a file opened later would else get its number."""
    for number, name in ((STDIN, "stdin"), (STDOUT, "stdout"), (STDERR, "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_RDWR), number)
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "r" if number == STDIN else "w", encoding="utf-8", closefd=False))  # noqa: SIM115


def write_past_the_launcher(*, any_launcher: bool = False) -> None:
    """Rank 0 under Open MPI, or `any_launcher`: write to the terminal or pipe that mpirun writes to, so that text appears as
    it comes. Under another, or where mpirun writes to a file: as `keep_order`."""
    keep_order()
    if not any_launcher and "OMPI_COMM_WORLD_RANK" not in os.environ:
        return
    for number in (STDOUT, STDERR):
        if (fd := open_past_the_launcher(number)) is not None:
            os.dup(number)  # kept: where a rank's output ends, the launcher ends its input too
            os.dup2(fd, number)
            os.close(fd)


def open_past_the_launcher(number: int) -> int | None:
    """A descriptor of the terminal or pipe to which a launcher on this host writes what comes by our stream of that number;
    None where there is no such. A regular file is left to the launcher, which knows how far it has written."""
    stream = launcher_stream(number)
    with contextlib.suppress(OSError):
        if stream is not None and (stat.S_ISFIFO(stream.stat().st_mode) or _names_terminal(stream)):
            return os.open(stream, os.O_WRONLY | os.O_NOCTTY)
    return None


def keep_order() -> None:
    """Where the launcher writes both of its outputs to one file or pipe: give it all by stdout, since it reads a rank's
    stdout and stderr as it likes, and lines of one would come before lines of the other that were written earlier.

    Not where an option of the launcher (Open MPI's --output) says where each of them goes, nor where ours are files: they
    are not the launcher's then.
    """
    if any(stat.S_ISREG(os.fstat(number).st_mode) for number in (STDOUT, STDERR)):
        return
    out, err = launcher_stream(STDOUT), launcher_stream(STDERR)
    if out is None or err is None or not all(_is_read_by_the_launcher(number) for number in (STDOUT, STDERR)):
        return
    with contextlib.suppress(OSError):
        if not os.path.samestat(out.stat(), err.stat()) or stat.S_ISCHR(out.stat().st_mode):
            return
        if any("output" in word for words, _ in launcher_commands() for word in words if word.startswith("-")):
            return
        os.dup(STDERR)  # kept: where a rank's output ends, the launcher ends its input too
        os.dup2(STDOUT, STDERR)


def _is_read_by_the_launcher(number: int) -> bool:
    """Whether our stream of that number goes to the launcher or its daemon, and not what a program between us and it
    has put in its place."""
    if os.isatty(number):  # Open MPI gives a rank's stdout a terminal of its own
        return True
    try:
        pipe = str(Path(f"/proc/self/fd/{number}").readlink())
        above = [one.pid for one in psutil.Process().parents() if one.name() in (*LAUNCHERS, *DAEMONS)]
        return pipe.startswith("pipe:") and any(
            str(entry.readlink()) == pipe for pid in above[:1] for entry in Path(f"/proc/{pid}/fd").iterdir()
        )
    except (psutil.Error, OSError):
        return False


def launcher_stream(number: int) -> Path | None:
    """The launcher's stream of that number on this host, as /proc shows it; None where there is no such launcher."""
    try:
        for process in psutil.Process().parents():
            if process.name() in LAUNCHERS and Path(f"/proc/{process.pid}/fd").is_dir():
                return Path(f"/proc/{process.pid}/fd/{number}")
    except (psutil.Error, OSError):
        pass
    return None


def _names_terminal(stream: Path) -> bool:
    try:
        return str(stream.readlink()).startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def is_terminal(number: int) -> bool:
    """Whether the user's end of stream `number` is a terminal: ours, or that of the launcher that relays it."""
    if os.isatty(number):
        return True
    stream = launcher_stream(number)
    return stream is not None and _names_terminal(stream)


def has_input() -> bool:
    """Whether standard input is a file or a pipe with something left to read. Takes nothing from it."""
    try:
        info = os.fstat(STDIN)
        if stat.S_ISREG(info.st_mode):
            return os.lseek(STDIN, 0, os.SEEK_CUR) < info.st_size
        if stat.S_ISFIFO(info.st_mode):
            waiting = array.array("i", [0])
            fcntl.ioctl(STDIN, termios.FIONREAD, waiting)
            return waiting[0] > 0
    except OSError:
        pass
    return False


# Has the launcher's input ended?


def _has_ended(stream: Path) -> bool:
    """Whether nothing more can come from the launcher's input. Takes nothing from it."""
    try:
        kind = stream.stat().st_mode
        if stat.S_ISREG(kind):
            info = (stream.parent.parent / "fdinfo" / stream.name).read_text(encoding="ascii")
            position = next(int(line.split()[1]) for line in info.splitlines() if line.startswith("pos:"))
            return position >= stream.stat().st_size
        if stat.S_ISCHR(kind):
            return str(stream.readlink()) == os.devnull or (_names_terminal(stream) and _is_watched_no_more(stream))
        return stat.S_ISFIFO(kind) and (_pipe_has_ended(stream) or _writes_to_itself(stream))
    except FileNotFoundError:
        return True  # the launcher closed it
    except (OSError, ValueError, StopIteration):
        return False


def _pipe_has_ended(stream: Path) -> bool:
    # tee(2) copies from a pipe without taking: it gives 0 only where the pipe is empty and nobody has it open to write.
    nonblock = 2
    source = os.open(stream, os.O_RDONLY | os.O_NONBLOCK)
    read_end, write_end = os.pipe()
    try:
        return bool(ctypes.CDLL(None, use_errno=True).tee(source, write_end, ctypes.c_size_t(1), nonblock) == 0)
    finally:
        for fd in (source, read_end, write_end):
            os.close(fd)


def _writes_to_itself(stream: Path) -> bool:
    """Started with its input closed, the launcher has some pipe of its own in that place."""
    name = stream.readlink()
    others = [fd for fd in stream.parent.iterdir() if fd.name != stream.name]
    return any(fd.readlink() == name for fd in others if fd.is_symlink())


def _is_watched_no_more(stream: Path) -> bool:
    """At Ctrl-D Open MPI stops polling its terminal, and that is all it does."""
    launcher = stream.parent.parent
    if not in_foreground(launcher):
        return False  # in the background it does not poll either, but may come back
    watched = [line for info in (launcher / "fdinfo").iterdir() for line in info.read_text().splitlines()]
    watched = [line for line in watched if line.startswith("tfd:")]
    return bool(watched) and not any(line.split()[1] == stream.name for line in watched)


def in_foreground(process: Path) -> bool:
    """Whether a process, by its folder in /proc, is one that its terminal gives keys to. Raises OSError."""
    fields = (process / "stat").read_text().rpartition(")")[2].split()
    group, foreground_group = fields[2], fields[5]
    return group == foreground_group


class Input:
    """Standard input, read on a thread of its own from the start: MPICH ends a job whose rank 0 leaves 64 KB lying."""

    received = False  # something that is no terminal's

    def __init__(self) -> None:
        self._pieces: queue.Queue[bytes] = queue.Queue(MAX_LINE_BYTES // _READ_BYTES)
        self._take: Callable[[bytes], None] | None = None
        self._order = threading.Lock()  # of what `_take` gets
        threading.Thread(target=self._read, name="tpimpi-input", daemon=True).start()

    def _read(self) -> None:
        try:
            while data := os.read(STDIN, _READ_BYTES):
                self.received = self.received or not is_terminal(STDIN)
                while self._take is not None and len(data) < MAX_LINE_BYTES:
                    more = os.read(STDIN, _READ_BYTES) if select.select([STDIN], [], [], _BURST_S)[0] else b""
                    if not more:
                        break
                    data += more
                self._give(data)
        except OSError:
            pass  # it cannot be read, so there is none
        self._give(b"")

    def _give(self, data: bytes) -> None:
        while self._take is None:
            with contextlib.suppress(queue.Full):
                self._pieces.put(data, timeout=_LAUNCHER_CHECK_INTERVAL_S)
                break
        else:
            self._pass_on(data)
            return
        if self._take is not None:  # since just now
            self._pass_on()

    def _pass_on(self, *last: bytes) -> None:
        with self._order:
            assert self._take is not None
            with contextlib.suppress(queue.Empty):
                while True:
                    self._take(self._pieces.get_nowait())
            for data in last:
                self._take(data)

    def hand_over(self, take: Callable[[bytes], None]) -> None:
        """From now on `take` gets what comes, on the thread that reads, as soon as it is there; b"" at its end."""
        self._take = take
        self._pass_on()

    def lines(self, prompt: str = "", *, together: bool = False) -> Iterator[str]:
        """Lines as they come, decoded as UTF-8, without their ends; `prompt` is shown on stderr before each. With `together`
        lines that come within a few milliseconds are one, with line ends in it.

        What is beyond MAX_LINE_BYTES bytes of a line is dropped: no model has room for it. Ends where the input does, also
        where the launcher does not say so.
        """
        launcher = launcher_stream(STDIN)
        held, ended_at = io.BytesIO(), None
        print(prompt, end="", file=sys.stderr, flush=True)
        while True:
            try:
                data = self._pieces.get(timeout=_LAUNCHER_CHECK_INTERVAL_S)
            except queue.Empty:
                if launcher is not None and ended_at is None and _has_ended(launcher):
                    ended_at = time.monotonic()
                if ended_at is not None and time.monotonic() - ended_at > _LATE_INPUT_S:
                    break
                continue
            data, ended = self._with_what_follows(data) if together else (data, not data)
            if not data and ended:
                break
            ended_at = None
            pieces = data.split(b"\n")
            if together and len(pieces) > 2:
                pieces = [b"\n".join(pieces[:-1]), pieces[-1]]
            piece, *following = pieces
            held.write(piece[: MAX_LINE_BYTES - held.tell()])
            for piece in following:
                yield _text(held.getvalue())
                print(prompt, end="", file=sys.stderr, flush=True)
                held = io.BytesIO()
                held.write(piece)
            if ended:
                break
        if held.tell():
            yield _text(held.getvalue())
        elif prompt:
            print(file=sys.stderr)

    def _with_what_follows(self, data: bytes) -> tuple[bytes, bool]:
        """What came together with it too; and whether that was the end."""
        while data:
            try:
                more = self._pieces.get(timeout=_BURST_S)
            except queue.Empty:
                return data, False
            if not more:
                return data, True
            data += more
        return data, True


def _text(line: bytes) -> str:
    return line.removeprefix(b"\xef\xbb\xbf").decode("utf-8", "surrogateescape").rstrip("\r")


def print_table(table: Any, width: int, stream: TextIO | None = None) -> None:
    """A rich table on `stream` (standard output): at a terminal `width` columns wide, else as wide as it is, so that what
    reads it gets whole lines. Nothing in it is markup, nor a command to the terminal."""
    from rich.console import Console

    file = sys.stdout if stream is None else stream
    number = STDOUT if file is sys.stdout else STDERR
    columns = width if is_terminal(number) else _PIPE_COLUMNS
    Console(file=file, width=columns, highlight=False, markup=False, emoji=False, color_system=None).print(table)


_progress_watcher: Callable[[str, int, int], None] | None = None
_bars = 0  # that stand at the terminal now
_NO_BAR = b"\r\x1b[2K\x1b[?25h"  # nothing in the line, and the cursor to be seen: ECMA-48's EL, DECTCEM


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far `what` is, on stderr: a bar at a terminal, else a line now and then. Yields update(done, total). Whoever
    watches (see `watch_progress`) is told too."""
    with _shown_progress(what, quiet=quiet) as shown:
        watcher = _progress_watcher
        if watcher is None:
            yield shown
            return

        def update(done: int, total: int) -> None:
            shown(done, total)
            watcher(what, done, total)

        yield update


def watch_progress(watcher: Callable[[str, int, int], None] | None) -> None:
    """From now on `watcher` is told what is done, how far it is and how much it is in all; None: nobody."""
    global _progress_watcher
    _progress_watcher = watcher


def leave_bar() -> None:
    """For who is about to end the process, wherever it is just now: at a terminal with a bar the cursor is hidden."""
    if _bars and os.environ.get("TERM") != "dumb":
        with contextlib.suppress(OSError):
            os.write(STDERR, _NO_BAR)


@contextlib.contextmanager
def _shown_progress(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    global _bars
    if quiet:
        yield lambda done, total: None
    elif is_terminal(STDERR):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr, force_terminal=True)
        columns = (TextColumn(what, markup=False), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            _bars += 1
            try:
                yield lambda done, total: bar.update(task, completed=done, total=total)
            finally:
                _bars -= 1
    else:
        said = float("-inf")

        def update(done: int, total: int) -> None:
            nonlocal said
            if total and (time.monotonic() - said > _PROGRESS_INTERVAL_S or done == total):
                said = time.monotonic()
                with contextlib.suppress(OSError):  # nobody reads it; the work goes on
                    share = done * 100 // max(total, 1)
                    print(f"{what}: {share} % of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

        yield update

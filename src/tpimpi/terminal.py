"""What the user sees and types through the launcher: is there a terminal, has the input ended, how far is it.

Under mpirun a rank's own streams are pipes, so the launcher's are looked at instead, through /proc. Open MPI does not pass
on the end of its standard input; without this a run that reads prompts from a pipe would wait for ever.
"""

from __future__ import annotations

import ctypes
import os
import select
import stat
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

LAUNCHERS = ("mpirun", "mpiexec", "prterun", "prte", "orterun", "srun", "mpiexec.hydra", "ompirun_wrapper")
STDIN, STDERR = 0, 2
_LOOK_EVERY = 0.2  # seconds between two looks at the launcher's input
_GRACE = 1.0  # seconds in which what the launcher has read may still arrive


def _launcher_stream(number: int) -> Path | None:
    """The launcher's stream of that number on this host, as /proc shows it; None where there is no such launcher."""
    try:
        for process in psutil.Process().parents():
            if process.name() in LAUNCHERS and Path(f"/proc/{process.pid}/fd").is_dir():
                return Path(f"/proc/{process.pid}/fd/{number}")
    except psutil.Error:
        pass
    return None


def is_terminal(number: int) -> bool:
    """Whether the user's end of stream `number` is a terminal: ours, or that of the launcher that relays it."""
    if os.isatty(number):
        return True
    stream = _launcher_stream(number)
    try:
        return stream is not None and str(stream.readlink()).startswith(("/dev/pts/", "/dev/tty"))
    except OSError:
        return False


def _has_ended(stream: Path) -> bool:
    """Whether nothing more can come from the launcher's input. Takes nothing from it."""
    try:
        kind = stream.stat().st_mode
    except FileNotFoundError:
        return True  # the launcher closed it
    except OSError:
        return False
    if stat.S_ISREG(kind):
        info = (stream.parent.parent / "fdinfo" / stream.name).read_text(encoding="ascii")
        position = next(int(line.split()[1]) for line in info.splitlines() if line.startswith("pos:"))
        return position >= stream.stat().st_size
    if stat.S_ISCHR(kind):
        return str(stream.readlink()) == "/dev/null"
    if stat.S_ISFIFO(kind):
        return _pipe_has_ended(stream)
    return False


def _pipe_has_ended(stream: Path) -> bool:
    # tee(2) copies from a pipe without taking: it gives 0 only where the pipe is empty and nobody has it open to write.
    nonblock = 2
    try:
        source = os.open(stream, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return False
    read_end, write_end = os.pipe()
    try:
        return ctypes.CDLL(None, use_errno=True).tee(source, write_end, ctypes.c_size_t(1), nonblock) == 0
    finally:
        for fd in (source, read_end, write_end):
            os.close(fd)


def input_lines(prompt: str, idle: Callable[[], None] = lambda: None) -> Iterator[str]:
    """Lines of standard input as they come, decoded as UTF-8, without their ends; `prompt` is shown at a terminal.

    Ends where the input does, also where the launcher does not say so. `idle` is called while nothing comes.
    """
    launcher = _launcher_stream(STDIN)
    shown = is_terminal(STDIN) and is_terminal(STDERR)
    held, ended_at = b"", None
    if shown:
        print(prompt, end="", file=sys.stderr, flush=True)
    while True:
        ready, _, _ = select.select([STDIN], [], [], _LOOK_EVERY)
        if ready:
            data = os.read(STDIN, 65536)
            held += data
            *lines, held = held.split(b"\n")
            for line in lines:
                yield line.decode("utf-8", "surrogateescape").rstrip("\r")
                if shown:
                    print(prompt, end="", file=sys.stderr, flush=True)
            if data:
                ended_at = None
                continue
            break
        idle()
        if launcher is not None and ended_at is None and _has_ended(launcher):
            ended_at = time.monotonic()
        if ended_at is not None and time.monotonic() - ended_at > _GRACE:
            break
    if held:
        yield held.decode("utf-8", "surrogateescape")


@contextmanager
def progress_bar(what: str, *, quiet: bool) -> Iterator[Callable[[int, int], None]]:
    """Show how far `what` is, on stderr: a bar at a terminal, else a line every tenth. Yields update(done, total)."""
    if quiet:
        yield lambda done, total: None
    elif is_terminal(STDERR):
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

        console = Console(file=sys.stderr, force_terminal=True)
        columns = (TextColumn(what), BarColumn(), DownloadColumn(), TimeRemainingColumn())
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task(what, total=None)
            yield lambda done, total: bar.update(task, completed=done, total=total)
    else:
        tenth = -1

        def update(done: int, total: int) -> None:
            nonlocal tenth
            if total and done * 10 // total > tenth:
                tenth = done * 10 // total
                print(f"{what}: {tenth * 10} % of {total / 1e6:.0f} MB", file=sys.stderr, flush=True)

        yield update

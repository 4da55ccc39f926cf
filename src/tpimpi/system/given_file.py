"""Files that a user names with an option: what the name stands for is never waited for without end (a pipe that nobody
writes to), nor read without end (/dev/zero)."""

from __future__ import annotations

import os
import shlex
import stat
import time
from pathlib import Path
from typing import BinaryIO

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.terminal import MAX_LINE_BYTES

TEXT_FILE_BYTES = MAX_LINE_BYTES  # the most that is read of a prompt file, or of a text that is measured
WRITER_WAIT_S = 1.0  # that what writes to a pipe may take to begin
_PIECE_BYTES = 1 << 20
_READABLE = "give a file that rank 0 can read"
# Without blocking: else to open a pipe waits for who writes to it.
_FLAGS = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC


def read_bytes(option: str, path: str, max_bytes: int, *, secret: bool = False) -> bytes:
    """A file of at most `max_bytes`, named by an option, or all that comes through a pipe which somebody writes to; one that
    others can read is no `secret`. Raises InputError where it cannot be read."""
    try:
        descriptor = os.open(path, _FLAGS)
        try:
            about = os.fstat(descriptor)
            if secret and (remark := _for_others(option, path, about)) is not None:
                raise InputError(remark)
            data = _read(descriptor, about.st_mode, max_bytes + 1)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise InputError(f"{option} {shorten_path(path)}: {error.strerror}; {_READABLE}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{option} {path!r}: {error}; {_READABLE}") from error
    if data is None:
        raise InputError(
            f"{option} {shorten_path(path)} is a pipe that nobody writes to; start what writes to it, or give the name of a "
            "file"
        )
    if len(data) > max_bytes:
        raise InputError(
            f"{option} {shorten_path(path)} has over {max_bytes} bytes, more than is read; give a shorter file"
        )
    return data


def read_text(option: str, path: str, max_bytes: int = TEXT_FILE_BYTES, *, secret: bool = False) -> str:
    """A UTF-8 file of at most `max_bytes`, as `read_bytes` reads it; its lines end with a line feed. Raises InputError where
    it cannot be read."""
    try:
        data = read_bytes(option, path, max_bytes, secret=secret)
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {shorten_path(path)}: not UTF-8 at byte {error.start}; save it as UTF-8") from error


def for_others(option: str, path: str) -> str | None:
    """What is said of a file that others can read, and what to do; None where they cannot, or where it is no file."""
    try:
        return _for_others(option, path, Path(path).stat())
    except (OSError, ValueError):
        return None


def _for_others(option: str, path: str, about: os.stat_result) -> str | None:
    if not stat.S_ISREG(about.st_mode) or not about.st_mode & 0o077:
        return None
    return f"{option} {shorten_path(path)} can be read by others; type: chmod 600 {shlex.quote(path)}"


def open_file(option: str, path: str, remedy: str = _READABLE) -> BinaryIO:
    """A file that an option names, and that is read more than once, or not from its beginning to its end: no pipe. Raises
    InputError, with this remedy, where it is none or cannot be read."""
    try:
        descriptor = os.open(path, _FLAGS)
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            return os.fdopen(descriptor, "rb")
        os.close(descriptor)
    except OSError as error:
        raise InputError(f"{option} {shorten_path(path)}: {error.strerror}; {remedy}") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{option} {path!r}: {error}; {remedy}") from error
    raise InputError(f"{option} {shorten_path(path)} is no file; {remedy}")


def _read(descriptor: int, mode: int, max_bytes: int) -> bytes | None:
    """All of it, or so many bytes; None where it is a pipe that nobody writes to. Raises OSError."""
    data, deadline = bytearray(), time.monotonic() + WRITER_WAIT_S
    while len(data) < max_bytes:
        try:
            part = os.read(descriptor, min(max_bytes - len(data), _PIECE_BYTES))
        except BlockingIOError:
            # Who writes to a pipe has written nothing yet; or a terminal, where something is to be typed.
            if not (stat.S_ISFIFO(mode) or os.isatty(descriptor)):
                raise
            os.set_blocking(descriptor, True)
            continue
        data += part
        if part:
            continue
        if data or not stat.S_ISFIFO(mode) or os.get_blocking(descriptor):
            break
        if time.monotonic() > deadline:
            return None
        time.sleep(0.05)
    return bytes(data)

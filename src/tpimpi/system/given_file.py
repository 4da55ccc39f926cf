"""Files that a user names with an option, read whole: never more than a limit, whatever the name stands for (/dev/zero)."""

from __future__ import annotations

from pathlib import Path

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.terminal import MAX_LINE_BYTES

TEXT_FILE_BYTES = MAX_LINE_BYTES  # the most that is read of a prompt file, or of a text that is measured


def read_bytes(option: str, path: str, max_bytes: int) -> bytes:
    """A file of at most `max_bytes`, named by an option. Raises InputError where it cannot be read."""
    try:
        with Path(path).open("rb") as file:
            data = file.read(max_bytes + 1)
    except OSError as error:
        raise InputError(
            f"{option} {shorten_path(path)}: {error.strerror}; give a file that rank 0 can read"
        ) from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{option} {path!r}: {error}; give a file that rank 0 can read") from error
    if len(data) > max_bytes:
        raise InputError(
            f"{option} {shorten_path(path)} has over {max_bytes} bytes, more than is read; give a shorter file"
        )
    return data


def read_text(option: str, path: str, max_bytes: int = TEXT_FILE_BYTES) -> str:
    """A UTF-8 file of at most `max_bytes`, named by an option; its lines end with a line feed. Raises InputError where it
    cannot be read."""
    try:
        return read_bytes(option, path, max_bytes).decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{option} {shorten_path(path)}: not UTF-8 at byte {error.start}; save it as UTF-8") from error

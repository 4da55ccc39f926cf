"""Output files: checked before any work is done, and written whole or not at all."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tpimpi.errors import InputError, StorageError


def check_writable(
    given: str, option: str = "--report", inputs: Sequence[str] = (), *, start: bytes = b"{", kind: str = "report"
) -> None:
    """Raise InputError, before any work is done, where a report could not be written to `given`, the value of `option`.

    Nor is a file written over that is one of `inputs`, or that does not begin with `start` and so is no earlier `kind`.
    """
    if not given:
        raise InputError(f"{option} is empty; give the name of a file")
    path = Path(given)
    try:
        target = path.resolve()
        if path.is_dir():
            raise InputError(f"{option} {path} is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            return  # a device or a pipe
        if not target.parent.is_dir():
            raise InputError(f"{option} {path}: there is no folder {target.parent}; make it, or choose another place")
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise InputError(f"{option} {path} cannot be written: permission denied; choose another place")
        if target.exists():
            if any(Path(other).exists() and target.samefile(other) for other in inputs):
                raise InputError(f"{option} {path} is a file that this run reads; choose another name")
            with target.open("rb") as file:
                if file.read(len(start)) not in (b"", start):
                    raise InputError(f"{option} {path} is there, and is no {kind}; remove it, or choose another name")
    except (OSError, RuntimeError) as error:  # RuntimeError: Path.resolve, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "a loop of symbolic links"
        raise InputError(f"{option} {str(path)[:80]}: {reason}; choose another place") from error


def write_json(path: Path, values: Mapping[str, Any], option: str = "--report") -> None:
    """Write JSON to `path`, which `option` gave: a regular file whole or not at all, a device or pipe as it is.

    Raises StorageError.
    """
    text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        if path.exists() and not path.is_file():
            with path.open("w", encoding="utf-8") as stream:
                stream.write(text)
            return
        target = path.resolve()  # a link stays a link
        temporary = target.with_name(f".{os.getpid()}.report.partial")
        try:
            temporary.write_text(text, encoding="utf-8")
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write the report {path}: {error.strerror}; choose another {option}") from error


@contextlib.contextmanager
def replacing(path: Path, option: str) -> Iterator[BinaryIO]:
    """A file to write what `path` shall hold; a regular file changes whole or not at all, a device or pipe as it is written.

    Raises StorageError.
    """
    try:
        if path.exists() and not path.is_file():
            with path.open("wb") as stream:
                yield stream
            return
        target = path.resolve()  # a link stays a link
        temporary = target.with_name(f".{os.getpid()}.{option.lstrip('-')}.partial")
        try:
            with temporary.open("wb") as file:
                yield file
            temporary.replace(target)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another {option}") from error

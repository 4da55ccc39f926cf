"""Output files: checked before any work is done, and written whole or not at all. Locks on files."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
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


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole; a device or pipe is written as it is.

    Where `private`, only its owner can read it, whatever the umask and the file before it allow. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    target = path.resolve()  # a link stays a link
    # Not from `secrets`, which would load 4 MB of OpenSSL.
    temporary = target.with_name(f".{os.getpid()}.{os.urandom(4).hex()}.partial")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if private:
                os.fchmod(descriptor, 0o600)
            yield file
        temporary.replace(target)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, values: Mapping[str, Any], option: str = "--report", *, private: bool = False) -> None:
    """Write JSON to `path`, which `option` gave; see `whole_file`. Raises StorageError."""
    text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        with whole_file(path, private=private) as file:
            file.write(text.encode("utf-8", "backslashreplace"))  # a path that is no UTF-8 keeps its bytes, as \udcXX
    except OSError as error:
        raise StorageError(f"cannot write the report {path}: {error.strerror}; choose another {option}") from error


@contextlib.contextmanager
def replacing(path: Path, option: str, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write what `path`, which `option` gave, shall hold; see `whole_file`. Raises StorageError."""
    try:
        with whole_file(path, private=private) as file:
            yield file
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; choose another {option}") from error


# Locks


def try_lock(descriptor: int) -> OSError | None:
    """Lock an open file or folder (flock) for this process alone, until the descriptor is closed.

    None where it is locked; else why its file system has no locks, as some Lustre, NFS and FUSE mounts. Raises
    BlockingIOError where another process has the lock.
    """
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise
    except OSError as error:
        return error
    return None


@contextlib.contextmanager
def locked_file(path: Path, on_wait: Callable[[], None]) -> Iterator[OSError | None]:
    """Have the lock of the file `path`, which is made if it is not there; gives what `try_lock` returns.

    `on_wait` is called before waiting for another process. Raises OSError where the file cannot be made.
    """
    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            try:
                problem = try_lock(descriptor)
            except BlockingIOError:
                on_wait()
                fcntl.flock(descriptor, fcntl.LOCK_EX)
                problem = None
            if path.exists() and os.path.samestat(path.stat(), os.fstat(descriptor)):  # else it was removed meanwhile
                yield problem
                return
        finally:
            os.close(descriptor)

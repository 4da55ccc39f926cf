"""Output files: checked before any work is done, and written whole or not at all. Locks on files."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from tpimpi.errors import InputError, StorageError, shorten, shorten_path
from tpimpi.system.own_files import REPORT, Kind

READER_WAIT_S = 1.0  # that what reads a pipe may take to begin


def check_writable(given: str, option: str = "--report", inputs: Sequence[str] = (), kind: Kind = REPORT) -> None:
    """Raise InputError, before any work is done, where no file could be written to `given`, the value of `option`.

    Nor is a file written over that is one of `inputs`, or no earlier one of this `kind` of ours (an empty one is anybody's).
    """
    if not given:
        raise InputError(f"{option} is empty; give the name of a file")
    path = Path(given)
    try:
        target = path.resolve()
        if path.is_dir():
            raise InputError(f"{option} {shorten_path(path)} is a folder; give the name of a file")
        if path.exists() and not path.is_file():
            _check_special(path, option)
            return
        if not target.parent.is_dir():
            raise InputError(
                f"{option} {shorten_path(path)}: there is no folder {shorten_path(target.parent)}; make it, or choose "
                "another place"
            )
        if not os.access(target if target.exists() else target.parent, os.W_OK):
            raise InputError(
                f"{option} {shorten_path(path)} cannot be written: permission denied; choose another place"
            )
        if target.exists():
            if any(Path(other).exists() and target.samefile(other) for other in inputs):
                raise InputError(f"{option} {shorten_path(path)} is a file that this run reads; choose another name")
            with target.open("rb") as file:
                if target.stat().st_size and not kind.is_ours(file):
                    raise InputError(
                        f"{option} {shorten_path(path)} is there, and is no {kind.name} of tpimpi; remove it, or choose "
                        "another name"
                    )
    except (OSError, RuntimeError) as error:  # RuntimeError: Path.resolve, before Python 3.13
        reason = error.strerror if isinstance(error, OSError) else "a loop of symbolic links"
        raise InputError(f"{option} {shorten_path(path)}: {reason}; choose another place") from error
    except ValueError as error:  # a NUL in the name
        raise InputError(f"{option} {shorten(given)!r}: {error}; choose another place") from error


def _check_special(path: Path, option: str) -> None:
    """Raise InputError where `path`, which is neither a file nor a folder, takes no output: only a device such as /dev/null
    and a pipe that somebody reads do."""
    mode = path.stat().st_mode
    if stat.S_ISFIFO(mode):
        if not _has_reader(path):
            raise InputError(
                f"{option} {shorten_path(path)} is a pipe that nobody reads; start what reads it, or give the name of a file"
            )
    elif not stat.S_ISCHR(mode):
        what = "a socket" if stat.S_ISSOCK(mode) else "a disk"
        raise InputError(f"{option} {shorten_path(path)} is {what}; give the name of a file")


def _has_reader(path: Path) -> bool:
    """Whether another process reads a pipe, or soon does."""
    deadline = time.monotonic() + READER_WAIT_S
    while True:
        try:
            # Left open: what reads would take our leaving for the end of its input.
            os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        else:
            return True


def check_folder(folder: Path, option: str) -> None:
    """Raise InputError where `folder`, the value of `option`, is no folder, and cannot be made for what stands there."""
    for there in (folder, *folder.parents):
        try:
            there.lstat()
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            if error.errno == errno.ENAMETOOLONG:
                raise InputError(f"{option} {shorten_path(folder)}: {error.strerror}; give a shorter path") from error
            return  # found when it is used
        if not os.path.isdir(there):  # noqa: PTH112 (of a loop of links Path.is_dir may raise)
            inside = "" if there == folder else f", so {shorten_path(folder)} cannot be made"
            raise InputError(
                f"{option} {shorten_path(there)} is there and is no folder{inside}; give another name, or remove it"
            )
        return


_unfinished: set[Path] = set()


def note_unfinished(*paths: Path) -> None:
    """Where a signal ends the process these files are removed (see `remove_unfinished`): they are of no use yet."""
    _unfinished.update(paths)


def forget_unfinished(*paths: Path) -> None:
    """These files are of use, or gone."""
    _unfinished.difference_update(paths)


@contextlib.contextmanager
def unfinished(*paths: Path) -> Iterator[None]:
    """These files are removed at the end, and where a signal ends the process before: by that name they are of no use."""
    note_unfinished(*paths)
    try:
        yield
    finally:
        _remove(paths)
        forget_unfinished(*paths)


def remove_unfinished() -> None:
    """For who is about to end the process, wherever it is just now."""
    _remove(list(_unfinished))


def _remove(paths: Sequence[Path]) -> None:
    for path in paths:
        with contextlib.suppress(OSError):  # what went wrong before is said instead
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def whole_file(path: Path, *, private: bool = False, temporary: str | None = None) -> Iterator[BinaryIO]:
    """A file to write, which takes the place of `path` once it is whole; a device or pipe is written as it is.

    Where `private`, only its owner can read it, whatever the umask and the file before it allow. `temporary` is its name
    until then, where one that is there already may be written over. Raises OSError.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            yield stream
        return
    try:
        target = path.resolve()  # a link stays a link
    except RuntimeError as error:  # until Python 3.13
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP)) from error
    # Not from `secrets`, which would load 4 MB of OpenSSL.
    partial = target.with_name(temporary or f".{os.getpid()}.{os.urandom(4).hex()}.partial")
    once = os.O_EXCL if temporary is None else os.O_TRUNC | os.O_NOFOLLOW
    with unfinished(partial):
        descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | once, 0o600 if private else 0o666)
        with os.fdopen(descriptor, "wb") as file:
            if private:
                os.fchmod(descriptor, 0o600)
            yield file
        partial.replace(target)


def write_json(path: Path, values: Mapping[str, Any], option: str = "--report", *, private: bool = False) -> None:
    """Write JSON to `path`, which `option` gave; see `whole_file`. Raises StorageError."""
    text = json.dumps(values, ensure_ascii=False, indent=1, allow_nan=False) + "\n"
    try:
        with whole_file(path, private=private) as file:
            file.write(text.encode("utf-8", "backslashreplace"))  # a path that is no UTF-8 keeps its bytes, as \udcXX
    except OSError as error:
        raise StorageError(
            f"cannot write the report {shorten_path(path)}: {error.strerror}; choose another {option}"
        ) from error


@contextlib.contextmanager
def replacing(path: Path, option: str, *, private: bool = False) -> Iterator[BinaryIO]:
    """A file to write what `path`, which `option` gave, shall hold; see `whole_file`. Raises StorageError."""
    try:
        with whole_file(path, private=private) as file:
            yield file
    except OSError as error:
        raise StorageError(f"cannot write {shorten_path(path)}: {error.strerror}; choose another {option}") from error


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

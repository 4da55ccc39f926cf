"""An open file of weights, and the checks that every file of a model needs."""

from __future__ import annotations

import errno
import os
import re
import stat
from pathlib import Path
from typing import BinaryIO

import numpy as np

from tpimpi.compute.arrays import Bytes
from tpimpi.errors import ModelError, shorten

DOWNLOAD_AGAIN = "it is cut short or broken; download it again"

_PIECE = re.compile(r"(?P<file>.+\.gguf)[._-][\w-]+", re.IGNORECASE | re.DOTALL)  # m.gguf.part00, m.gguf-split-a
_KINDS = (
    (stat.S_ISREG, "a file"),
    (stat.S_ISDIR, "a directory"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
)
_REMEDIES = {
    errno.EACCES: "let your user read it (chmod, chown)",
    errno.EPERM: "let your user read it (chmod, chown)",
    errno.EMFILE: "allow more (ulimit -n)",
    errno.ENFILE: "close other programs, or allow more (sysctl fs.file-max)",
    errno.ENAMETOOLONG: "give a shorter path",
}

_LFS_POINTER = b"version https://git-lfs.github.com/spec/"
_SHOWN_PATH_CHARACTERS = 200  # of one that the system finds too long


class WeightFile:
    """An open file of weights; `header_end` is where its data begins."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.file = open_file(path, buffering=0)
        self.size = os.fstat(self.file.fileno()).st_size
        self.header_end = 0

    def read(self, offset: int, count: int) -> Bytes:
        """Bytes [offset, offset + count) as a new array."""
        out = np.empty(count, np.uint8)
        view, done = memoryview(out), 0
        while done < count:
            try:
                got = os.preadv(self.file.fileno(), [view[done:]], offset + done)
            except OSError as error:
                raise unreadable(self.path, error) from error
            if not got:
                size = os.fstat(self.file.fileno()).st_size
                raise ModelError(
                    f"{self.path}: is {size} bytes long, and was {self.size} when it was opened; "
                    f"start again when nothing writes to it"
                )
            done += got
        return out


def what_is(path: Path) -> str:
    """What stands there: "a file", "a directory", "nothing", "a dangling link", "a pipe", …; ModelError if no one can say.

    Links are followed.
    """
    try:
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return "a dangling link" if path.is_symlink() else "nothing"
    except OSError as error:
        if error.errno == errno.ELOOP:
            return "a link that leads in a circle"
        raise unreadable(path, error) from error
    return next((kind for test, kind in _KINDS if test(mode)), "a device")


def is_file(path: Path) -> bool:
    """Whether this file of a model is there; ModelError for what is there and no file.

    A download whose blobs are gone is all dangling links, which must not count as absent; a pipe would make us wait.
    """
    kind = what_is(path)
    if kind not in ("a file", "nothing"):
        raise ModelError(f"{path}: is {kind}, and a file is needed; download the model again")
    return kind == "a file"


def open_file(path: Path, buffering: int = -1) -> BinaryIO:
    """A file of a model, opened to be read; ModelError if it is no file, or cannot be."""
    try:
        is_file(path)
        return path.open("rb", buffering=buffering)
    except OSError as error:
        raise unreadable(path, error) from error


def piece_of(path: Path) -> str | None:
    """The remedy for a file that is not whole where its name is that of a piece of one, as uploads with a limit have it."""
    match = _PIECE.fullmatch(path.name)
    if match is None:
        return None
    return (
        f"it looks like one of several pieces of a file: join them all, in order (cat PIECES > {shown(match['file'])})"
    )


def refuse_pointer(start: bytes, path: Path) -> None:
    """Raise ModelError where a file that begins with `start` is not itself but the pointer to it that Git LFS keeps."""
    if start.startswith(_LFS_POINTER):
        raise ModelError(
            f"{path}: is a Git LFS pointer, a few lines of text in place of the file; fetch the file itself with "
            f"git lfs pull, or download it again"
        )


def listed(directory: Path, *suffixes: str) -> list[Path]:
    """What a directory holds with one of these suffixes, in capitals too, by name; ModelError if it cannot be listed."""
    try:
        return sorted(path for path in directory.iterdir() if path.suffix.lower() in suffixes)
    except OSError as error:
        raise unreadable(directory, error) from error


def unreadable(path: Path, error: OSError) -> ModelError:
    name = shorten(str(path), _SHOWN_PATH_CHARACTERS) if error.errno == errno.ENAMETOOLONG else path
    remedy = _REMEDIES.get(error.errno or 0, "check its disk, or download the model again")
    return ModelError(f"{name}: cannot be read: {error.strerror or error}; {remedy}")


def shown(name: str) -> str:
    """A tensor name from a file, as it may stand in a message."""
    return name if name.isprintable() and len(name) <= 120 else f"{shorten(name, 100)!r}"

"""A file of lines that grows only at its end, for one run at a time: what a run keeps while it works.

Whatever ends the program leaves whole lines, and at most a last one without its line end, which counts for nothing. Only
the file's owner can read it: one that others could read, as a copy may be, they cannot from the first new line on.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tpimpi.errors import InputError, shorten_path
from tpimpi.system.files import try_lock, whole_file


class LineFile:
    """The file, open and locked. `whole` is how many of its bytes count, as its reader found: what follows is cut off
    before more is appended."""

    def __init__(self, path: Path, wrong: Callable[[str], InputError]) -> None:
        """Open `path`, or make it. Raises `wrong` of what is wrong and what to do, and OSError; its cause is a
        BlockingIOError where another run has the file, or has just put another in its place."""
        self.path, self.whole = path, 0
        self._descriptor, self._made = -1, False
        self._for_others = False  # others can read it
        try:
            self._open(wrong)
        except BaseException:
            self.close()
            raise

    def _open(self, wrong: Callable[[str], InputError]) -> None:
        flags = os.O_RDWR | os.O_APPEND | os.O_CLOEXEC | os.O_NOCTTY
        try:
            if not stat.S_ISREG(kind := self.path.stat().st_mode):
                what = "a folder" if stat.S_ISDIR(kind) else "no file that can be kept"
                raise wrong(f" is {what}; give the name of a file")
            self._descriptor = os.open(self.path, flags)
        except FileNotFoundError:
            if self.path.is_symlink():
                leads = shorten_path(os.path.realpath(self.path))
                raise wrong(f" is a link to {leads}, which is not there; give the name of a file") from None
            self._descriptor = os.open(self.path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            os.fchmod(self._descriptor, 0o600)  # whatever the umask
            self._made = True
        try:
            problem = try_lock(self._descriptor)
        except BlockingIOError as error:
            raise wrong(" is in use by another run; wait for its end, or give another file") from error
        if problem is not None:
            raise wrong(f" cannot be locked: {problem.strerror}; put it on a local disk") from problem
        about = os.fstat(self._descriptor)
        if not self.path.exists() or not os.path.samestat(about, self.path.stat()):
            raise wrong(" was removed by another run just now; try again") from BlockingIOError()
        self._for_others = bool(about.st_mode & 0o077)
        if self._for_others and os.geteuid() not in (0, about.st_uid):
            raise wrong(" is another user's, and others can read it; give a file of your own")

    def reader(self) -> BinaryIO:
        """What reads the file from its beginning; to be closed."""
        os.lseek(self._descriptor, 0, os.SEEK_SET)
        return open(self._descriptor, "rb", closefd=False)

    def append(self, lines: bytes) -> None:
        """Write whole lines after those that count. Raises OSError."""
        if self._for_others:
            os.fchmod(self._descriptor, 0o600)
            self._for_others = False
        if os.fstat(self._descriptor).st_size != self.whole:
            os.ftruncate(self._descriptor, self.whole)
        while lines:
            done = os.write(self._descriptor, lines)
            lines, self.whole = lines[done:], self.whole + done

    def overwrite(self, place: int, part: bytes) -> None:
        """Put as many bytes in the place of others. Raises OSError."""
        # Through another descriptor, as what is written by ours goes to the end.
        other = os.open(f"/proc/self/fd/{self._descriptor}", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.pwrite(other, part, place)
        finally:
            os.close(other)

    def replace(self, lines: bytes) -> None:
        """Put a file of these whole lines in the place of this one, locked and on the disk before it is there. Raises
        OSError."""
        descriptor = -1
        try:
            # Always the same name, as the lock is ours: what a run left that was killed here is written over.
            with whole_file(self.path, private=True, temporary=f".{self.path.name}.partial") as file:
                file.write(lines)
                file.flush()
                os.fsync(file.fileno())
                # Another description of it, as locks are of these.
                descriptor = os.open(f"/proc/self/fd/{file.fileno()}", os.O_RDWR | os.O_APPEND | os.O_CLOEXEC)
                try_lock(descriptor)
        except BaseException:
            if descriptor >= 0:
                os.close(descriptor)
            raise
        os.close(self._descriptor)
        self._descriptor, self.whole, self._for_others = descriptor, len(lines), False

    def keep(self) -> None:
        """It stays, though this run made it and wrote nothing to it: something else is there by now."""
        self._made = False

    def close(self) -> None:
        """Let other runs have the file, which is not left behind empty."""
        if self._descriptor < 0:
            return
        if self._made:
            with contextlib.suppress(OSError):
                if os.fstat(self._descriptor).st_size == 0:
                    self.path.unlink()
        os.close(self._descriptor)
        self._descriptor = -1

"""A file of records, a line each, that grows only at its end, plain or sealed by a passphrase: a session, or a journal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from tpimpi.errors import InputError, shorten, shorten_path
from tpimpi.serving.sealed_lines import LineSeal, WrongPassphraseError
from tpimpi.system.line_file import LineFile

MAX_LINE_SHOWN = 60  # characters of a broken line
_MAX_FIRST_LINE_BYTES = 4096


class RecordFile:
    """The file, for one run at a time. Its first line says `what` it is; with a `passphrase` all others are sealed, and
    without one this line is a record too. `option` and `key_option` gave the file and that of the passphrase. None of
    ours has a line of `max_line_bytes`."""

    def __init__(
        self, given: str, what: str, option: str, key_option: str, passphrase: bytes | None, max_line_bytes: int
    ) -> None:
        """Raises InputError for an empty name."""
        if not given:
            raise InputError(f"{option} is empty; give the name of a file")
        self.path, self.passphrase = Path(given), passphrase
        self.seal: LineSeal | None = None  # where there is a passphrase, and a first line
        self._what, self._option, self._key_option, self._max_line_bytes = what, option, key_option, max_line_bytes
        self._file: LineFile | None = None

    def open(self, take: Callable[[bytes], None]) -> None:
        """Lock the file, which is made if it is not there, and give `take` each of its records, in order.

        `take` raises ValueError, KeyError or TypeError for one that is not what comes next. Raises InputError, having
        changed nothing, where the file cannot be used; its cause is a BlockingIOError where another run has it."""
        try:
            self._file = LineFile(self.path, self.wrong)
            self._file.whole = self._read(self._file, take)
        except OSError as error:
            self.close()
            raise self.wrong(f": {error.strerror}; give a file that rank 0 can read and write") from error
        except ValueError as error:  # a NUL in the name
            self.close()
            raise InputError(f"{self._option} {str(self.path)!r}: {error}; give the name of a file") from error
        except BaseException:
            self.close()
            raise

    def wrong(self, problem: str) -> InputError:
        """What is said of the file."""
        return InputError(f"{self._option} {shorten_path(self.path)}{problem}")

    def _read(self, lines: LineFile, take: Callable[[bytes], None]) -> int:
        """Take in what the file holds; returns how many of its bytes are whole lines."""
        with lines.reader() as file:
            first = file.readline(_MAX_FIRST_LINE_BYTES)
            self._check_what(first, alone=first.endswith(b"\n") or not file.read(1))
            if not first.endswith(b"\n"):
                return 0
            whole, number, line = 0, 0, first
            if self.passphrase is not None:
                self.seal = self._open_seal(self.passphrase, first)
                whole, number, line = len(first), 1, self._next(file, 2)
            while line.endswith(b"\n"):
                number += 1
                try:
                    take(line if self.seal is None else self.seal.open(line))
                except (ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
                    found = shorten(line[:400].decode(errors="replace"), MAX_LINE_SHOWN)
                    remedy = "cut it off before that line, or give another file"
                    raise self.wrong(f" is broken in line {number}, {found!r}; {remedy}") from error
                whole += len(line)
                line = self._next(file, number + 1)
        return whole

    def _next(self, file: BinaryIO, number: int) -> bytes:
        """The next line, whole or not. Raises InputError for one that none of ours can be."""
        line, most = file.readline(self._max_line_bytes), self._max_line_bytes
        if len(line) == most and not line.endswith(b"\n"):
            remedy = "cut it off before that line, or give another file"
            raise self.wrong(f" is broken in line {number}, which has {most} bytes or more; {remedy}")
        return line

    def _check_what(self, first: bytes, *, alone: bool) -> None:
        """Raise InputError where a file that begins so is none of the wanted kind. `alone`: the line is whole, or nothing
        follows it."""
        what, sealed = self._what, self.passphrase is not None
        plain_start, sealed_start = f'{{"tpimpi {what}": '.encode(), f'{{"tpimpi sealed {what}": '.encode()
        if first.startswith(plain_start if sealed else sealed_start):
            if sealed:
                raise self.wrong(
                    f" is not encrypted, and {self._key_option} is given; leave that out, or begin another file with it"
                )
            raise self.wrong(f" is encrypted; give the file of its passphrase: {self._key_option} FILE")
        if not first.startswith((sealed_start if sealed else plain_start)[: len(first)]) or not alone:
            raise self.wrong(f" is there, and is no {what}; give the name of a new file, or of a {what}")

    def _open_seal(self, passphrase: bytes, first: bytes) -> LineSeal:
        try:
            return LineSeal(passphrase, first, self._what)
        except WrongPassphraseError:
            raise self.wrong(
                f": the passphrase in {self._key_option} is not the one that it was begun with; give that, or another file"
            ) from None
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.wrong(
                " is encrypted in a way that this tpimpi does not know; use the one that made it, or give another file"
            ) from error

    # Writing

    def make_key(self) -> None:
        """Of a new file that is sealed; `append` does it else. Takes a tenth of a second."""
        if self.passphrase is not None and self.seal is None:
            self.seal = LineSeal(self.passphrase, what=self._what)

    def append(self, lines: bytes) -> None:
        """Records, whole lines each, after those that are there. Raises OSError."""
        self.make_key()
        first = b"" if self.seal is None or self.lines.whole else self.seal.first_line
        self.lines.append(first + sealed(self.seal, lines))

    def replace(self, lines: bytes) -> None:
        """These in the place of all that are there: whatever happens meanwhile, all old ones are there, or all new ones.
        Raises OSError."""
        self.make_key()
        seal = None if self.seal is None else self.seal.again()
        self.lines.replace((b"" if seal is None else seal.first_line) + sealed(seal, lines))
        self.seal = seal

    @property
    def has_records(self) -> bool:
        """Whether there is more than the first line of a sealed file."""
        return self.lines.whole > (0 if self.seal is None else len(self.seal.first_line))

    @property
    def lines(self) -> LineFile:
        """The open file, as it stands on the disk."""
        assert self._file is not None, "a file that could not be opened"
        return self._file

    def close(self) -> None:
        """Let other runs have the file, which is not left behind empty."""
        if self._file is not None:
            self._file.close()


def sealed(seal: LineSeal | None, lines: bytes) -> bytes:
    """Whole lines as they stand in a file, sealed where it is."""
    return lines if seal is None else b"".join(map(seal.seal, lines.splitlines(keepends=True)))

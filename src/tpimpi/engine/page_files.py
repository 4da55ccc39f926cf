"""Files of a sequence's keys and values, one on each rank's own disk (--keep-cache), from which a later run goes on.

A file is a line of JSON, what its pages are of (`PagesHeader`), and then pieces: an empty one, and the pages that the header
says, in the order of positions, full layers first, each in parts of at most PIECE_BYTES. A piece is encrypted with
ChaCha20-Poly1305 (RFC 8439) and followed by its tag: with the key that rank 0 made for this writing, the rank and the number
of the piece as nonce, and the line as what is authenticated beside it. The key is in memory only; rank 0 alone keeps it.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import msgspec

from tpimpi.compute.arrays import Bytes
from tpimpi.errors import InputError, shorten_path
from tpimpi.models.kv.cache import KINDS, KVCache, pages_of
from tpimpi.models.kv.pages import NO_PAGE
from tpimpi.system.files import check_folder, whole_file

FORMAT_VERSION = 1  # also to be raised when what keys and values are changes
PIECE_BYTES = 1 << 20
KEY_BYTES = 32
NAME_BYTES = 16
_TAG_BYTES = 16
_MAX_HEADER_BYTES = 4096


class PagesHeader(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the pages of a file are of; `first` is the first page there is of each kind of layers."""

    version: int
    name: str
    rank: int
    fingerprint: str
    format: str
    shares: str
    kv: str
    positions: int
    first: list[int]

    def line(self) -> bytes:
        """As it stands in the file."""
        return msgspec.json.encode(self) + b"\n"


class UnusableError(Exception):
    """Why the pages of a file cannot be used: text for a message."""


@dataclass(frozen=True)
class PageFiles:
    """Where one rank keeps pages, and of which model and part of it they are (`identity`)."""

    folder: Path
    rank: int
    identity: dict[str, str]

    @classmethod
    def open(cls, given: str, rank: int, identity: dict[str, str]) -> PageFiles:
        """In the folder that --keep-cache gives, which is made. Raises InputError.

        The cipher is loaded now, so that its 10 MB of memory are there when memory is planned."""
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305  # noqa: F401

        folder = Path(given)
        check_folder(folder, "--keep-cache")
        try:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"--keep-cache {shorten_path(folder)} cannot be made: {error.strerror}; give a folder that can be written"
            ) from error
        if not os.access(folder, os.W_OK | os.X_OK):
            raise InputError(f"--keep-cache {shorten_path(folder)} cannot be written; give a folder that can be")
        return cls(folder, rank, identity)

    def path(self, name: str) -> Path:
        """This rank's file of that name, which is random and says nothing."""
        return self.folder / f"{name}-r{self.rank}.kv"

    @contextlib.contextmanager
    def writing(
        self, name: str, key: bytes, cache: KVCache, tables: Sequence[Sequence[int]], positions: int
    ) -> Iterator[None]:
        """Write the first `positions` positions of the sequence whose pages are `tables`; the file takes its place at the
        end of the context. Takes 3 PIECE_BYTES of memory. Raises OSError."""
        tables = [table[: pages_of(positions)] for table in tables]
        first = [sum(page == NO_PAGE for page in table) for table in tables]
        header = PagesHeader(
            FORMAT_VERSION, name, self.rank, **self.identity, kv=cache.shape.fmt, positions=positions, first=first
        )
        path, line = self.path(name), header.line()
        try:
            # The same name each time, so that what a run left that was killed is written over.
            with whole_file(path, private=True, temporary=f".{path.name}.partial") as file:
                cipher = _Pieces(key, self.rank, line)
                file.write(line)
                file.write(cipher.seal(b""))
                for page in _pages(cache, tables, first):
                    for at in range(0, page.size, PIECE_BYTES):
                        file.write(cipher.seal(page[at : at + PIECE_BYTES]))
                file.flush()
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                yield
        except OSError as error:
            error.filename = error.filename or str(path)
            raise

    def read(
        self, name: str, key: bytes, cache: KVCache, tables: Sequence[Sequence[int]], positions: int, kept: int
    ) -> None:
        """Read the first `positions` positions of a file of `kept` into the pages of `tables`.

        Takes 3 PIECE_BYTES of memory beside the pages'. Raises UnusableError; pages may be written then."""
        path = self.path(name)
        try:
            with path.open("rb") as file:
                line = file.readline(_MAX_HEADER_BYTES)
                header = self._header(line, name, cache, kept)
                tables = [table[: pages_of(positions)] for table in tables]
                if header.first != [sum(page == NO_PAGE for page in table) for table in tables]:
                    raise UnusableError("holds pages of other positions")
                cipher = _Pieces(key, self.rank, line)
                cipher.open(file, 0)
                for page in _pages(cache, tables, header.first):
                    for at in range(0, page.size, PIECE_BYTES):
                        part = page[at : at + PIECE_BYTES]
                        part[:] = memoryview(cipher.open(file, part.size))
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        except FileNotFoundError:
            raise UnusableError(f"{shorten_path(path)} is not there") from None
        except OSError as error:
            raise UnusableError(f"{shorten_path(path)}: {error.strerror}") from error
        except UnusableError as error:
            raise UnusableError(f"{shorten_path(path)} {error}") from None

    def _header(self, line: bytes, name: str, cache: KVCache, kept: int) -> PagesHeader:
        """What a line says. Raises UnusableError where that is not what is wanted."""
        try:
            header = msgspec.json.decode(line, type=PagesHeader)
        except (ValueError, RecursionError):  # msgspec's errors are ValueErrors, and so is text that is no UTF-8
            raise UnusableError("is damaged, or no file of keys and values") from None
        if header.version != FORMAT_VERSION:
            raise UnusableError(f"is of format version {header.version}, this tpimpi knows {FORMAT_VERSION}")
        found, wanted = msgspec.structs.asdict(header), {**self.identity, "kv": cache.shape.fmt}
        for what, value in wanted.items():
            if found[what] != value:
                raise UnusableError(f"has {what} {found[what]}, this run {value}")
        if (header.name, header.rank, header.positions, len(header.first)) != (name, self.rank, kept, len(KINDS)):
            raise UnusableError("is of another sequence, or another rank")
        return header


def _pages(cache: KVCache, tables: Sequence[Sequence[int]], first: Sequence[int]) -> Iterator[Bytes]:
    """The bytes of a sequence's pages, in the order of positions."""
    for number in range(max(map(len, tables))):
        for kind in KINDS:
            if first[kind] <= number < len(tables[kind]):
                yield cache.page(kind, tables[kind][number])


class _Pieces:
    """The pieces of one file, one after the other."""

    def __init__(self, key: bytes, rank: int, line: bytes) -> None:
        from cryptography.hazmat.primitives.ciphers.aead import ChaCha20Poly1305

        self._cipher, self._rank, self._line, self._number = ChaCha20Poly1305(key), rank, line, 0

    def _nonce(self) -> bytes:
        """Never the same twice with a key: no two ranks have the same, and a key is for one writing."""
        self._number += 1
        return self._rank.to_bytes(4, "big") + self._number.to_bytes(8, "big")

    def seal(self, data: bytes | Bytes) -> bytes:
        """The next piece as it stands in the file."""
        return self._cipher.encrypt(self._nonce(), memoryview(data), self._line)

    def open(self, file: BinaryIO, size: int) -> bytes:
        """What the next piece holds, of `size` bytes. Raises UnusableError where it is not what was written."""
        from cryptography.exceptions import InvalidTag

        try:
            return self._cipher.decrypt(self._nonce(), file.read(size + _TAG_BYTES), self._line)
        except InvalidTag:
            raise UnusableError("is damaged, or was written with another key") from None

"""What rank 0 keeps beside a session for --keep-cache: the key and name of the files in which every rank keeps its pages.

FILE.cache beside the session FILE is a JSON object, for its owner alone (0600): the version of this format, name and key in
hexadecimal digits, how many positions the files have, of windowed layers from which page on, for which context, and a
keyed hash (BLAKE2b) of their token ids, by which the turn is found that they are of. Ids and text are in the session alone.
Beside a session that a passphrase encrypts that object is sealed too (`sealed_lines`): {"tpimpi sealed cache": "BASE64"}.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence

import msgspec
import numpy as np

from tpimpi.engine import protocol
from tpimpi.engine.keep_pages import SequenceFile
from tpimpi.engine.model import Model
from tpimpi.engine.page_files import KEY_BYTES, NAME_BYTES, PageFiles
from tpimpi.errors import InputError, StorageError, shorten_path
from tpimpi.models.kv.cache import WINDOWED
from tpimpi.models.kv.pages import NO_PAGE
from tpimpi.serving.session import Session
from tpimpi.serving.transcript import Turn
from tpimpi.system.files import replacing
from tpimpi.system.given_file import open_file

FORMAT_VERSION = 1
SUFFIX = ".cache"
_BEGINNING = b'{"tpimpi cache":'
_SEALED_BEGINNING, _SEALED_END = b'{"tpimpi sealed cache": "', b'"}\n'
_BESIDE = b"cache"
_MAX_BYTES = 4096


class _Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True, rename={"version": "tpimpi cache"}):
    """What the file holds."""

    version: int
    name: str
    key: str
    positions: int
    first: int  # page that there is of windowed layers
    context: int
    hash: str


class KeptCache:
    """The keys and values of a session, between runs."""

    def __init__(self, session: Session) -> None:
        """Raises InputError where the file beside the session is something else."""
        self._session = session
        self.path = session.path.with_name(session.path.name + SUFFIX)
        self._taken: list[int] = []
        self._text: bytes | None = None
        if self.path.exists():
            with open_file(
                "--keep-cache has its key in", str(self.path), "mend that, or give another --session"
            ) as file:
                self._text = file.read(_MAX_BYTES)
        if self._text and not self._text.startswith((_BEGINNING, _SEALED_BEGINNING)):
            raise InputError(
                f"--keep-cache has its key in {shorten_path(self.path)}, which is there and is something else; remove it, "
                "or give another --session"
            )

    def take(self, model: Model, files: PageFiles, context: int, limit: int) -> tuple[list[int], str | None]:
        """Have every rank begin a sequence of at most `context` positions, or more as far as `limit`, with what the last
        run kept. Returns the ids whose keys and values are there, and where there are none, why not, if anything was kept.
        """
        if not self._text:
            return [], None
        entry = self._entry
        if entry is None:
            other = "" if self._session.passphrase is None else ", or not of this session"
            return [], f"{shorten_path(self.path)} is damaged{other}"
        ids = next((ids for turn in reversed(self._session.turns) if (ids := _ids_of(turn, entry)) is not None), None)
        if ids is None:
            return [], "the conversation is not the one that was kept"
        ids = ids[:limit]
        context = max(context, len(ids))
        if not model.has_same_angles(entry.context, context):
            return [], f"what was kept is for a context of {entry.context} positions, this run has {context}"
        protocol.begin(model, model.star, context)
        tables = model.tables_of(len(ids), entry.first)
        windowed = [page for page in tables[WINDOWED] if page != NO_PAGE]
        if len(set(windowed)) < len(windowed):
            return [], "what was kept is of a run with a longer --prompt-chunk"
        which = SequenceFile(entry.name, entry.key, len(ids), entry.positions, tables)
        problems = protocol.take_pages(model, model.star, files, which)
        if problems:
            return [], problems[0]
        self._taken = ids
        return list(ids), None

    def keep(self, model: Model, files: PageFiles, held: Sequence[int]) -> str | None:
        """Have every rank keep what it holds, the keys and values of the ids `held`, as far as the session's last turn
        begins with them. Returns why it could not, if so."""
        turns = self._session.turns
        said = [*turns[-1].ids, *turns[-1].tokens] if turns else []
        pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(said, held, strict=False))
        ids = [one for one, _ in pairs]
        if not ids or ids == self._taken or not model.can_keep(len(ids), model.context):
            return None
        before = self._entry
        name = os.urandom(NAME_BYTES).hex() if before is None else before.name
        key = os.urandom(KEY_BYTES).hex()
        tables = model.tables_of(len(ids))
        which = SequenceFile(name, key, len(ids), len(ids), tables)
        problems = protocol.keep_pages(model, model.star, files, which)
        if problems:
            return problems[0]
        first = tables[WINDOWED].count(NO_PAGE)
        entry = _Entry(FORMAT_VERSION, name, key, len(ids), first, model.context, _hash(ids, key))
        text = msgspec.json.format(msgspec.json.encode(entry), indent=0) + b"\n"
        if (seal := self._session.seal) is not None:
            text = _SEALED_BEGINNING + seal.seal_beside(_BESIDE, text) + _SEALED_END
        try:
            with replacing(self.path, "--session", private=True) as file:
                file.write(text)
        except StorageError as error:
            return str(error)
        return None

    @property
    def _entry(self) -> _Entry | None:
        """What the file holds; None where it is damaged, or there is none."""
        text = self._text or b""
        try:
            if self._session.passphrase is not None:
                sealed = text.removeprefix(_SEALED_BEGINNING).removesuffix(_SEALED_END)
                text = b"" if self._session.seal is None else self._session.seal.open_beside(_BESIDE, sealed)
            entry = msgspec.json.decode(text, type=_Entry)
            sizes = (len(bytes.fromhex(entry.name)), len(bytes.fromhex(entry.key)))
        except (ValueError, RecursionError):
            return None
        well = (
            sizes == (NAME_BYTES, KEY_BYTES)
            and entry.version == FORMAT_VERSION
            and entry.positions > 0
            and entry.first >= 0
        )
        return entry if well else None


def _ids_of(turn: Turn, entry: _Entry) -> list[int] | None:
    """The ids that were kept, if a turn begins with them."""
    ids = [*turn.ids, *turn.tokens][: entry.positions]
    return ids if len(ids) == entry.positions and _hash(ids, entry.key) == entry.hash else None


def _hash(ids: Sequence[int], key: str) -> str:
    import hashlib  # with OpenSSL, 3 MB, which runs that keep nothing do without

    return hashlib.blake2b(np.array(ids, "<i8").tobytes(), key=bytes.fromhex(key), person=b"ids").hexdigest()

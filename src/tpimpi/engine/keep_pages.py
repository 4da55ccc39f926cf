"""How every rank keeps its pages of a sequence in a file, and takes them from there, all of them or none (--keep-cache).

After the header of the step rank 0 says in a note which pages, of how many positions, under which name and key. Every rank
says whether it could do its part; what was written takes its place, and what was read counts, only where all could.
"""

from __future__ import annotations

from collections.abc import Sequence

from tpimpi.engine.model import Model
from tpimpi.engine.page_files import KEY_BYTES, NAME_BYTES, PageFiles, UnusableError
from tpimpi.errors import StarError, as_ours
from tpimpi.models.kv.cache import KINDS, pages_of
from tpimpi.models.kv.pages import NO_PAGE
from tpimpi.star import Star
from tpimpi.star.control import Note, gather_notes, receive_note, send_note


class SequenceFile(Note, frozen=True):
    """Hub: a sequence's first `positions` positions, whose pages of each kind are `tables`, and the file that has `kept`
    positions of it: its name and key, in hexadecimal digits. The reply is PartDone."""

    name: str
    key: str
    positions: int
    kept: int
    tables: list[list[int]]


class PartDone(Note, frozen=True):
    """Whether the sender could do its part, or why not."""

    host: str
    problem: str | None


class Agreed(Note, frozen=True):
    """Hub: whether every rank could do its part."""

    by_all: bool


class _OthersCouldNotError(Exception):
    """What was written does not count."""


def keep(model: Model, star: Star, files: PageFiles, which: SequenceFile) -> list[str]:
    """Every rank: write our pages. On rank 0 what went wrong, a line for each rank where something did."""
    assert model.cache is not None
    pages = (model.cache, which.tables, which.positions)
    written, problem, problems = None, None, list[str]()  # written by all, once that is known
    try:
        with files.writing(which.name, bytes.fromhex(which.key), *pages):
            written, problems = _agree(star, None)
            if not written:
                raise _OthersCouldNotError
    except _OthersCouldNotError:
        pass
    except OSError as error:
        problem = str(as_ours(error))
    return problems if written is False else _agree(star, problem)[1]  # in its place on all, or not even written here


def take(model: Model, star: Star, files: PageFiles, which: SequenceFile) -> list[str]:
    """Every rank: read our pages, which the sequence of `begin` then has. On rank 0 what went wrong, as `keep`."""
    assert model.cache is not None
    problem = None
    model.take_pages(which.tables)
    pages = (model.cache, which.tables, which.positions, which.kept)
    try:
        files.read(which.name, bytes.fromhex(which.key), *pages)
    except UnusableError as error:
        problem = str(error)
    by_all, problems = _agree(star, problem)
    if by_all and model.has_one_sequence:
        model.adopt_pages(which.positions, which.tables)
    return problems


def receive_which(model: Model, star: Star) -> SequenceFile:
    """Other ranks: what rank 0 says. Raises StarError where it makes no sense."""
    which = receive_note(star, SequenceFile)
    try:
        sizes = (len(bytes.fromhex(which.name)), len(bytes.fromhex(which.key)))
    except ValueError:
        sizes = (0, 0)
    if sizes != (NAME_BYTES, KEY_BYTES) or not 0 < which.positions <= min(which.kept, model.context):
        raise StarError("rank 0 names a file of keys and values that makes no sense")
    if model.cache is None or not _are_pages(which.tables, model.cache.pages, pages_of(which.positions)):
        raise StarError("rank 0 names pages of keys and values that are not there")
    return which


def _are_pages(tables: Sequence[Sequence[int]], pages: Sequence[int], fewest: int) -> bool:
    """Whether these are page tables of as many positions as `fewest` pages have, among `pages` pages of each kind."""
    return len(tables) == len(KINDS) and all(
        len(table) >= fewest and all(NO_PAGE <= page < count for page in table)
        for table, count in zip(tables, pages, strict=True)
    )


def _agree(star: Star, problem: str | None) -> tuple[bool, list[str]]:
    """Every rank: whether all could do their part; and on rank 0 why not."""
    notes = gather_notes(star, PartDone(star.rank.host, problem))
    if not star.rank.is_hub:
        return receive_note(star, Agreed).by_all, []
    alone = star.rank.size == 1
    problems = [
        note.problem if alone else f"r{rank} {note.host}: {note.problem}"
        for rank, note in enumerate(notes)
        if note.problem is not None
    ]
    send_note(star, Agreed(not problems))
    return not problems, problems

"""How the ranks agree: rank 0 says in notes what is to be done, every rank does its part, rank 0 hears whether it could.

Whatever is wrong is said once, by rank 0; then every rank ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from tpimpi.errors import InputError, TpimpiError, as_ours
from tpimpi.star import Star

T = TypeVar("T")


class Stopped(Exception):  # noqa: N818  (not an error of this rank)
    """Rank 0 ended the run before it began; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


def encode_note(**values: Any) -> bytes:
    return json.dumps(values).encode()


@contextmanager
def stop_others_on_error(star: Star) -> Iterator[None]:
    """Rank 0: if what is inside fails, the other ranks, which wait for a note, end with the same exit code."""
    try:
        yield
    except BaseException as error:
        code = as_ours(error).exit_code if isinstance(error, Exception) else 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        star.broadcast_note(encode_note(stop=code))
        raise


def on_every_rank(star: Star, work: Callable[[], T]) -> tuple[T, list[dict[str, Any]]]:
    """Rank 0: do our part of what every rank does, and hear their notes. Raises the first error, ours or another's."""
    problem, result = None, None
    try:
        result = work()
    except Exception as error:
        problem = as_ours(error)
    notes = [json.loads(note) for note in star.gather_notes(encode_note())]
    raise_first(problem, notes)
    return result, notes  # type: ignore[return-value]


def raise_first(problem: TpimpiError | None, notes: Sequence[dict[str, Any]]) -> None:
    """Raise what went wrong on this rank, or else what a note says of another."""
    if problem is not None:
        raise problem
    troubled = [(f"r{rank} {note['host']}", note) for rank, note in enumerate(notes) if "error" in note]
    if troubled:
        where, note = troubled[0]
        others = ", ".join(other for other, _ in troubled[1:])
        text = note["error"] + (f" (there is trouble on {others} too)" if others else "")
        problem = (InputError if note["code"] == InputError.exit_code else TpimpiError)(text)
        problem.where = where
        raise problem


def error_note(star: Star, error: Exception) -> bytes:
    """The note with which a rank tells rank 0 of an error."""
    ours = as_ours(error)
    return encode_note(error=str(ours), code=ours.exit_code, host=star.rank.host)


def report_errors(star: Star, work: Callable[[], T]) -> T:
    """What `work` returns; what it raises rank 0 is told, which then ends the run."""
    try:
        return work()
    except Exception as error:
        star.gather_notes(error_note(star, error))
        receive_note(star)  # raises Stopped
        raise


def receive_note(star: Star) -> dict[str, Any]:
    note: dict[str, Any] = json.loads(star.receive_note())
    if "stop" in note:
        raise Stopped(note["stop"])
    return note

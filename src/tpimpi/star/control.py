"""Control notes: rank 0 says in typed notes what is to be done, every rank does its part and says whether it could.

A note is a JSON object with fields of known names and types (msgspec). Each package defines its own beside their use. A note
with an unknown field, or of another type than is due, is a StarError that names its sender and the field. What is wrong on
any rank is said once, by rank 0; then every rank ends.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar, Union

from tpimpi.errors import InputError, StarError, TpimpiError, as_ours, shorten
from tpimpi.modules import without_module
from tpimpi.star import Star

# msgspec asks it first, and Python's own typing has the same since 3.11. It takes 0.6 MB.
with without_module("typing_extensions"):
    import msgspec

T = TypeVar("T")


class Note(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="note", tag=True):
    """What one rank tells another. Its JSON has the class's name as `note`."""


class Done(Note, frozen=True):
    """The sender has done its part."""


class Proceed(Note, frozen=True):
    """Hub: all ranks have done their part; go on."""


class TaskNote(Note, frozen=True, tag_field="task"):
    """Hub: what to do before a run, or instead of one. Subclasses give the task's name as `tag`."""


class StopNote(Note, tag=False, frozen=True):
    """Hub: the run ends, with this exit code."""

    stop: int


class ErrorNote(Note, tag=False, frozen=True):
    """A rank's part has failed."""

    error: str
    code: int
    host: str


class _Kind(msgspec.Struct):
    """What tells a stop, an error and a task from other notes."""

    stop: int | None = None
    error: str | None = None
    task: str | None = None


N = TypeVar("N", bound=Note)
M = TypeVar("M", bound=Note)


@dataclass(frozen=True)
class Task:
    """A TaskNote that came, for whoever does the task to decode: most runs do without the modules of most tasks."""

    name: str
    values: Any  # as JSON has it
    sender: str

    def note(self, kind: type[N], *, any_version: bool = False) -> N:
        """What it says (see decode_note). Raises StarError."""
        return _convert(self.values, kind, self.sender, any_version=any_version)


class Stopped(Exception):  # noqa: N818  (not an error of this rank)
    """Rank 0 ended the run before it began; it has said why."""

    def __init__(self, code: int) -> None:
        super().__init__(f"stopped with exit code {code}")
        self.code = code


def to_json(note: object) -> bytes:
    """A note, or a dataclass sent as one, as JSON in ASCII: a path may hold bytes that are no UTF-8, which msgspec's own
    encoder refuses."""
    return json.dumps(msgspec.to_builtins(note, enc_hook=_plain)).encode()


def _plain(value: Any) -> float:
    """NumPy's own float is one for json, not for msgspec."""
    if isinstance(value, float):
        return float(value)
    raise TypeError(f"{type(value)} in a note")


def decode_note(data: bytes, kind: type[T], sender: str, *, any_version: bool = False) -> T:
    """The note of type `kind`, or of one of a Union's, that `data` is. Raises StarError, which names `sender` and the field,
    where it is another, or has a field that is not known: with `any_version` that is left out."""
    return _convert(_values(data, sender), kind, sender, any_version=any_version)


def _values(data: bytes, sender: str) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError) as error:
        raise _makes_no_sense(sender, error) from error


def _convert(values: Any, kind: type[T], sender: str, *, any_version: bool = False) -> T:
    try:
        note = msgspec.convert(values, kind)
        # msgspec forbids unknown fields in a Struct, but not in a dataclass inside it.
        unknown = None if any_version else _unknown_field(values, msgspec.to_builtins(note), "$")
    except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:  # half a character is none
        raise _makes_no_sense(sender, error) from error
    if unknown is not None:
        raise _makes_no_sense(sender, f"it has the unknown field `{unknown}`")
    return note


def _makes_no_sense(sender: str, why: object) -> StarError:
    return StarError(f"{sender} sent a note that makes no sense: {why}; see that every host has the same tpimpi")


def _unknown_field(sent: Any, known: Any, path: str) -> str | None:
    """The path of a field of `sent` that `known`, what was understood of it, has not; None where there is none."""
    if isinstance(sent, dict) and isinstance(known, dict):
        for name, value in sent.items():
            if name not in known and name not in ("note", "task"):
                return f"{path}.{name}"
            if (found := _unknown_field(value, known.get(name), f"{path}.{name}")) is not None:
                return found
    if isinstance(sent, list) and isinstance(known, list):
        for place, (one, other) in enumerate(zip(sent, known, strict=False)):
            if (found := _unknown_field(one, other, f"{path}[{place}]")) is not None:
                return found
    return None


def send_note(star: Star, note: Note) -> None:
    """Hub: send a note to every other rank."""
    star.broadcast_note(to_json(note))


def receive_note(star: Star, kind: type[N]) -> N:
    """Other ranks: the hub's next note, of this type, however long it takes. Raises Stopped, StarError."""
    values, sender = _receive(star)
    return _convert(values, kind, sender)


def receive_task(star: Star, kind: type[N], other: type[M]) -> Task | N | M:
    """Other ranks: the hub's next task, or a note of one of these two types. Raises Stopped, StarError."""
    values, sender = _receive(star)
    if (name := _convert(values, _Kind, sender, any_version=True).task) is not None:
        return Task(name, values, sender)
    note: N | M = _convert(values, Union[kind, other], sender)  # type: ignore[arg-type]  # noqa: UP007
    return note


def receive_stop(star: Star) -> NoReturn:
    """Other ranks: wait until the hub ends the run. Raises Stopped, or StarError where it sends another note."""
    _, sender = _receive(star)
    raise _makes_no_sense(sender, "the end of the run was due")


def _receive(star: Star) -> tuple[Any, str]:
    """The hub's next note, as JSON has it, and how messages name the hub. Raises Stopped where it ends the run."""
    sender = star.rank_name(0)
    values = _values(star.receive_note(), sender)
    if _convert(values, _Kind, sender, any_version=True).stop is not None:
        raise Stopped(_convert(values, StopNote, sender).stop)
    return values, sender


def gather_notes(star: Star, note: N) -> list[N]:
    """Every rank gives a note of the same type; the hub gets all of them in rank order, the others an empty list.

    Raises StarError, and on the hub the first error that a rank sent instead.
    """
    gathered = star.gather_notes(to_json(note))
    return [note, *_replies(star, gathered, type(note), None)] if star.rank.is_hub else []


def on_every_rank(star: Star, work: Callable[[], T], kind: type[N]) -> tuple[T, list[N]]:
    """Hub: do our part of what every rank does. What `work` returns, and the replies of ranks 1, 2, …, of type `kind`.

    Raises the first error, ours or another's.
    """
    problem, result = None, None
    try:
        result = work()
    except Exception as error:
        problem = as_ours(error)
    gathered = star.gather_notes(to_json(Done()))
    return result, _replies(star, gathered, kind, problem)  # type: ignore[return-value]


def _replies(star: Star, gathered: Sequence[bytes], kind: type[N], problem: TpimpiError | None) -> list[N]:
    """What ranks 1, 2, … of `gathered` reply. Raises `problem`, which went wrong on this rank, or else what another says
    went wrong there."""
    if problem is not None:
        raise problem
    names = [star.rank_name(rank) for rank in range(1, len(gathered))]
    others = [(_values(data, name), name) for data, name in zip(gathered[1:], names, strict=True)]
    for rank, (values, _) in enumerate(others, start=1):
        check_host(star, rank, values)
    errors = [
        (rank, _convert(values, ErrorNote, name))
        for rank, (values, name) in enumerate(others, start=1)
        if _convert(values, _Kind, name, any_version=True).error is not None
    ]
    if not errors:
        return [_convert(values, kind, name) for values, name in others]
    (rank, note), rest = errors[0], ", ".join(f"r{rank} {note.host}" for rank, note in errors[1:])
    text = note.error + (f" (there is trouble on {rest} too)" if rest else "")
    problem = (InputError if note.code == InputError.exit_code else TpimpiError)(text)
    problem.where = f"r{rank} {note.host}"
    raise problem


def check_host(star: Star, rank: int, values: Any) -> None:
    """Hub: where links are sealed, a rank whose note names a host, itself or in a part, must name the one that it has proved
    to be. Raises StarError."""
    if not star.proved_hosts:
        return
    proved, parts = star.proved_hosts[rank], [values]
    while parts:
        part = parts.pop()
        if isinstance(part, list):
            parts += part
        if not isinstance(part, dict):
            continue
        parts += part.values()
        if part.get("host", proved) != proved:
            raise StarError(
                f"{star.rank_name(rank)} says that it is {shorten(str(part['host']))}, and has proved with its key that it "
                f"is {proved}; take that machine out of the run"
            )


@contextmanager
def stop_others_on_error(star: Star) -> Iterator[None]:
    """Hub: if what is inside fails, the other ranks, which wait for a note, end with the same exit code."""
    try:
        yield
    except BaseException as error:
        code = as_ours(error).exit_code if isinstance(error, Exception) else 1
        if isinstance(error, SystemExit):
            code = error.code if isinstance(error.code, int) else int(error.code is not None)
        send_note(star, StopNote(code))
        raise


def report_errors(star: Star, work: Callable[[], T]) -> T:
    """Other ranks: what `work` returns; rank 0 is told what it raises, and then ends the run."""
    try:
        return work()
    except Exception as error:
        ours = as_ours(error)
        star.gather_notes(to_json(ErrorNote(str(ours), ours.exit_code, star.rank.host)))
        receive_stop(star)

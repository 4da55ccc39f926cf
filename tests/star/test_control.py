"""Notes between ranks: typed, and what is not as it is due is an error that names its sender and the field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest

from tpimpi.errors import InputError, StarError, TpimpiError
from tpimpi.star import Rank, Star
from tpimpi.star.control import (
    Done,
    Note,
    StopNote,
    Stopped,
    Task,
    TaskNote,
    decode_note,
    gather_notes,
    on_every_rank,
    receive_note,
    receive_stop,
    receive_task,
    report_errors,
    to_json,
)


@dataclass(frozen=True)
class Inner:
    size: int


class Told(Note, frozen=True):
    folder: str
    inner: Inner
    rates: list[int | float]


class Other(Note, frozen=True):
    count: int


class Work(TaskNote, frozen=True, tag="work"):
    count: int


class Scripted(Star):
    """A rank of two: what it gets from the other stands in `notes`, what it sends is kept."""

    def __init__(self, rank: int, notes: Sequence[bytes]) -> None:
        super().__init__(None)
        self.rank, self.notes, self.sent = Rank(rank, 2, "desk"), list(notes), []

    def rank_name(self, rank: int) -> str:
        return f"r{rank} {('desk', 'pi')[rank]}"

    def receive_note(self) -> bytes:
        return self.notes.pop(0)

    def gather_notes(self, note: bytes) -> list[bytes]:
        self.sent.append(note)
        return [note, *self.notes] if self.rank.is_hub else []


def test_a_note_comes_as_it_was_sent() -> None:
    """Paths that are no UTF-8 too; whole numbers stay whole."""
    note = Told("/models/\udcff", Inner(3), [1, 2.5])
    data = to_json(note)
    assert json.loads(data) == {"note": "Told", "folder": "/models/\udcff", "inner": {"size": 3}, "rates": [1, 2.5]}
    found = decode_note(data, Told, "r1 pi")
    assert found == note
    assert [type(rate) for rate in found.rates] == [int, float]


GOOD = {"note": "Told", "folder": "f", "inner": {"size": 3}, "rates": []}


@pytest.mark.parametrize(
    ("note", "field"),
    [
        ({**GOOD, "colour": 1}, "`colour`"),
        ({**GOOD, "inner": {"size": 3, "colour": 1}}, "`$.inner.colour`"),
        ({**GOOD, "inner": {"size": "3"}}, "`$.inner.size`"),
        ({**GOOD, "rates": [1, "x"]}, "`$.rates[1]`"),
        ({name: value for name, value in GOOD.items() if name != "folder"}, "`folder`"),
        ({"note": "Other", "count": 1}, "`$.note`"),
        ({"count": 1}, "`folder`|`count`"),
        ([], "object"),
        ("\xff", "object"),
    ],
)
def test_a_note_that_is_not_as_it_is_due_names_its_sender_and_the_field(note: object, field: str) -> None:
    for star, get in (
        (Scripted(1, [json.dumps(note).encode()]), lambda star: receive_note(star, Told)),
        (Scripted(0, [json.dumps(note).encode()]), lambda star: on_every_rank(star, lambda: None, Told)),
        (Scripted(0, [json.dumps(note).encode()]), lambda star: gather_notes(star, Told("f", Inner(3), []))),
    ):
        with pytest.raises(StarError) as caught:
            get(star)
        sender = "r1 pi" if star.rank.is_hub else "r0 desk"
        assert str(caught.value).startswith(f"{sender} sent a note that makes no sense: ")
        assert any(each in str(caught.value) for each in field.split("|")), caught.value
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("data", [b"", b"\xff", b"{", b"[" * 100_000, b'{"stop": "x"}', b'{"note": "Told"}'])
def test_bytes_that_are_no_note_are_refused(data: bytes) -> None:
    with pytest.raises(StarError, match="r0 desk sent a note that makes no sense"):
        receive_note(Scripted(1, [data]), Told)


def test_what_crosses_versions_leaves_out_what_it_does_not_know() -> None:
    data = json.dumps({"task": "doctor", "folder": "f", "inner": {"size": 3, "colour": 1}, "rates": []}).encode()

    class Open(TaskNote, frozen=True, tag="doctor", forbid_unknown_fields=False):
        folder: str
        inner: Inner

    assert decode_note(data, Open, "r1 pi", any_version=True) == Open("f", Inner(3))
    with pytest.raises(StarError, match="unknown field"):
        decode_note(data, Open, "r1 pi")


def test_a_task_is_decoded_by_whoever_does_it() -> None:
    task = receive_task(Scripted(1, [to_json(Work(3))]), Told, Other)
    assert isinstance(task, Task)
    assert (task.name, task.note(Work)) == ("work", Work(3))
    assert receive_task(Scripted(1, [to_json(Other(3))]), Told, Other) == Other(3)
    with pytest.raises(StarError, match=r"r0 desk sent .*`\$\.note`"):
        receive_task(Scripted(1, [to_json(Done())]), Told, Other)


def test_the_end_of_the_run_comes_in_the_place_of_any_note() -> None:
    for get in (
        lambda star: receive_note(star, Told),
        lambda star: receive_task(star, Told, Other),
        receive_stop,
    ):
        with pytest.raises(Stopped) as stopped:
            get(Scripted(1, [to_json(StopNote(2))]))
        assert stopped.value.code == 2
    assert to_json(StopNote(2)) == b'{"stop": 2}'  # as every version says it
    with pytest.raises(StarError, match="the end of the run was due"):
        receive_stop(Scripted(1, [to_json(Done())]))


def test_an_error_of_another_rank_is_raised_with_its_name_and_kind() -> None:
    other = Scripted(1, [to_json(StopNote(2))])

    def fail() -> None:
        raise InputError("no such folder")

    with pytest.raises(Stopped):
        report_errors(other, fail)
    with pytest.raises(InputError, match="no such folder") as caught:
        on_every_rank(Scripted(0, other.sent), lambda: None, Told)
    assert caught.value.where == "r1 desk"
    # An error of rank 0's own goes first.
    with pytest.raises(TpimpiError, match="ours"):
        on_every_rank(Scripted(0, other.sent), lambda: (_ for _ in ()).throw(TpimpiError("ours")), Told)

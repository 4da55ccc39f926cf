"""Stop strings: the text up to the first of them, however it arrives in pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpimpi.serving.stops import until_stop
from tpimpi.serving.text.answer import Piece


def pieces_of(text: str, cuts: list[int]) -> list[Piece]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [Piece(text[a:b]) for a, b in itertools.pairwise(borders)]


@given(st.text("ab\n", max_size=30), st.lists(st.integers(0, 40)), st.lists(st.text("ab\n", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_complete_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert "".join(piece.text for piece in until_stop(pieces_of(text, cuts), stops)) == expected


@pytest.mark.parametrize(
    ("pieces", "given_out"), [(["He", "llo", " wor"], ["He", "llo", " "]), (["w", "o", "x"], ["wox"])]
)
def test_only_what_may_begin_a_stop_is_held_back(pieces: list[str], given_out: list[str]) -> None:
    stream = until_stop(map(Piece, pieces), ["world"])
    assert [next(stream).text for _ in given_out] == given_out


def test_nothing_is_taken_after_a_stop() -> None:
    def endless():
        yield Piece("one STOP")
        raise AssertionError("a token was made after the stop")

    assert list(until_stop(endless(), ["STOP"])) == [Piece("one ")]


def test_stops_are_looked_for_in_the_answer_alone() -> None:
    reasoning = [Piece("a STOP b ST", reasoning=True), Piece("OP", reasoning=True)]
    assert list(until_stop([*reasoning, Piece("ST")], ["STOP"])) == [*reasoning, Piece("ST")]
    assert list(until_stop([Piece("x ST"), *reasoning, Piece("OP y")], ["STOP"])) == [Piece("x "), *reasoning]

"""Stop strings: the text up to the first of them, however it arrives in pieces."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tpimpi.serving.generate import until_stop


def pieces_of(text: str, cuts: list[int]) -> list[str]:
    borders = sorted({0, len(text), *(cut % (len(text) + 1) for cut in cuts)})
    return [text[a:b] for a, b in itertools.pairwise(borders)]


@given(st.text("ab\n", max_size=30), st.lists(st.integers(0, 40)), st.lists(st.text("ab\n", min_size=1, max_size=4)))
def test_the_text_ends_before_the_first_complete_stop(text: str, cuts: list[int], stops: list[str]) -> None:
    found = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
    expected = text[: min(found)[1]] if found else text
    assert "".join(until_stop(pieces_of(text, cuts), stops)) == expected


@pytest.mark.parametrize(
    ("pieces", "given_out"), [(["He", "llo", " wor"], ["He", "llo", " "]), (["w", "o", "x"], ["wox"])]
)
def test_only_what_may_begin_a_stop_is_held_back(pieces: list[str], given_out: list[str]) -> None:
    stream = until_stop(iter(pieces), ["world"])
    assert [next(stream) for _ in given_out] == given_out


def test_nothing_is_taken_after_a_stop() -> None:
    def endless():
        yield "one STOP"
        raise AssertionError("a token was made after the stop")

    assert list(until_stop(endless(), ["STOP"])) == ["one "]

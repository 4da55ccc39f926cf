"""An answer in pieces as it comes: what it says, and the reasoning before that, for models that mark theirs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from tpimpi.serving.text.stream import IdStream, TextStream


@dataclass(frozen=True)
class Piece:
    """Text that is certain: of the answer, or of its `reasoning`; or a control token that marks a call of a tool. Such a
    `mark` is no text, or what a reader is shown in its place."""

    text: str
    reasoning: bool = False
    mark: str = ""


@dataclass(frozen=True)
class Allowed:
    """What may come next where the answer has a grammar: tokens of the `answer`, and `others` that are none, None for any
    but those that end it. `ends` are what may end it before there is an answer."""

    answer: bool = True
    others: frozenset[int] | None = frozenset()
    ends: frozenset[int] = frozenset()


class AnswerStream(Protocol):
    """Turns ids of one answer, one at a time, into pieces."""

    @property
    def tools(self) -> Sequence[str]: ...  # names of the tools that the answer calls

    def push(self, token_id: int) -> list[Piece]: ...  # those that this id completes

    def flush(self) -> list[Piece]: ...  # what is left at the end

    def allowed(self) -> Allowed: ...  # before the next id is pushed


class PlainAnswer:
    """All of it is the answer."""

    tools: Sequence[str] = ()

    def __init__(self, text: TextStream | IdStream) -> None:
        self._text = text

    def push(self, token_id: int) -> list[Piece]:
        return pieces(self._text.push(token_id))

    def flush(self) -> list[Piece]:
        return pieces(self._text.flush())

    def allowed(self) -> Allowed:
        return Allowed()


def pieces(text: str, *, reasoning: bool = False) -> list[Piece]:
    """One piece, or none where there is no text."""
    return [Piece(text, reasoning)] if text else []


class MarkedAnswer:
    """An answer stream, with a piece for each control token of calls, by id, that stands in the answer itself."""

    def __init__(self, stream: AnswerStream, marks: Mapping[int, str]) -> None:
        self._stream, self._marks = stream, marks

    @property
    def tools(self) -> Sequence[str]:
        return self._stream.tools

    def push(self, token_id: int) -> list[Piece]:
        done = self._stream.push(token_id)
        if token_id in self._marks and self._stream.allowed().answer:
            done = [*done, Piece("", mark=self._marks[token_id])]
        return done

    def flush(self) -> list[Piece]:
        return self._stream.flush()

    def allowed(self) -> Allowed:
        return self._stream.allowed()

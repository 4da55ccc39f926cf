"""Reasoning between the tokens <think> and </think>, with which Qwen3, SmolLM3, GLM-4.5, DeepSeek-R1 and others begin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tpimpi.serving.text.answer import Allowed, Piece, pieces
from tpimpi.serving.text.stream import TextStream

OPENING, CLOSING = "<think>", "</think>"
_LINE_BREAKS = ("\n", "\n\n", "Ċ", "ĊĊ", "<0x0A>")  # as vocabularies spell them


@dataclass(frozen=True)
class Thinking:
    """The ids of the two tokens in a vocabulary that has both. `steering`: no content of a chat becomes the first.
    `line_breaks` are what models write behind the second."""

    opening: int
    closing: int
    steering: bool
    line_breaks: frozenset[int] = frozenset()

    @classmethod
    def of(cls, find: Callable[[str], int | None], control_ids: Collection[int]) -> Thinking | None:
        """`find` gives the id of a token, or None. None where one of the two is not there."""
        opening, closing = find(OPENING), find(CLOSING)
        if opening is None or closing is None:
            return None
        breaks = frozenset(index for token in _LINE_BREAKS if (index := find(token)) is not None)
        return cls(opening, closing, opening in control_ids, breaks)

    def ends(self, ends: frozenset[int]) -> frozenset[int]:
        """The ids that end an answer, where a model's files name these."""
        return ends

    def stream(self, text: TextStream, prompt: Sequence[int]) -> ThinkingStream:
        """For the answer to `prompt`, at whose end some templates write the opening token and blanks."""
        opened = self.steering and self._is_last(text, prompt)
        return ThinkingStream(self, text, opened=opened, closed=self.is_closed(text, prompt))

    def is_closed(self, text: TextStream, prompt: Sequence[int]) -> bool:
        """Whether a prompt ends with the closing token: there is to be no reasoning."""
        last = next((token_id for token_id in reversed(prompt) if not text.is_blank(token_id)), None)
        return last == self.closing

    def _is_last(self, text: TextStream, prompt: Sequence[int]) -> bool:
        for token_id in reversed(prompt):
            if token_id == self.opening:
                return True
            if not text.is_blank(token_id):
                return False
        return False


class ThinkingStream:
    """Tells reasoning from answer. Only what an answer begins with is reasoning; later <think> and </think> are text.

    Blanks that stand between the marks and the text are of neither.
    """

    tools: Sequence[str] = ()

    def __init__(self, thinking: Thinking, text: TextStream, *, opened: bool, closed: bool = False) -> None:
        self._thinking, self._text = thinking, text
        self._part: Literal["begun", "reasoning", "closed", "answer"] = "reasoning" if opened else "begun"
        self._closed = closed  # the prompt says that there is none
        self._begins = True  # nothing but blanks of this part so far
        self._blanks = ""  # held back

    def push(self, token_id: int) -> list[Piece]:
        if token_id == self._thinking.opening and self._part == "begun":
            self._enter("reasoning")
            return []
        if token_id == self._thinking.opening and self._part == "reasoning" and self._begins:
            return []  # once more, though the template has opened it
        if token_id == self._thinking.closing and self._part == "reasoning":
            done = self._say(self._text.flush())
            self._enter("closed")
            return done
        return self._say(self._text.push(token_id))

    def flush(self) -> list[Piece]:
        done = self._say(self._text.flush())
        return done + (pieces(self._blanks) if self._part == "begun" else [])

    def allowed(self) -> Allowed:
        if self._part == "reasoning":
            return Allowed(answer=False, others=None)
        if self._part == "begun" and not self._closed and self._begins:
            return Allowed(others=frozenset([self._thinking.opening]))
        if self._part == "closed" and not self._blanks:
            return Allowed(others=self._thinking.line_breaks)
        return Allowed()

    def _enter(self, part: Literal["reasoning", "closed"]) -> None:
        self._text.flush()
        self._part, self._begins, self._blanks = part, True, ""

    def _say(self, text: str) -> list[Piece]:
        if self._part == "answer" or not text:
            return pieces(text)
        text = self._blanks + text
        if self._part == "reasoning":
            if self._begins:
                text = text.lstrip()
            self._begins = not text
            kept = text.rstrip()
            self._blanks = text[len(kept) :]
            return pieces(kept, reasoning=True)
        told = text.lstrip()
        if not told:
            self._blanks = text
            return []
        before = text[: len(text) - len(told)]
        if self._part == "begun":
            told = text
        elif "\n" in before:  # an indented first line stays so
            told = before.rpartition("\n")[2] + told
        self._part, self._blanks = "answer", ""
        return pieces(told)

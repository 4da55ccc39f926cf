"""Reasoning between the tokens <think> and </think>, with which Qwen3, SmolLM3, GLM-4.5, DeepSeek-R1 and others begin."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Literal

from tpimpi.serving.text.answer import Piece, pieces
from tpimpi.serving.text.stream import TextStream

OPENING, CLOSING = "<think>", "</think>"


@dataclass(frozen=True)
class Thinking:
    """The ids of the two tokens in a vocabulary that has both. `steering`: no content of a chat becomes the first."""

    opening: int
    closing: int
    steering: bool

    @classmethod
    def of(cls, find: Callable[[str], int | None], control_ids: Collection[int]) -> Thinking | None:
        """`find` gives the id of a token, or None. None where one of the two is not there."""
        opening, closing = find(OPENING), find(CLOSING)
        if opening is None or closing is None:
            return None
        return cls(opening, closing, opening in control_ids)

    def ends(self, ends: frozenset[int]) -> frozenset[int]:
        """The ids that end an answer, where a model's files name these."""
        return ends

    def stream(self, text: TextStream, prompt: Sequence[int]) -> ThinkingStream:
        """For the answer to `prompt`, at whose end some templates write the opening token and blanks."""
        return ThinkingStream(self, text, opened=self.steering and self._is_last(text, prompt))

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

    def __init__(self, thinking: Thinking, text: TextStream, *, opened: bool) -> None:
        self._thinking, self._text = thinking, text
        self._part: Literal["begun", "reasoning", "closed", "answer"] = "reasoning" if opened else "begun"
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

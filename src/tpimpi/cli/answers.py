"""An answer on the screen or in files: its text on stdout, its reasoning, where that is wanted, on stderr."""

from __future__ import annotations

import contextlib
import os
import sys

from tpimpi.cli.process import print_answer
from tpimpi.serving.text.answer import Piece
from tpimpi.system.terminal import STDERR, is_terminal

REASONING_HEADING, ANSWER_HEADING = "reasoning:", "answer:"
_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"


class AnswerPrinter:
    """Prints the pieces of one answer as they come. On stdout stands the answer alone.

    `reasoning`: print that too, on stderr, under a heading, at a terminal dim; another heading says that the answer begins.
    """

    def __init__(self, *, reasoning: bool) -> None:
        self._reasoning = reasoning
        self._dim = reasoning and is_terminal(STDERR) and _takes_styles()
        self._last_reasoning = ""  # since the last heading
        self._last = ""  # of the answer

    def print(self, piece: Piece) -> None:
        """Print the piece at once. Raises StorageError where stdout cannot be written."""
        if not piece.reasoning:
            self._leave_reasoning(ANSWER_HEADING)
            self._last = piece.text
            print_answer(piece.text)
        elif self._reasoning:
            heading = "" if self._last_reasoning else f"{REASONING_HEADING}\n"
            self._last_reasoning = piece.text
            _note(heading + (f"{_DIM}{piece.text}{_NOT_DIM}" if self._dim else piece.text))

    def end(self) -> None:
        """End the answer with a line end."""
        self._leave_reasoning()
        if not self._last.endswith("\n"):
            print_answer("\n")

    def _leave_reasoning(self, heading: str | None = None) -> None:
        if self._last_reasoning:
            end = "" if self._last_reasoning.endswith("\n") else "\n"
            _note(end + (f"{heading}\n" if heading else ""))
            self._last_reasoning = ""


def _takes_styles() -> bool:
    """Whether a terminal is one that can show text dim, and its user has not asked for plain text (no-color.org)."""
    return not os.environ.get("NO_COLOR") and os.environ.get("TERM") not in (None, "", "dumb")


def _note(text: str) -> None:
    with contextlib.suppress(OSError):  # the answer stands, though nobody reads this
        print(text, end="", file=sys.stderr, flush=True)

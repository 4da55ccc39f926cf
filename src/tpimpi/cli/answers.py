"""An answer on the screen or in files: its text on stdout, its reasoning, where that is wanted, on stderr."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable
from contextlib import closing

from tpimpi.cli import remarks
from tpimpi.cli.options import OutputOptions
from tpimpi.cli.process import print_answer, say
from tpimpi.serving.llm import LLM
from tpimpi.serving.text.answer import Piece
from tpimpi.serving.transcript import Turn
from tpimpi.system.terminal import STDERR, is_terminal

REASONING_HEADING, ANSWER_HEADING = "reasoning:", "answer:"
PROGRESS_DELAY_S = 1.0
_DIM, _NOT_DIM = "\x1b[2m", "\x1b[22m"


def show_answer(llm: LLM, turn: Turn, output: OutputOptions, interrupts: Callable[[], int] = lambda: 0) -> None:
    """Print the answer to one prompt as it comes, and end it with a line end; it is stopped once there are `interrupts`."""
    printer = AnswerPrinter(reasoning=output.shows_reasoning)
    with closing(ReadingProgress(shown=not output.quiet and is_terminal(STDERR) and _takes_styles())) as progress:

        def going_on(done: int, prompt: int) -> bool:
            progress.update(done, prompt)
            return not interrupts()

        for piece in llm.answer(turn, going_on):
            progress.close()
            printer.print(piece)
    printer.end()
    if not output.quiet:
        say(remarks.tools_not_called(turn))
        say(remarks.why_cut(llm, turn))


class ReadingProgress:
    """How far a prompt is read, on the terminal: shown once that takes a while, and wiped away at its end."""

    def __init__(self, *, shown: bool) -> None:
        self._open, self._text, self._visible = shown, "", False
        self._lock = threading.Lock()
        self._timer: threading.Timer | None = None

    def update(self, done: int, prompt: int) -> None:
        """So many positions of so many are done."""
        if not self._open or done >= prompt:  # the answer has begun
            self.close()
            return
        with self._lock:
            self._text = f"reading the prompt: {done} of {prompt} tokens"
            if self._visible:
                self._show()
            elif self._timer is None:
                self._timer = threading.Timer(PROGRESS_DELAY_S, self._begin)
                self._timer.daemon = True
                self._timer.start()

    def _begin(self) -> None:
        with self._lock:
            if self._open:
                self._visible = True
                self._show()

    def _show(self) -> None:
        _note(f"\r{self._text}\x1b[K")

    def close(self) -> None:
        """Wipe it away."""
        with self._lock:
            if self._open and self._timer is not None:
                self._timer.cancel()
            if self._visible:
                _note("\r\x1b[K")
            self._open = self._visible = False


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
        if not piece.text:  # a mark
            return
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

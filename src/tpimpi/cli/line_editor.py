"""The prompt at a terminal: editing, history and pasted text, by prompt_toolkit. Imported only where somebody types."""

from __future__ import annotations

import os
from collections.abc import Sequence

from prompt_toolkit import PromptSession
from prompt_toolkit.data_structures import Size
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.input.posix_pipe import PosixPipeInput
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output.vt100 import Vt100_Output

from tpimpi.system.keyboard import CharacterTerminal, Keyboard
from tpimpi.system.terminal import Input

PROMPT = "> "
DEFAULT_ROWS, DEFAULT_COLUMNS = 24, 80  # of a terminal that does not say


def usable() -> bool:
    """Whether the terminal is one that can be written to in places."""
    return os.environ.get("TERM") not in (None, "", "dumb")


class LineEditor:
    """Asks for prompts at the terminal of standard input, which is its own until `close`; `keyboard` sees Ctrl-C in answers.

    The history is in memory alone.
    """

    def __init__(self, keys: Input, history: Sequence[str]) -> None:
        """Raises OSError or termios.error where the terminal cannot be had."""
        self._terminal = CharacterTerminal()
        self._pipe = PosixPipeInput.create()
        self._keys = self._pipe.__enter__()
        self._screen = os.fdopen(os.dup(self._terminal.descriptor), "w", encoding="utf-8", errors="replace")
        # Without asking the terminal where its cursor is: the answer would come among the keys.
        output = Vt100_Output(self._screen, self._size, term=os.environ.get("TERM"), enable_cpr=False)
        self._session: PromptSession[str] = PromptSession(
            PROMPT,
            input=self._keys,
            output=output,
            history=InMemoryHistory(list(history)),
            key_bindings=_bindings(),
            multiline=True,
            prompt_continuation=" " * len(PROMPT),
        )
        self.keyboard = Keyboard(keys, self._got)

    def _size(self) -> Size:
        columns, rows = os.get_terminal_size(self._screen.fileno())
        return Size(rows=rows or DEFAULT_ROWS, columns=columns or DEFAULT_COLUMNS)

    def _got(self, keys: bytes) -> None:
        if keys:
            self._keys.send_bytes(keys)
        else:
            self._keys.close()

    def ask(self) -> str:
        """What was typed or pasted, of one line or several. Raises EOFError at Ctrl-D, and KeyboardInterrupt at Ctrl-C where
        nothing is typed; else Ctrl-C takes away what is."""
        return self._session.prompt(handle_sigint=False)

    def close(self) -> None:
        self._terminal.close()
        self._screen.close()


def _bindings() -> KeyBindings:
    """Enter ends the prompt, Alt-Enter (Escape, Enter) begins a new line in it."""
    bindings = KeyBindings()

    @bindings.add("enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.validate_and_handle()

    @bindings.add("escape", "enter")
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @bindings.add("c-c")
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt, style="class:aborting")

    return bindings

"""The conversation at a terminal: prompts, commands that begin with a slash, and Ctrl-C, which stops an answer."""

from __future__ import annotations

import contextlib
import os
import signal
import termios
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import asdict
from typing import Protocol

from tpimpi.cli import remarks
from tpimpi.cli.answers import show_answer
from tpimpi.cli.line_editor import PROMPT, LineEditor, usable
from tpimpi.cli.options import RunOptions
from tpimpi.cli.process import Job, say
from tpimpi.cli.remarks import show_number, shown_prompt
from tpimpi.errors import InputError, StorageError
from tpimpi.serving.llm import LLM
from tpimpi.serving.session import SAMPLING, save
from tpimpi.serving.transcript import Turn
from tpimpi.system.keyboard import INTERRUPTS_TO_LEAVE
from tpimpi.system.terminal import STDERR, Input, is_terminal, launcher_stream, write_past_the_launcher

HOW_TO_LEAVE = "Ctrl-D or /bye leaves"
HELP = """\
/new              begin a new conversation
/system TEXT      the system prompt from now on; without TEXT: show it; with "": none
/undo             take the last prompt and its answer back
/retry            answer the last prompt anew (at temperature 0, the default, with the same tokens)
/save FILE        write the conversation to a file that --session reads
/stats            tokens, times, and room in the context
/help             this
/bye, /exit       leave, as Ctrl-D does
Ctrl-C stops an answer, and empties what is typed. Text of several lines can be pasted; Alt-Enter begins a new line.
A prompt that begins with a slash is written with two: //etc."""


class PromptReader(Protocol):
    """Who asks for prompts, and knows whether an answer is to be stopped."""

    def ask(self) -> str: ...  # raises EOFError at the end, KeyboardInterrupt at Ctrl-C where nothing is typed

    def answering(self) -> contextlib.AbstractContextManager[Callable[[], int]]: ...  # how often Ctrl-C was pressed

    def close(self) -> None: ...


class EditorReader:
    """With the terminal at our command; see line_editor."""

    def __init__(self, editor: LineEditor) -> None:
        self._editor, self.ask = editor, editor.ask

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], int]]:
        keyboard = self._editor.keyboard
        keyboard.begin_answer()
        try:
            yield lambda: keyboard.interrupts
        finally:
            keyboard.end_answer()

    def close(self) -> None:
        self._editor.close()


class LineReader:
    """With a terminal that gives lines. Without a launcher Ctrl-C is a signal to us, else to the launcher, which ends us."""

    def __init__(self, keys: Input) -> None:
        self._lines = keys.lines(PROMPT if is_terminal(STDERR) else "", together=True)
        self._interrupts, self._answering = 0, False
        self._leave = signal.getsignal(signal.SIGINT)
        if launcher_stream(0) is None:
            signal.signal(signal.SIGINT, self._interrupted)

    def _interrupted(self, number: int, frame: object) -> None:
        self._interrupts += 1
        if self._answering and self._interrupts >= INTERRUPTS_TO_LEAVE and callable(self._leave):
            self._leave(number, frame)  # type: ignore[arg-type]
        if not self._answering:
            # Not through the stream: it may just be writing the prompt, and refuses to be written to in the midst of that.
            with contextlib.suppress(OSError):
                os.write(STDERR, f"\n{HOW_TO_LEAVE}\n".encode())

    def ask(self) -> str:
        line = next(self._lines, None)
        if line is None:
            raise EOFError
        return line

    @contextlib.contextmanager
    def answering(self) -> Iterator[Callable[[], int]]:
        self._interrupts, self._answering = 0, True
        try:
            yield lambda: self._interrupts
        finally:
            self._answering = False

    def close(self) -> None:
        signal.signal(signal.SIGINT, self._leave)


def prompt_reader(keys: Input, llm: LLM) -> PromptReader:
    """Who asks for prompts at this terminal."""
    said = [] if llm.conversation.session is None else llm.conversation.session.turns
    if usable():
        with contextlib.suppress(OSError, termios.error):
            editor = LineEditor(keys, [turn.prompt for turn in said])
            write_past_the_launcher(any_launcher=True)  # so that prompt and answer come in their order
            return EditorReader(editor)
    return LineReader(keys)


class Leave(Exception):  # noqa: N818  (it is no error)
    """The user leaves."""


class Chat:
    """One conversation, and the commands that change it."""

    def __init__(self, llm: LLM, options: RunOptions, job: Job) -> None:
        session = llm.conversation.session
        assert session is not None, "a conversation at a terminal has a transcript"
        self._llm, self._options, self._job, self._session = llm, options, job, session
        self._quiet = options.output.quiet
        self._last: tuple[str, int] | None = None  # the last prompt, and how often it was tried
        self._commands: dict[str, Callable[[str], None]] = {
            "/new": self._new,
            "/system": self._system,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/stats": self._stats,
            "/help": lambda rest: say(HELP),
            "/bye": self._bye,
            "/exit": self._bye,
        }

    def run(self, first: Turn | None) -> int:
        """Until the user leaves; `first` is an answer that an earlier run left unfinished. Returns how many answers there
        were."""
        with closing(prompt_reader(self._job.input or Input(), self._llm)) as self._prompts:
            if not self._quiet:
                self._greet(first)
            if first is not None:
                self._answer(first)
            with contextlib.suppress(EOFError, Leave):
                while True:
                    self._turn()
        return len(self._llm.report.answers)

    def _turn(self) -> None:
        try:
            text = self._prompts.ask()
        except KeyboardInterrupt:
            say(HOW_TO_LEAVE)
            return
        if not text.strip():
            return
        try:
            if not text.startswith("/"):
                self._prompt(text)
            elif text.startswith("//"):
                self._prompt(text[1:])
            else:
                word, _, rest = text.partition(" ")
                self._command(word.strip())(rest.strip())
        except InputError as error:
            say(f"{self._job.name()}: {error}")

    def _command(self, word: str) -> Callable[[str], None]:
        if word not in self._commands:
            raise InputError(f"{word} is no command; /help lists them, and a prompt that begins with / is written //")
        return self._commands[word]

    def _prompt(self, text: str, attempt: int = 0) -> None:
        before = self._llm.conversation.left_out
        self._last = (text, attempt)
        turn = self._llm.conversation.turn(text, attempt)
        if not self._quiet:
            say(remarks.left_out(self._llm.conversation.left_out - before))
        self._answer(turn)

    def _answer(self, turn: Turn) -> None:
        with self._prompts.answering() as interrupts:
            show_answer(self._llm, turn, self._options.output, interrupts)

    def _greet(self, first: Turn | None) -> None:
        report, turns = self._llm.report, self._session.turns
        so_far = f"; {show_number(len(turns), 'turn')} so far, the last {shown_prompt(turns[-1])}" if turns else ""
        say(f"{report.model} {report.format}{so_far}")
        say(f"/help lists commands, Ctrl-C stops an answer, {HOW_TO_LEAVE}")
        if first is not None:
            say(remarks.going_on(self._session, first))

    # Commands; each gets what stands after it

    def _new(self, rest: str) -> None:
        if self._session.turns:
            self._session.undo(len(self._session.turns))
        self._last = None
        say("a new conversation" + (", with the same system prompt" if self._session.system else ""))

    def _system(self, rest: str) -> None:
        if rest:
            self._llm.conversation.change_system(None if rest == '""' else rest)
        say(f"system prompt: {self._session.system or 'none'}")

    def _undo(self, rest: str) -> None:
        if not self._session.turns:
            raise InputError("there is no turn to take back")
        turn = self._session.turns[-1]
        self._session.undo()
        say(f"taken back: {shown_prompt(turn)}; {show_number(len(self._session.turns), 'turn')} left")

    def _retry(self, rest: str) -> None:
        turns = self._session.turns
        if turns and (self._last is None or turns[-1].prompt == self._last[0]):
            self._last = (turns[-1].prompt, 0 if self._last is None else self._last[1])
            self._session.undo()
        if self._last is None:
            raise InputError("there is no prompt to answer anew")
        self._prompt(self._last[0], self._last[1] + 1)

    def _save(self, rest: str) -> None:
        if not self._session.turns:
            raise InputError("there is nothing to save yet")
        header, sampling = self._llm.engine.opened.header, asdict(self._options.generate.sampling)
        first_line = {"model": header.model, "fingerprint": header.fingerprint, "vocabulary": header.config.vocab}
        options = {"options": {name: sampling[name] for name in SAMPLING}}
        try:
            save(rest, self._session, first_line | options)
        except StorageError as error:  # the conversation goes on
            raise InputError(str(error)) from error
        say(f"{show_number(len(self._session.turns), 'turn')} saved; --session {rest} goes on with them")

    def _stats(self, rest: str) -> None:
        for line in remarks.figures(self._llm, self._session):
            say(line)

    def _bye(self, rest: str) -> None:
        raise Leave

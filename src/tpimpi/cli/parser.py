"""The parser of every command: its errors are one line, and say what was meant."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable
from typing import NoReturn

from tpimpi.errors import InputError

COMMANDS = ("slice", "synth", "inspect", "cache", "perplexity", "bench", "plan", "doctor")
# What other programs call a run.
RUN_WORDS = ("chat", "complete", "completion", "generate", "prompt", "run")


def offer(option: argparse.Action, values: Iterable[str]) -> None:
    """Known values of an option that code of our own checks, not `choices`: argcomplete completes them in a shell."""
    known = list(values)
    option.completer = lambda **_: known  # type: ignore[attr-defined]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of ours."""

    def error(self, message: str) -> NoReturn:
        meant = ""
        if message.startswith("unrecognized arguments: "):
            meant = self._meant(message.removeprefix("unrecognized arguments: ").split(" ")[0])
        message = message if len(message) < 300 else f"{message[:300]}…"
        if "expected one argument" in message:
            message += " (a value that begins with - is given as --option=-value)"
        raise InputError(f"{message}{meant}; see: {self.prog} --help")

    def _meant(self, word: str) -> str:
        """What the user may have meant by an argument that there is not, as the end of a message."""
        name = word.partition("=")[0]
        if not name.startswith("-"):
            if " " in self.prog.removeprefix("python -m tpimpi"):  # a command, which has no commands of its own
                return ""
            if name in RUN_WORDS:
                return (
                    " (a run has no name: leave the word out, and give the prompt with --prompt, or on standard input)"
                )
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            if not near:
                return " (to ask that, give it with --prompt)"
        else:
            known = [option for option in self._option_string_actions if option.startswith("--")]
            wanted = f"--{name.lstrip('-').replace('_', '-')}"
            near = [option for option in known if len(wanted) > 3 and option.startswith(wanted)]
            # Compared without the dashes, which all of them have.
            near = near or [f"--{n}" for n in difflib.get_close_matches(wanted[2:], [k[2:] for k in known], n=1)]
        return f" (did you mean {' or '.join(near[:3])}?)" if near else ""

"""The parser of every command: its errors are one line, and say what was meant."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import NoReturn

from tpimpi.errors import InputError, shorten

COMMANDS = ("slice", "synth", "inspect", "cache", "perplexity", "bench", "plan", "doctor", "serve")
MAX_MESSAGE_CHARACTERS = 300  # of what argparse says, values included
# What other programs call a run.
RUN_WORDS = ("chat", "complete", "completion", "generate", "prompt", "run")


def offer(option: argparse.Action, values: Iterable[str]) -> None:
    """Known values of an option that code of our own checks, not `choices`: argcomplete completes them in a shell."""
    known = list(values)
    option.completer = lambda **_: known  # type: ignore[attr-defined]


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, like every other error of ours."""

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """As argparse's, but for `--option=--`, of which argparse before Python 3.13 makes an empty list."""
        for word in args or ():
            name, _, value = word.partition("=")
            if word == "--":
                break
            if value == "--" and name in self._option_string_actions:
                self.error(f"{name} is '--', which is no value of an option; give another, or leave {name} out")
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        meant = ""
        if message.startswith("unrecognized arguments: "):
            meant = self._meant(message.removeprefix("unrecognized arguments: ").split(" ")[0])
        message = shorten(message, MAX_MESSAGE_CHARACTERS)
        if "expected one argument" in message:
            message += " (a value that begins with - is given as --option=-value)"
        raise InputError(f"{message}{meant}; see: {self.prog} --help")

    def _meant(self, word: str) -> str:
        """What the user may have meant by an argument that there is not, as the end of a message."""
        import difflib  # which a run does without

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
